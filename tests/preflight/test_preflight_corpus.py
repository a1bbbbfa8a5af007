"""Preflight against the truth: small programs with one obstacle each or none, moved by a real criu.

`./check preflight --json FILE` writes {"programs", "obstacles", "missed", "false_alarms", "skipped"}.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from phaul_criu import install
from phaul_criu.criu import Criu
from tests.node.criu_victims import subreaper
from tests.preflight.clean import CLEAN
from tests.preflight.obstacles import OBSTACLES
from tests.preflight.second_set import SECOND_SET
from tests.preflight.truth import Case, NotStarted, Outcome, results, run_case

pytestmark = pytest.mark.criu

CASES = (*CLEAN, *OBSTACLES, *SECOND_SET)


@pytest.fixture(scope="module")
def outcomes(json_report: dict[str, Any]) -> Iterator[list[Outcome]]:
    """What came out so far; at the end it goes into the report."""
    found: list[Outcome] = []
    with subreaper():
        yield found
    ran = {outcome.case.name for outcome in found}
    json_report.update(results(found), skipped=[case.name for case in CASES if case.name not in ran])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_preflight_agrees_with_criu(case: Case, outcomes: list[Outcome]) -> None:
    try:
        outcome = run_case(case, Criu(install.find_binary()))
    except NotStarted as exc:
        pytest.skip(str(exc))
    outcomes.append(outcome)
    assert outcome.missed == []
    assert outcome.false_alarms == []
    assert outcome.moved in (None, case.moves), outcome.cause


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert sum(bool(case.codes) for case in CASES) >= 60
