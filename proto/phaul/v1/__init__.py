"""Generated code: `phaul.v1.remote_pb2` and its siblings, made by scripts/generate."""
