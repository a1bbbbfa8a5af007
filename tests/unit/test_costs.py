"""What earlier migrations to a node have taught."""

import dataclasses

from phaul_criu.stats import NO_DUMP_STATS
from phauld.costs import PRIOR_IMAGE_BYTES, CostBook, Costs, switch_seconds

DUMP = dataclasses.replace(
    NO_DUMP_STATS, freezing_microseconds=10_000, memdump_microseconds=200_000, memwrite_microseconds=150_000
)


def test_nothing_is_known_at_first() -> None:
    assert CostBook().to("b") == Costs(switch_seconds=None, image_bytes=PRIOR_IMAGE_BYTES)


def test_the_switch_is_what_memory_and_the_stop_leave_of_the_pause() -> None:
    assert abs(switch_seconds(0.5, DUMP) - 0.29) < 1e-9
    assert switch_seconds(0.1, DUMP) == 0


def test_each_node_has_its_own_costs_and_one_bad_moment_is_outvoted() -> None:
    book = CostBook()
    for pause in (0.5, 9.0, 0.6):
        book.learn("b", pause, DUMP, 1000)
    assert abs((book.to("b").switch_seconds or 0) - 0.39) < 1e-9
    assert book.to("b").image_bytes == 1000
    assert book.to("c").switch_seconds is None


def test_what_is_long_past_is_forgotten() -> None:
    book = CostBook()
    for pause in (9.0, 9.0, 9.0, 0.5, 0.5, 0.5, 0.5, 0.5):
        book.learn("b", pause, DUMP, 1000)
    assert abs((book.to("b").switch_seconds or 0) - 0.29) < 1e-9
