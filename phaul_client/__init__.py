"""The source side of a migration as a library: rounds, policy and commit protocol."""
