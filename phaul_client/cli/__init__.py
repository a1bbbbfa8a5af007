"""The `phaul` command: parse, call, show."""
