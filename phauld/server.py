"""The daemon: one gRPC server on TCP and on a unix socket, the data port, and what they serve.

It knows no domain words. The invariant: on the way out nothing that was started is left half done.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from phaul.v1 import migrations_pb2, migrations_pb2_grpc, node_pb2, node_pb2_grpc, remote_pb2, remote_pb2_grpc
from phaul_client.errors import InvalidRequest
from phaul_client.hook_calls import HookSettings
from phaul_client.kernel_tls import Taken, try_it
from phaul_client.tls import Tls
from phaul_criu.criu import Criu
from phaul_criu.errors import CriuError
from phaul_criu.install import find_binary
from phauld import start_checks
from phauld.config import Config, is_loopback
from phauld.destination.admission import Terms
from phauld.destination.dataport import DataPort
from phauld.destination.remote_service import RemoteService
from phauld.guard import Guard
from phauld.interceptor import ErrorInterceptor
from phauld.journal import Journal
from phauld.node import Node
from phauld.node_service import NodeService
from phauld.notify import Notifier
from phauld.observer import Observers
from phauld.retention import prune_regularly
from phauld.source.migrations_service import MigrationsService
from phauld.sync_records import SyncRecords
from phauld.trees.restarts import Restarts
from phauld.trees.workloads import Workloads

if TYPE_CHECKING:
    from phauld.observing.metrics import Metrics
    from phauld.observing.tracing import Tracing
    from phauld.observing.web import Web

logger = logging.getLogger(__name__)

DRAIN_SECONDS: Final = 30.0
SERVICES: Final = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((remote_pb2, "Remote"), (migrations_pb2, "Migrations"), (node_pb2, "Node"))
)
_CHANNELZ: Final = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # a second daemon on the same port is an error, not half of the calls
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # What strangers can hold: so many connections, and each for so long before it has shown its certificate.
    ("grpc.max_allowed_incoming_connections", 512),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_concurrent_streams", 256),  # of one connection
)


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises `CriuError`, `InvalidRequest`, `OSError` when it cannot start.

    `BadSetting` is a wrong configuration.
    """
    start_checks.prepare(config)
    async with contextlib.AsyncExitStack() as stack:
        journal = await Journal.open(config.state_dir / "journal.sqlite")
        stack.push_async_callback(journal.aclose)
        await _serve(config, journal, stack)


async def _serve(config: Config, journal: Journal, stack: contextlib.AsyncExitStack) -> None:
    stop = _on_signals()
    guard = None
    if config.tls_dir is not None:
        guard = Guard(Tls(config.tls_dir), kernel_tls=await _kernel_tls(config))
    try:
        node = await Node.discover(
            Criu(config.criu or find_binary(), log_level=3 if config.log_level == "debug" else None),
            node_id=journal.node_id,
            name=config.node_name,
            images_dir=config.images_dir,
            insecure=config.insecure,
            guard=guard,
            containers_dir=config.state_dir / "containers",
            hooks=HookSettings(
                directory=config.hooks_dir,
                phase_seconds=config.hook_seconds,
                tls=guard.tls if guard is not None else None,
            ),
            sync=SyncRecords(config.state_dir / "synced", config.sync_roots),
            incoming_limit=config.max_incoming,
            outgoing_limit=config.max_outgoing,
        )
    except CriuError as exc:
        raise start_checks.bad_criu(config, exc) from exc
    workloads = Workloads(config.state_dir / "workloads", config.log_dir)
    stack.push_async_callback(workloads.close)
    data_port = DataPort()
    try:
        await data_port.start(config.address[0], config.data_port)
    except OSError as exc:
        where = f"{config.address[0]} port {config.data_port}"
        raise start_checks.cannot_listen("data_port", where, exc) from exc
    stack.push_async_callback(data_port.stop)
    terms = Terms(
        images_dir=config.images_dir,
        memory_dir=config.memory_images_dir if config.images_in_memory else None,
        log_dir=config.log_dir,
        lease_seconds=config.lease_seconds,
        max_incoming=config.max_incoming,
        clear_pages=config.insecure or is_loopback(config.address[0]),
    )
    metrics = _metrics(config, node)
    tracing = _tracing(config, node)
    if tracing is not None:
        stack.push_async_callback(tracing.close)
    observer = Observers([each for each in (metrics, tracing) if each is not None])
    remote = RemoteService(node, terms, workloads, data_port, journal, observer)
    migrations = MigrationsService(node, config.images_dir, workloads, journal, config.max_outgoing, observer)
    interceptors = [*observer.server_interceptors(), ErrorInterceptor(guard, observer)]
    server = grpc.aio.server(interceptors=interceptors, options=_OPTIONS)
    stack.push_async_callback(server.stop, None)
    remote_pb2_grpc.add_RemoteServicer_to_server(remote, server)
    migrations_pb2_grpc.add_MigrationsServicer_to_server(migrations, server)
    node_service = NodeService(node, workloads, migrations.preflight, lambda: (remote.active, migrations.active))
    node_pb2_grpc.add_NodeServicer_to_server(node_service, server)
    checks = _add_inspection(server)
    listens = _bind(server, config, guard)
    stack.callback(config.unix.unlink, missing_ok=True)
    for name in (*SERVICES, health.OVERALL_HEALTH):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    notifier = Notifier.from_environment()

    def status() -> str:
        doing = "stopping" if stop.is_set() else "serving"
        how = "insecure " if config.insecure else ""
        return f"{doing} {how}{config.listen}: {migrations.active} migrations out, {remote.active} in"

    feeding = asyncio.create_task(notifier.feed_watchdog(status), name="watchdog")
    stack.callback(feeding.cancel)
    web = await _start_web(config, node, migrations, remote, workloads, metrics)
    if web is not None:
        stack.push_async_callback(web.stop)
    await remote.recover()  # before anybody can ask about a session
    await server.start()
    _give_socket(config)
    await migrations.recover()
    workloads.is_open = migrations.is_open
    restarts = Restarts(workloads, journal, observer)
    await restarts.start()
    pruning = asyncio.create_task(prune_regularly(journal, config.journal_keep), name="pruning")
    stack.callback(pruning.cancel)
    if web is not None:
        web.health = "serving"
    notifier.ready(status())
    if config.insecure:
        logger.warning("insecure: bytes may be in clear on the network, see docs/security.md")
    logger.info("serving listen=%s unix=%s data_port=%d node_id=%s", *_where(config, listens, data_port, node))
    await stop.wait()
    logger.info("stopping")
    notifier.stopping(status())
    if web is not None:
        web.health = "stopping"
    await checks.enter_graceful_shutdown()
    await restarts.close()
    async with asyncio.timeout(DRAIN_SECONDS):
        await migrations.close()
        await remote.close()
    await server.stop(grace=1.0)


