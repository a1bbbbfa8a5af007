"""A container's place at the destination: what its runtime, or podman, has of it before its tree comes."""
