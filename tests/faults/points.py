"""The matrix: which fault at which boundary, and where the tree must run afterwards. Data, and nothing else.

Before the source has journaled *committed* it resumes; after the destination has journaled *running* it has moved; in
between either may be, and what counts is that it is exactly one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

RESUMED: Final = frozenset({"resumed"})
MOVED: Final = frozenset({"moved"})
EITHER: Final = RESUMED | MOVED
SHORT_SECONDS: Final = 3.0  #: a freeze budget that a busy machine keeps until the link stalls, and not while it does


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One fault at one boundary."""

    fault: str
    at: str
    outcomes: frozenset[str]
    tree: str = "one"  #: one process; three of them with threads; outside: one that phaul did not start
    lazy: bool = False  #: the restore fills memory while the tree runs
    pipe: bool = False  #: a page pipe at each end, with checksums
    first: tuple[
        tuple[str, str], ...
    ] = ()  #: faults that come before, so that the boundary is reached: (boundary, fault)
    freeze_budget_seconds: float = 30.0

    @property
    def name(self) -> str:
        parts = [self.fault, self.at, *(() if self.tree == "one" else (self.tree,)), *(("lazy",) if self.lazy else ())]
        parts += ["piped"] if self.pipe else []
        return " ".join([*parts, *(f"after {fault} {at}" for at, fault in self.first)])


#: In the order of a migration without faults. Up to the commit the source decides.
_BEFORE: Final = (
    "a>b:CheckTree:request",
    "a>b:OpenSession:request",
    "a>b:OpenSession:reply",
    "a>b:StartIter:request",
    "b:page-server:request",
    "a>b:StartIter:reply",
    "a:dump:request",
    "a:dump:pre-dump:notify",
    "a:dump:query-ext-files:notify",
    "a:dump:post-dump:notify",
    "a>b:Restore:request",
    "b:wait-pid:request",
    "b:restore:request",
    "b:restore:pre-restore:notify",
    "b:restore:post-restore:notify",
    "a>b:Restore:reply",
)
_COMMITTED: Final = ("a>b:Commit:request",)  # in the source's journal, not yet in the destination's
_RELEASING: Final = ("b:restore:post-restore:answer", "b:restore:pre-resume:notify", "b:restore:post-resume:notify")
_AFTER: Final = ("a>b:Commit:reply", "a:dump:post-dump:answer", "a:dump:response")


def _at(boundaries: tuple[str, ...], *names: str) -> tuple[str, ...]:
    """Those that begin with one of the names."""
    return tuple(each for each in boundaries if each.startswith(names))


def _kills() -> Iterator[Point]:
    for at in _BEFORE:
        yield Point(fault="kill-source-phauld", at=at, outcomes=RESUMED)
        yield Point(fault="kill-destination-phauld", at=at, outcomes=EITHER if "CheckTree" in at else RESUMED)
    for at in _COMMITTED:
        yield Point(fault="kill-source-phauld", at=at, outcomes=EITHER)  # the lease may run out first
        yield Point(fault="kill-destination-phauld", at=at, outcomes=RESUMED)
    for at in _RELEASING:
        yield Point(fault="kill-source-phauld", at=at, outcomes=MOVED)
        yield Point(fault="kill-destination-phauld", at=at, outcomes=MOVED)
    for at in _AFTER:
        yield Point(fault="kill-source-phauld", at=at, outcomes=MOVED)
        yield Point(fault="kill-destination-phauld", at=at, outcomes=MOVED)


def _kills_in_between() -> Iterator[Point]:
    for milliseconds in (2, 4, 6, 9):
        for node in ("source", "destination"):
            for at in ("a>b:OpenSession:request", "a>b:Commit:request"):
                fault = f"kill-{node}-phauld-{milliseconds}-ms-later"
                yield Point(fault=fault, at=at, outcomes=EITHER if "Commit" in at else RESUMED)


