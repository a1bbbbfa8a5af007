"""The wire API; `phaul.v1` is generated from the .proto files beside it."""
