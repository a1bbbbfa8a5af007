"""The way to a phauld: its address, its stubs, and gRPC's errors as ours.

The invariant: a daemon that does not answer is told within seconds; no call waits for it for ever.
"""

import asyncio
import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import grpc

from phaul.v1 import migrations_pb2_grpc, node_pb2_grpc
from phaul_client.errors import PeerRefused, PeerUnavailable, PhaulError
from phaul_client.pipe_choice import is_loopback
from phaul_client.status import from_rpc_error
from phaul_client.tls import CERTIFICATE_FILE, Tls

DEFAULT_DAEMON: Final = "unix:/run/phaul/phauld.sock"
DEFAULT_PORT: Final = 7707
STANDARD_TLS_DIRS: Final = (Path.home() / ".config" / "phaul" / "tls", Path("/etc/phaul/tls"))
NO_TLS: Final = "none"
CALL_SECONDS: Final = 10.0
#: For calls that make the daemon work or ask the other node.
LONG_CALL_SECONDS: Final = 60.0
#: How long a daemon that has answered before may be away, for instance for a restart.
AWAY_SECONDS: Final = 30.0
RETRY_SECONDS: Final = 0.5

_OPTIONS: Final = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.min_reconnect_backoff_ms", 5000),  # also the limit of one attempt to connect, 20 s otherwise
    ("grpc.max_receive_message_length", 64 << 20),
)
_HOST: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_V6: Final = re.compile(r"[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9_.-]+)?")
_Answer = TypeVar("_Answer")


def parse_host_port(text: str, default_port: int = DEFAULT_PORT) -> str:
    """ "host:port" or "[v6]:port" of what a person wrote, the port filled in. Raises `ValueError`."""
    if text.count(":") > 1 and _is_v6(text):
        return f"[{text}]:{default_port}"
    bracketed = re.fullmatch(r"\[([^\[\]]*)\](?::(\d+))?", text)
    plain = re.fullmatch(r"([^:\[\]]*)(?::(\d+))?", text)
    match = bracketed or plain
    if match is None or not (_is_v6(match[1]) if bracketed else _HOST.fullmatch(match[1])):
        raise ValueError(f"{text!r} is not HOST, HOST:PORT or [V6]:PORT")
    port = int(match[2]) if match[2] else default_port
    if not 0 < port < 65536:
        raise ValueError(f"{port} in {text!r} is no port: 1 to 65535")
    return f"[{match[1]}]:{port}" if bracketed else f"{match[1]}:{port}"


def _is_v6(text: str) -> bool:
    try:
        return bool(_V6.fullmatch(text)) and ipaddress.IPv6Address(text) is not None
    except ValueError:
        return False


def parse_daemon(text: str) -> str:
    """gRPC's target for a daemon: unix:/PATH, /PATH, HOST or HOST:PORT. Raises `ValueError`."""
    path = text.removeprefix("unix:")
    if path.startswith("/"):
        return f"unix:{path}"
    if path != text:
        raise ValueError(f"{text!r}: the path of a socket must be absolute, as in {DEFAULT_DAEMON}")
    return parse_host_port(text)


@dataclass(frozen=True, slots=True)
class Daemon:
    """The services of one phauld."""

    address: str
    node: "node_pb2_grpc.NodeAsyncStub"
    migrations: "migrations_pb2_grpc.MigrationsAsyncStub"


def tls_directory(address: str, given: str, standard: Sequence[Path] = STANDARD_TLS_DIRS) -> Path | None:
    """Where the certificates for this daemon are; `None`: none are needed, or none are to be used.

    Without a word, the first of the standard directories that has some, for what is not this machine.
    """
    if address.startswith("unix:") or given == NO_TLS:
        return None
    if given:
        return Path(given)
    if is_loopback(address):
        return None
    return next((each for each in standard if (each / CERTIFICATE_FILE).exists()), None)


