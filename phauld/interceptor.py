"""Turns the errors of handlers into gRPC's status, in one place for all services."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc

from phaul_client.errors import PhaulError
from phaul_client.status import to_status
from phaul_criu.errors import CriuError
from phauld.guard import Guard

logger = logging.getLogger(__name__)

_OURS: Final = (PhaulError, CriuError, OSError, TimeoutError)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of ours; a bug is logged with its traceback and answered as INTERNAL."""

    def __init__(self, guard: Guard | None = None) -> None:
        self._guard = guard

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/phaul."):
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _one(self._guard, method, handler.unary_unary),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(
                _one(self._guard, method, handler.stream_unary),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_stream_rpc_method_handler(
            _many(self._guard, method, handler.unary_stream), handler.request_deserializer, handler.response_serializer
        )


def _one(guard: Guard | None, method: str, behaviour: Any) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            if guard is not None:
                guard.check(method, context)
            return await behaviour(request, context)
        except Exception as exc:
            await _refuse(method, exc, context)

    return call


def _many(guard: Guard | None, method: str, behaviour: Any) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            if guard is not None:
                guard.check(method, context)
            async for answer in behaviour(request, context):
                yield answer
        except Exception as exc:
            await _refuse(method, exc, context)

    return call


async def _refuse(method: str, error: Exception, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, _OURS):
        logger.info("refused method=%s error=%s", method, error)
    else:
        logger.error("failed method=%s", method, exc_info=error)
    await context.abort_with_status(to_status(error))