async def _kernel_tls(config: Config) -> Taken:
    """Whether the kernel makes the TLS of pages; if not, the log says why, and what it costs."""
    if not config.kernel_tls or config.tls_dir is None:
        return Taken(works=False, why="kernel_tls is off")
    found = await asyncio.to_thread(try_it, config.tls_dir)
    if not found.works:
        level = logging.INFO if found.is_certain else logging.WARNING
        logger.log(level, "kernel TLS is not used: %s; processes of phaul make the TLS of pages", found.why)
    return found


def _metrics(config: Config, node: Node) -> Metrics | None:
    if not config.http_listen:
        return None
    from phauld.observing.metrics import Metrics  # what nobody asked for costs nothing

    return Metrics(node)


def _tracing(config: Config, node: Node) -> Tracing | None:
    if not config.otlp_endpoint:
        return None
    from phauld.observing.tracing import Tracing

    return Tracing(node, config.otlp_endpoint)


async def _start_web(
    config: Config,
    node: Node,
    migrations: MigrationsService,
    remote: RemoteService,
    workloads: Workloads,
    metrics: Metrics | None,
) -> Web | None:
    if metrics is None:
        return None
    from phauld.observing.web import Web

    metrics.watch(lambda: migrations.records, lambda: remote.sessions, workloads.list)
    web = Web(config, node, migrations, remote, metrics)
    await web.start()
    logger.info("serving http=%s", config.http_listen)
    return web


def _where(config: Config, listens: int, data_port: DataPort, node: Node) -> tuple[str, Path, int, str]:
    return f"{config.listen.rpartition(':')[0]}:{listens}", config.unix, data_port.port, node.node_id


def _add_inspection(server: grpc.aio.Server) -> health.aio.HealthServicer:
    """Health per service, reflection and channelz, for grpcurl, `buf curl` and probes."""
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    channelz.add_channelz_servicer(server)
    names = (*SERVICES, health.SERVICE_NAME, _CHANNELZ, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return checks


def _bind(server: grpc.aio.Server, config: Config, guard: Guard | None) -> int:
    """Listen; returns the port of `config.listen`, which may leave the choice to the kernel."""
    with contextlib.suppress(FileNotFoundError):
        config.unix.unlink()
    ports = []
    before = os.umask(0o177)  # until it has its group, nobody else may connect to the socket
    try:
        for address in (config.listen, f"unix:{config.unix}"):
            try:
                if guard is not None and address == config.listen:
                    ports.append(server.add_secure_port(address, guard.tls.server_credentials()))
                else:
                    ports.append(server.add_insecure_port(address))
            except RuntimeError as exc:
                if address == config.listen and (why := start_checks.why_not(config.address)) is not None:
                    raise start_checks.cannot_listen("listen", address, why) from exc
                raise InvalidRequest(f"cannot listen on {address}") from exc
    finally:
        os.umask(before)
    return ports[0]


def _give_socket(config: Config) -> None:
    """The unix socket to its group; before, only its owner could connect."""
    if config.socket_group:
        os.chown(config.unix, -1, grp.getgrnam(config.socket_group).gr_gid)
    os.chmod(config.unix, 0o660)


def _on_signals() -> asyncio.Event:
    """Set by SIGTERM and SIGINT, from before the first call is answered."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