def _channel(address: str, tls_dir: str, tls_name: str) -> grpc.aio.Channel:
    directory = tls_directory(address, tls_dir or os.environ.get("PHAUL_TLS_DIR", ""))
    if directory is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    name = tls_name or os.environ.get("PHAUL_TLS_NAME", "") or address.rpartition(":")[0].strip("[]")
    options = [*_OPTIONS, ("grpc.ssl_target_name_override", name)]
    return grpc.aio.secure_channel(address, Tls(directory).channel_credentials(), options=options)


@contextlib.asynccontextmanager
async def connect(address: str, tls_dir: str = "", tls_name: str = "") -> AsyncIterator[Daemon]:
    """The services at a target of `parse_daemon`. An error of gRPC inside becomes a `PhaulError`.

    `tls_dir` and `tls_name` are those of `--help`; without them the environment counts.
    """
    async with _channel(address, tls_dir, tls_name) as channel:
        try:
            yield Daemon(address, node_pb2_grpc.NodeStub(channel), migrations_pb2_grpc.MigrationsStub(channel))
        except grpc.aio.AioRpcError as exc:
            raise translate(address, exc) from exc


class DaemonError(PhaulError):
    """The daemon said no.

    Attributes:
        log_tail: the end of criu's log; empty if it is not about criu.
    """

    def __init__(self, message: str, *, reason: str, remedy: str, log_tail: str = "") -> None:
        super().__init__(message, reason=reason, remedy=remedy)
        self.log_tail = log_tail


class DaemonUnreachable(PhaulError):
    """The daemon does not answer, or no longer: what was asked for may or may not have been done."""

    default_reason = "PEER_UNREACHABLE"


def translate(address: str, error: grpc.aio.AioRpcError) -> PhaulError:
    """The error for people: whose daemon it is needs saying only if it does not answer."""
    ours = from_rpc_error(address, error)
    if isinstance(ours, PeerUnavailable) and error.code() is not grpc.StatusCode.UNKNOWN:
        if address.startswith("unix:") and not _may_connect(Path(address.removeprefix("unix:"))):
            remedy = "only root, and the members of phauld's socket_group: sudo phaul …"
            return DaemonUnreachable(f"no permission to use {address}", remedy=remedy)
        remedy = "start it (systemctl start phauld), or say with --daemon where it is"
        if not address.startswith("unix:"):
            remedy += "; if it has TLS: --tls-dir and --tls-name"
        return DaemonUnreachable(f"no phauld at {ours.message}", remedy=remedy)
    if ours.remedy or ours.reason != PeerRefused.default_reason:
        message = ours.message.removeprefix(f"{address}: ")
        return DaemonError(message, reason=ours.reason, remedy=ours.remedy, log_tail=ours.log_tail)
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        remedy = "check that it is a phauld, and as new as phaul"
        return DaemonError(f"what answers at {address} does not know this call", reason="UNSUPPORTED", remedy=remedy)
    detail = error.details() or error.code().name
    remedy = "this is a defect of phaul: its log (journalctl -u phauld) has more"
    return DaemonError(f"phauld failed: {detail}", reason=ours.reason, remedy=remedy, log_tail=ours.log_tail)


def _may_connect(path: Path) -> bool:
    """Whether it is not the mode of the socket, or of what is above it, that is in the way."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(os.fspath(path))
        except PermissionError:
            return False
        except OSError:
            return True
    return True


async def persistently(attempt: Callable[[], Awaitable[_Answer]], tell: Callable[[str], None]) -> _Answer:
    """Make a call again while a daemon that has answered before is away. Raises what it raises in the end."""
    away_since: float | None = None
    clock = asyncio.get_running_loop().time
    while True:
        started = clock()
        try:
            return await attempt()
        except grpc.aio.AioRpcError as exc:
            failed = clock()
            if exc.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise
            if away_since is None or failed - started > CALL_SECONDS:  # else it was not there in between
                away_since = failed
                tell("phauld is away; trying again")
            elif failed - away_since > AWAY_SECONDS:
                raise
        await asyncio.sleep(RETRY_SECONDS)
