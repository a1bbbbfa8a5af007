"""The `phaul` command: parse, call, show."""

from phaul_client import grpc_settings  # noqa: F401 (before gRPC)
from phaul_client.cli.app import main

__all__ = ["main"]
