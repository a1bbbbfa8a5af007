"""Asks who may call, and turns the errors of handlers into gRPC's status, in one place for all services.

The invariant: what a peer sends is looked at only once it is known that it may make the call.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
from google.protobuf import message

from phaul_client.errors import InvalidRequest, PhaulError
from phaul_client.status import reason_of, to_status
from phaul_criu.errors import CriuError
from phauld.guard import Guard
from phauld.observer import Observer
from phauld.seldom import Seldom

logger = logging.getLogger(__name__)

_OURS: Final = (PhaulError, CriuError, OSError, TimeoutError)
#: Callers choose how often they fail; what is told of it is bounded, and kinds do not hide each other.
_STRANGERS: Final = Seldom(lines=20)
_REFUSED: Final = Seldom(lines=200)
_FAILED: Final = Seldom(lines=20)
_KINDS: Final[dict[str, Callable[..., grpc.RpcMethodHandler[Any, Any]]]] = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler, those for inspection too; a bug is logged with its traceback and answered as INTERNAL."""

    def __init__(self, guard: Guard | None = None, observer: Observer | None = None) -> None:
        self._guard = guard
        self._observer = observer or Observer()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or (self._guard is None and not method.startswith("/phaul.")):
            return handler
        kind = next(name for name in _KINDS if getattr(handler, name) is not None)
        behaviour = getattr(handler, kind)
        # the one of health.Watch is a coroutine that writes its answers
        wrap = _many if inspect.isasyncgenfunction(behaviour) else _one
        read = _read_all if kind.startswith("stream_") else _read
        reader = functools.partial(read, handler.request_deserializer)
        wrapped = wrap(self._guard, method, reader, behaviour, functools.partial(_refuse, self._observer, method))
        return _KINDS[kind](wrapped, None, handler.response_serializer)


def _read(deserialize: Any, data: bytes) -> Any:
    try:
        return deserialize(data)
    except message.DecodeError as exc:
        raise InvalidRequest(f"these bytes are no message of this call: {exc}") from exc


async def _read_all(deserialize: Any, stream: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for data in stream:
        yield _read(deserialize, data)


def _one(guard: Guard | None, method: str, read: Any, behaviour: Any, refuse: Any) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            if guard is not None:
                guard.check(method, context)
            return await behaviour(read(request), context)
        except Exception as exc:
            await refuse(exc, context)

    return call


def _many(guard: Guard | None, method: str, read: Any, behaviour: Any, refuse: Any) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            if guard is not None:
                guard.check(method, context)
            async for answer in behaviour(read(request), context):
                yield answer
        except Exception as exc:
            await refuse(exc, context)

    return call


async def _refuse(
    observer: Observer, method: str, error: Exception, context: grpc.aio.ServicerContext[Any, Any]
) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, NotImplementedError):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served")
    is_ours = isinstance(error, _OURS)
    observer.call_refused(reason_of(error))
    seldom = _FAILED if not is_ours else _STRANGERS if reason_of(error) == "UNAUTHORIZED" else _REFUSED
    if seldom.may_say(time.monotonic()):
        if kept_back := seldom.take_kept_back():
            logger.warning("refused or failed before and not told number=%d", kept_back)
        if is_ours:
            logger.info("refused method=%s peer=%s error=%s", method, context.peer(), error)
        else:
            logger.error("failed method=%s peer=%s", method, context.peer(), exc_info=error)
    await context.abort_with_status(to_status(error))
