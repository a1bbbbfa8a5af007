"""The daemon that runs on every node."""