def _criu_kills() -> Iterator[Point]:
    dump = "a:dump"
    for at in (*_at(_BEFORE, dump), "a>b:Restore:request", "a>b:Restore:reply"):
        yield Point(fault="kill-source-criu", at=at, outcomes=RESUMED)
    for at in ("a>b:Commit:request", "b:restore:post-restore:answer", *_AFTER):
        yield Point(fault="kill-source-criu", at=at, outcomes=MOVED)
    yield Point(fault="kill-page-server", at="a>b:StartIter:reply", outcomes=RESUMED)
    yield Point(fault="kill-page-server", at="a:dump:pre-dump:notify", outcomes=RESUMED)
    yield Point(fault="kill-page-server", at="b:wait-pid:request", outcomes=RESUMED)
    for at in (*_at(_BEFORE, "b:restore"), "a>b:Restore:reply", *_COMMITTED, "b:restore:post-restore:answer"):
        yield Point(fault="kill-destination-criu", at=at, outcomes=RESUMED)
    for at in ("b:restore:pre-resume:notify", "b:restore:post-resume:notify"):
        yield Point(fault="kill-destination-criu", at=at, outcomes=EITHER if "pre-resume" in at else MOVED)
    for at in ("b:restore:post-restore:notify", "a>b:Restore:reply", "a>b:Commit:request",
               "b:restore:post-restore:answer", "b:restore:pre-resume:notify"):  # fmt: skip
        at_its_end = at.endswith("pre-resume:notify")  # of so few pages
        yield Point(fault="kill-lazy-pages", at=at, outcomes=EITHER if at_its_end else RESUMED, lazy=True)


def _task_kills() -> Iterator[Point]:
    """By hand, or for want of memory: criu waits for ever for a task that dies after `post-restore`."""
    for at in ("b:restore:post-restore:notify", "a>b:Restore:reply", "a>b:Commit:request",
               "b:restore:post-restore:answer", "b:restore:pre-resume:notify"):  # fmt: skip
        yield Point(fault="kill-destination-root", at=at, outcomes=RESUMED)
    for at in ("a>b:Restore:reply", "b:restore:post-restore:answer"):
        yield Point(fault="kill-destination-child", at=at, outcomes=RESUMED, tree="three")


def _pipes() -> Iterator[Point]:
    for node in ("source", "destination"):
        for at in ("a>b:OpenSession:reply", "a>b:StartIter:request", "b:page-server:request", "a>b:StartIter:reply",
                   *_at(_BEFORE, "a:dump")):  # fmt: skip
            is_done = at == "a:dump:post-dump:notify"  # its last page was confirmed
            yield Point(fault=f"kill-{node}-pipe", at=at, outcomes=MOVED if is_done else RESUMED, pipe=True)
        for at in ("a>b:Restore:request", "b:restore:post-restore:notify", "a>b:Commit:request", "a>b:Commit:reply"):
            yield Point(fault=f"kill-{node}-pipe", at=at, outcomes=MOVED, pipe=True)
    for at in ("a>b:OpenSession:reply", "a>b:StartIter:reply", "a:dump:pre-dump:notify", "a:dump:post-dump:notify"):
        outcomes = EITHER if at.endswith("post-dump:notify") else RESUMED
        yield Point(fault="link-cut", at=at, outcomes=outcomes, pipe=True)
        yield Point(fault="link-stalled", at=at, outcomes=MOVED, pipe=True)
        yield Point(fault="kill-source-phauld", at=at, outcomes=RESUMED, pipe=True)
        yield Point(fault="kill-destination-phauld", at=at, outcomes=RESUMED, pipe=True)
    for at in ("a:dump:pre-dump:notify", "a:dump:query-ext-files:notify", "a>b:Restore:request"):
        yield Point(fault="kill-source-criu", at=at, outcomes=RESUMED, pipe=True)
    for at in ("a>b:StartIter:reply", "a:dump:pre-dump:notify", "b:wait-pid:request"):
        yield Point(fault="kill-page-server", at=at, outcomes=RESUMED, pipe=True)
    stalled = "a:dump:pre-dump:notify"
    yield Point(
        fault="link-stalled-for-long", at=stalled, outcomes=RESUMED, pipe=True, freeze_budget_seconds=SHORT_SECONDS
    )
    yield Point(fault="destination-images-full", at="a>b:StartIter:request", outcomes=EITHER, pipe=True)
    yield Point(fault="cancel", at="a>b:StartIter:reply", outcomes=RESUMED, pipe=True)


