"""The `phaul` command: parse, call, show."""

from phaul_client.cli.app import main

__all__ = ["main"]
