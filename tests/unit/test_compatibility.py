"""A node that lacks what we cannot do without is refused by name."""

import pytest

from phaul_client.compatibility import NEEDED, check_peer
from phaul_client.errors import PhaulError
from phauld.node import API_FEATURES


def test_we_fit_ourselves() -> None:
    assert set(NEEDED) <= set(API_FEATURES)
    check_peer("b", "0.1", API_FEATURES)


def test_what_we_do_not_know_is_no_matter() -> None:
    check_peer("b", "9.0", [*NEEDED, "telepathy-v1"])


@pytest.mark.parametrize("missing", NEEDED)
def test_what_is_missing_is_named(missing: str) -> None:
    with pytest.raises(PhaulError, match=rf"b \(phaul 9.0\) does not know {missing}") as refused:
        check_peer("b", "9.0", [each for each in NEEDED if each != missing])
    assert refused.value.reason == "PEER_INCOMPATIBLE"
    assert refused.value.remedy


def test_a_node_that_says_nothing() -> None:
    with pytest.raises(PhaulError, match="the other node"):
        check_peer("", "", [])