def _cli_kills() -> Iterator[Point]:
    for at in ("a>b:CheckTree:request", "a>b:StartIter:reply", "a:dump:post-dump:notify", "a>b:Restore:reply",
               "a>b:Commit:request", "a>b:Commit:reply"):  # fmt: skip
        yield Point(fault="kill-cli", at=at, outcomes=MOVED)


def _links() -> Iterator[Point]:
    before = ("a>b:OpenSession:request", "a>b:OpenSession:reply", "a>b:StartIter:reply", "a:dump:pre-dump:notify",
              "a:dump:post-dump:notify", "a>b:Restore:request", "a>b:Restore:reply")  # fmt: skip
    for at in before:
        yield Point(fault="link-cut", at=at, outcomes=EITHER if at.endswith("post-dump:notify") else RESUMED)
        yield Point(fault="link-stalled", at=at, outcomes=MOVED)
    for at in ("a>b:Commit:request", "b:restore:post-restore:answer", "a>b:Commit:reply", "a:dump:post-dump:answer"):
        yield Point(fault="link-cut", at=at, outcomes=EITHER if at.endswith("Commit:request") else MOVED)  # the lease
        yield Point(fault="link-stalled", at=at, outcomes=MOVED)
    for at in ("a:dump:pre-dump:notify", "a>b:Restore:request", "a>b:Restore:reply"):
        yield Point(fault="link-stalled-for-long", at=at, outcomes=RESUMED, freeze_budget_seconds=SHORT_SECONDS)
    yield Point(
        fault="link-stalled-for-long", at="a>b:Commit:reply", outcomes=MOVED, freeze_budget_seconds=SHORT_SECONDS
    )


def _calls() -> Iterator[Point]:
    for call in ("CheckTree", "OpenSession", "StartIter", "PutImages", "Restore"):
        yield Point(fault="lose", at=f"a>b:{call}:request", outcomes=RESUMED)
        yield Point(fault="lose", at=f"a>b:{call}:reply", outcomes=RESUMED)
    for call in ("CheckTree", "OpenSession", "StartIter", "PutImages", "Restore", "Commit"):
        yield Point(fault="repeat", at=f"a>b:{call}:request", outcomes=MOVED)
    for end in ("request", "reply"):
        yield Point(fault="lose", at=f"a>b:Commit:{end}", outcomes=MOVED)
        doubt = (("a>b:Commit:reply", "lose"),)
        yield Point(fault="lose", at=f"a>b:GetSession:{end}", outcomes=MOVED, first=doubt)
        rolling_back = (("a>b:Restore:reply", "lose"),)
        yield Point(fault="lose", at=f"a>b:Abort:{end}", outcomes=RESUMED, first=rolling_back)
        slow = (("b:restore:post-restore:notify", "wait-5-seconds"),)
        yield Point(fault="lose", at=f"a>b:RenewLease:{end}", outcomes=MOVED, first=slow)
    yield Point(fault="repeat", at="a>b:GetSession:request", outcomes=MOVED, first=(("a>b:Commit:reply", "lose"),))
    yield Point(fault="repeat", at="a>b:Abort:request", outcomes=RESUMED, first=(("a>b:Restore:reply", "lose"),))
    slow = (("b:restore:post-restore:notify", "wait-5-seconds"),)
    yield Point(fault="lose-all", at="a>b:RenewLease:request", outcomes=RESUMED, first=slow)
    for fault in ("kill-source-phauld", "kill-destination-phauld", "link-cut"):
        doubt = (("a>b:Commit:reply", "lose"),)
        yield Point(fault=fault, at="a>b:GetSession:request", outcomes=MOVED, first=doubt)
        rolling_back = (("a>b:Restore:reply", "lose"),)
        yield Point(fault=fault, at="a>b:Abort:request", outcomes=RESUMED, first=rolling_back)


