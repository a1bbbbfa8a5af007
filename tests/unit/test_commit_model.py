"""The explorer on a small budget, so that a broken table shows at once. The whole walk: ./check model."""

from __future__ import annotations

import pytest

from phaul_client import commit
from phauld import session
from tests.model.explorer import Explorer
from tests.model.plants import PLANTS, Plant
from tests.model.world import Faults, Rules

TABLES = (Rules(), Rules(commit.POSTCOPY_TRANSITIONS, session.POSTCOPY_TRANSITIONS))


@pytest.mark.parametrize("faults", [Faults(crashes=1), Faults(messages=1)], ids=["crash", "message"])
@pytest.mark.parametrize("rules", TABLES, ids=["eager", "post-copy"])
def test_one_fault_anywhere_breaks_no_promise(rules: Rules, faults: Faults) -> None:
    verdict = Explorer(rules, faults).run()
    print(verdict)
    assert not verdict.broken, str(verdict)
    assert verdict.states > 20_000


@pytest.mark.parametrize("plant", PLANTS[:3], ids=lambda plant: plant.name)
def test_a_planted_bug_is_found(plant: Plant) -> None:
    verdict = Explorer(plant.rules, plant.faults).run()
    assert verdict.broken == plant.breaks, str(verdict)
