"""A tree that criu holds, looked up while the destination builds its copy: its stop is a part of the pause."""

from __future__ import annotations

import contextlib

from phaul_client.tree import Tree


class StandingTree:
    """Below one root. It cannot change: a criu that loses hold of it is noticed later."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._tree: Tree | None = None

    def look_early(self) -> None:
        """So that `take` has nothing left to look up."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            self._look()

    def take(self) -> Tree:
        """It is the caller's from now on. Raises `ProcessLookupError`, `FileNotFoundError`."""
        tree = self._look()
        self._tree = None
        return tree

    def close(self) -> None:
        """If nobody took it."""
        if self._tree is not None:
            self._tree.close()

    def _look(self) -> Tree:
        if self._tree is None:
            self._tree = Tree.below(self._root)
        self._tree.identities()
        return self._tree