def _disks() -> Iterator[Point]:
    for at in ("a>b:OpenSession:request", "a>b:StartIter:request", "a>b:PutImages:request", "a:dump:post-dump:notify"):
        yield Point(fault="destination-images-full", at=at, outcomes=EITHER)
    for at in ("a>b:StartIter:reply", "a:dump:request"):
        yield Point(fault="source-images-full", at=at, outcomes=EITHER)
    yield Point(fault="destination-images-read-only", at="a>b:StartIter:request", outcomes=RESUMED)
    for at in ("a>b:OpenSession:request", "b:restore:post-restore:notify", "a>b:Commit:request",
               "b:restore:pre-resume:notify"):  # fmt: skip
        yield Point(fault="destination-state-full", at=at, outcomes=EITHER)
    for at in ("a>b:CheckTree:request", "a>b:StartIter:reply", "a>b:Restore:reply", "a>b:Commit:request",
               "a:dump:response"):  # fmt: skip
        yield Point(fault="source-state-full", at=at, outcomes=EITHER)
    full = (("b:restore:post-restore:answer", "destination-state-full"),)
    for fault in ("kill-destination-phauld", "kill-destination-criu", "kill-source-phauld"):
        yield Point(fault=fault, at="b:restore:pre-resume:notify", outcomes=MOVED, first=full)


def _shims() -> Iterator[Point]:
    """The parent of the restored tree, and whoever else could say what became of it."""
    shim = "kill-destination-shim"
    told = (("b:restore:post-restore:answer", shim),)
    for at in ("a>b:CheckTree:request", "a:dump:post-dump:notify", "a>b:Commit:request"):
        yield Point(fault="kill-source-shim", at=at, outcomes=MOVED)
    for tree in ("one", "outside"):
        for at in (
            "b:restore:pre-restore:notify",
            "b:restore:post-restore:notify",
            "b:restore:post-restore:answer",
            "b:restore:post-resume:notify",
        ):
            yield Point(fault=shim, at=at, outcomes=MOVED, tree=tree)
        for fault in ("kill-destination-phauld", "kill-destination-criu"):
            yield Point(fault=fault, at="b:restore:pre-resume:notify", outcomes=EITHER, tree=tree, first=told)
        yield Point(
            fault="kill-destination-phauld",
            at="b:restore:post-restore:notify",
            outcomes=RESUMED,
            tree=tree,
            first=(("b:restore:pre-restore:notify", shim),),
        )


def _others() -> Iterator[Point]:
    for tree in ("three", "outside"):
        yield Point(fault="kill-source-phauld", at="a:dump:post-dump:notify", outcomes=RESUMED, tree=tree)
        yield Point(fault="kill-source-criu", at="a>b:Restore:reply", outcomes=RESUMED, tree=tree)
        yield Point(fault="kill-destination-criu", at="b:restore:post-restore:notify", outcomes=RESUMED, tree=tree)
        yield Point(fault="kill-destination-phauld", at="b:restore:post-restore:answer", outcomes=MOVED, tree=tree)
        yield Point(fault="kill-destination-criu", at="b:restore:pre-resume:notify", outcomes=EITHER, tree=tree)
        yield Point(fault="kill-source-criu", at="a>b:Commit:request", outcomes=MOVED, tree=tree)
        yield Point(fault="kill-source-phauld", at="a>b:Commit:reply", outcomes=MOVED, tree=tree)
    for at in ("a>b:Restore:reply", "a>b:Commit:request"):
        yield Point(fault="kill-destination-phauld", at=at, outcomes=RESUMED, lazy=True)
    yield Point(fault="kill-source-phauld", at="a>b:Commit:reply", outcomes=MOVED, lazy=True)
    for at in ("a>b:StartIter:reply", "a:dump:post-dump:notify", "a>b:Restore:reply"):
        yield Point(fault="cancel", at=at, outcomes=RESUMED)


POINTS: Final = (
    *_kills(),
    *_kills_in_between(),
    *_criu_kills(),
    *_task_kills(),
    *_pipes(),
    *_cli_kills(),
    *_links(),
    *_calls(),
    *_disks(),
    *_shims(),
    *_others(),
)
