"""The `phauld` command: arguments, configuration, exit code."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import os
import sys
from pathlib import Path
from typing import Any, Final

from phaul_client import grpc_settings  # noqa: F401 (before gRPC)
from phaul_client.errors import PhaulError
from phaul_criu.errors import CriuError
from phauld import logs
from phauld.config import ENVIRONMENT_PREFIX, BadSetting, load_config
from phauld.version import phaul_version

EXIT_CONFIGURATION: Final = 78  # EX_CONFIG of sysexits.h: systemd does not restart on it
EXIT_FAILURE: Final = 1
#: A journal write waits for this thread's turn; under load the default of 5 ms was seen to add up to seconds.
SWITCH_SECONDS: Final = 0.0001

_EPILOG: Final = """\
examples:
  phauld                                      on loopback, port 7707, for trying things out on one machine
  phauld --config /etc/phaul/phauld.toml      as the systemd unit does it
  phauld --listen 0.0.0.0:7707 --insecure     on a network where everybody is trusted

Every option is also a key of the file (listen = "…") and a variable (PHAULD_LISTEN=…); flags win over variables,
variables over the file.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phauld",
        description="The daemon of phaul: receives and sends running process trees.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Any = parser.add_argument
    add("--version", action="version", version=f"phauld {phaul_version()}")
    add("--config", type=Path, metavar="FILE", help="a TOML file with the options below")
    add("--listen", metavar="HOST:PORT", help="address of the gRPC server (default 127.0.0.1:7707)")
    add("--unix", metavar="PATH", help="the local gRPC socket (default /run/phaul/phauld.sock)")
    add("--socket-group", metavar="GROUP", help="group whose members may use that socket: they may do everything")
    add("--data-port", metavar="PORT", help="port of the page streams, on the host of --listen (default 7708)")
    add("--state-dir", metavar="DIR", help="what survives a reboot (default /var/lib/phaul)")
    add("--images-dir", metavar="DIR", help="images of migrations under way (default /var/lib/phaul/images)")
    add("--images-in-memory", metavar="BOOL", help="put images into memory when they fit (default true)")
    add("--memory-images-dir", metavar="DIR", help="where, on tmpfs (default /dev/shm/phaul)")
    add("--log-dir", metavar="DIR", help="output of workloads, the same on all nodes (default /var/log/phaul)")
    add("--node-name", metavar="NAME", help="how people call this node (default: its host name)")
    add("--criu", metavar="PATH", help="the criu binary (default: found by itself)")
    add("--tls-dir", metavar="DIR", help="mutual TLS: ca.crt, node.crt, node.key, policy.toml there")
    add("--kernel-tls", metavar="BOOL", help="leave the TLS of pages to the kernel where it can (default true)")
    add("--insecure", action="store_const", const="true", help="listen beyond loopback though bytes travel in clear")
    add("--log-level", metavar="LEVEL", help="debug, info, warning or error (default info)")
    add("--log-format", metavar="FORMAT", help="text, or json: one object a line (default text)")
    add("--otlp-endpoint", metavar="URL", help="send traces there by OTLP, as http://localhost:4317 (default: none)")
    add("--http-listen", metavar="HOST:PORT", help="address of the page, /metrics and /healthz (default: none)")
    add("--lease-seconds", metavar="S", help="abort an incoming migration whose source is silent for so long (30)")
    add("--hooks-dir", metavar="DIR", help="programs to call when a tree leaves or comes (default /etc/phaul/hooks.d)")
    add("--hook-seconds", metavar="S", help="all hooks of a phase together (4)")
    add("--sync-roots", metavar="DIR[:DIR]", help="what --sync of other nodes may write here (default: nothing)")
    add("--max-incoming", metavar="N", help="incoming migrations at a time (16)")
    add("--max-outgoing", metavar="N", help="outgoing migrations at a time (16)")
    add("--journal-keep", metavar="N", help="finished migrations that the journal keeps, of each direction (1000)")
    return parser


def main() -> None:
    """Run the daemon."""
    flags = vars(_parser().parse_args())
    file = flags.pop("config") or _from_environment()
    try:
        config = load_config(file, flags=flags)
    except PhaulError as exc:
        _complain(exc)
        sys.exit(EXIT_CONFIGURATION)
    logs.set_up(config.log_level, config.log_format)
    faulthandler.enable()  # systemd's watchdog sends SIGABRT: the journal then says where each thread was
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        from phauld.server import serve  # it needs pycriu

        asyncio.run(serve(config))
    except (PhaulError, CriuError, OSError) as exc:
        _complain(exc)
        sys.exit(EXIT_CONFIGURATION if isinstance(exc, BadSetting) else EXIT_FAILURE)


def _from_environment() -> Path | None:
    path = os.environ.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    return Path(path) if path else None


def _complain(error: Exception) -> None:
    sys.stderr.write(f"phauld: error: {error}\n")
    if remedy := getattr(error, "remedy", ""):
        sys.stderr.write(f"  remedy: {remedy}\n")


if __name__ == "__main__":
    main()
