"""The commit protocol keeps its promises in every interleaving, and the explorer would have seen it break them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import pytest

from phaul_client import commit
from phaul_client.commit import Event, Phase
from phauld import session
from tests.model.explorer import Explorer
from tests.model.plants import PLANTS, Plant
from tests.model.world import Faults, Rules

EAGER = Rules()
POSTCOPY = Rules(commit.POSTCOPY_TRANSITIONS, session.POSTCOPY_TRANSITIONS)

#: (crashes, message faults, disasters): what CI walks, in about 40 s on two cores
WALKS = [
    (EAGER, Faults()),
    (EAGER, Faults(crashes=2, messages=1)),
    (EAGER, Faults(messages=2)),
    (EAGER, Faults(crashes=1, disasters=1)),
    (POSTCOPY, Faults(crashes=1, messages=1)),
    (POSTCOPY, Faults(crashes=1, disasters=1)),
]

MAY_HOLD_A_COPY = (session.Phase.RESTORING, session.Phase.PREPARED, session.Phase.COMMITTING, session.Phase.RUNNING)

Key = TypeVar("Key")
Entry = TypeVar("Entry")


class Watched(dict[Key, Entry]):
    """A table that notes which of its entries were used."""

    def __init__(self, table: Mapping[Key, Entry]) -> None:
        super().__init__(table)
        self.used: set[Key] = set()

    def __getitem__(self, key: Key) -> Entry:
        step = super().__getitem__(key)
        self.used.add(key)
        return step


def name(value: Rules | Faults) -> str:
    if isinstance(value, Faults):
        return f"{value.crashes}-crashes-{value.messages}-messages-{value.disasters}-disasters"
    return "eager" if value is EAGER else "post-copy"


@pytest.mark.slow
@pytest.mark.parametrize(("rules", "faults"), WALKS, ids=name)
def test_every_interleaving_keeps_the_promises(rules: Rules, faults: Faults) -> None:
    verdict = Explorer(rules, faults).run()
    print(verdict)
    assert not verdict.broken, str(verdict)


def test_the_walk_uses_every_entry_that_the_protocol_can_reach() -> None:
    source, destination = Watched(POSTCOPY.source), Watched(POSTCOPY.destination)
    for faults in (Faults(crashes=1), Faults(messages=1), Faults(disasters=1)):
        assert not Explorer(POSTCOPY._replace(source=source, destination=destination), faults).run().broken
    assert source.keys() - source.used == {
        # the model has no pre-dumps, and cancels once
        (Phase.PREFLIGHT, Event.CRIU_LOST),
        (Phase.OPENING, Event.CRIU_LOST),
        (Phase.ITERATING, Event.CRIU_LOST),
        (Phase.ROLLING_BACK, Event.CANCELLED),
    }
    assert {key for key in destination.keys() - destination.used if key[0] in MAY_HOLD_A_COPY} == {
        # a source that keeps the protocol never aborts what it has committed, and asks only afterwards
        (session.Phase.RESTORING, session.Event.GET_SESSION),
        (session.Phase.COMMITTING, session.Event.ABORT),
        (session.Phase.RUNNING, session.Event.ABORT),
        # the model takes the end of criu and the look at the tree in one step
        (session.Phase.COMMITTING, session.Event.TREE_LOST),
        (session.Phase.RUNNING, session.Event.FINAL_ROUND_ENDED),
    }


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_bug_is_found(plant: Plant) -> None:
    verdict = Explorer(plant.rules, plant.faults).run()
    print(plant.name, verdict, sep="\n")
    assert verdict.broken == plant.breaks, str(verdict)
    assert verdict.trace
