"""Which destination is next."""

from phaul_client.cli.spread import Spread


def test_they_take_turns_and_what_is_under_way_counts() -> None:
    spread = Spread(["b", "c"])
    assert [spread.take(()) for _ in range(4)] == ["b", "c", "b", "c"]
    for destination in ("b", "c", "b", "c"):
        spread.ended(destination, moved=True)
    assert spread.moved == {"b": 2, "c": 2}


def test_who_refused_is_asked_last() -> None:
    spread = Spread(["b", "c"])
    assert spread.take(()) == "b"
    spread.ended("b", moved=False)
    assert spread.take(["b"]) == "c"
    spread.ended("c", moved=False)
    assert spread.take(["b", "c"]) is None
    assert spread.moved == {"b": 0, "c": 0}
