"""Containers of OCI runtimes, by name: what they are made of, and how their files get to another node."""
