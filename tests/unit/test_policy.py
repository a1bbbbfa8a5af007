"""The policies: every reason where it belongs, and what must hold for any history."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from phaul_client.policy import (
    PAGE_SIZE_BYTES,
    ClassicPolicy,
    DowntimePolicy,
    Finish,
    FinishReason,
    History,
    Iterate,
    IterStats,
    Limits,
    Policy,
    PostCopyPolicy,
    StopCopyPolicy,
    SwitchToPostcopy,
    forecast,
)

LINK_BYTES_PER_SECOND = 100e6
FREEZE_SECONDS = 0.01
OVERHEAD_SECONDS = 0.03
MEMORY_PAGES = 65536
POLICY = DowntimePolicy()


def rounds(
    *pages_written: int, throttle_percents: tuple[int, ...] = (), link: float = LINK_BYTES_PER_SECOND
) -> History:
    """Rounds back to back over a steady link."""
    history: History = ()
    now_seconds = 1000.0
    for index, pages in enumerate(pages_written):
        transfer_seconds = pages * PAGE_SIZE_BYTES / link
        duration_seconds = transfer_seconds + FREEZE_SECONDS + OVERHEAD_SECONDS
        stats = IterStats(
            started_at_seconds=now_seconds,
            duration_seconds=duration_seconds,
            frozen_seconds=FREEZE_SECONDS,
            pages_scanned=MEMORY_PAGES,
            pages_written=pages,
            pages_skipped_parent=max(0, MEMORY_PAGES - pages),
            bytes_sent=pages * PAGE_SIZE_BYTES,
            transfer_seconds=transfer_seconds,
            throttle_percent=throttle_percents[index] if throttle_percents else 0,
        )
        history = (*history, stats)
        now_seconds += duration_seconds
    return history


def writer(
    policy: Policy, limits: Limits, dirty_pages_per_second: float, working_set_pages: int
) -> tuple[History, object]:
    """Run a policy against a writer; returns the history and the last verdict."""
    written = [MEMORY_PAGES]
    while True:
        history = rounds(*written)
        verdict = policy.decide(history, limits)
        if not isinstance(verdict, Iterate):
            return history, verdict
        written.append(min(working_set_pages, int(dirty_pages_per_second * history[-1].duration_seconds)))
        assert len(written) < 200, "does not end"


# --- one reason after the other


@pytest.mark.parametrize("policy", [DowntimePolicy(), ClassicPolicy()])
def test_pre_copy_begins_with_a_round(policy: Policy) -> None:
    assert policy.decide((), Limits()) == Iterate()


def test_no_rounds_allowed() -> None:
    assert POLICY.decide((), Limits(max_rounds=0)) == Finish(FinishReason.ROUND_LIMIT)


@pytest.mark.parametrize("history", [(), rounds(MEMORY_PAGES, 100)])
def test_modes_without_rounds(history: History) -> None:
    assert StopCopyPolicy().decide(history, Limits()) == Finish(FinishReason.NO_ROUNDS)
    assert PostCopyPolicy().decide(history, Limits()) == SwitchToPostcopy(FinishReason.NO_ROUNDS)


@pytest.mark.parametrize(
    ("history", "limits", "reason"),
    [
        pytest.param(rounds(1000), Limits(), FinishReason.GOAL_REACHED, id="small process: at once"),
        pytest.param(rounds(MEMORY_PAGES, 200), Limits(), FinishReason.GOAL_REACHED, id="goal"),
        pytest.param(rounds(MEMORY_PAGES, 10), Limits(downtime_goal_seconds=0.001), FinishReason.IDLE, id="idle"),
        pytest.param(rounds(MEMORY_PAGES, 60000), Limits(max_rounds=2), FinishReason.ROUND_LIMIT, id="round limit"),
        pytest.param(rounds(MEMORY_PAGES), Limits(deadline_seconds=3), FinishReason.DEADLINE, id="deadline"),
        pytest.param(rounds(MEMORY_PAGES, 9000, 12000, 18000), Limits(), FinishReason.DIVERGING, id="diverging"),
        pytest.param(rounds(10000, 20000, 40000), Limits(), FinishReason.DIVERGING, id="memory itself grows"),
        pytest.param(rounds(MEMORY_PAGES, 20000, 20000, 20000), Limits(), FinishReason.PLATEAU, id="plateau"),
    ],
)
def test_finishes_for_its_reason(history: History, limits: Limits, reason: FinishReason) -> None:
    verdict = POLICY.decide(history, limits)
    assert verdict == Finish(reason, forecast(history, limits))


@pytest.mark.parametrize(
    "history",
    [
        pytest.param(rounds(MEMORY_PAGES), id="one round shows nothing about dirtying"),
        pytest.param(rounds(MEMORY_PAGES, 20000), id="one window shows no trend"),
        pytest.param(rounds(MEMORY_PAGES, 20000, 20000), id="not yet a plateau"),
        pytest.param(rounds(MEMORY_PAGES, 60000, 30000, 14000), id="converging"),
        pytest.param(rounds(MEMORY_PAGES, 30000, 10000, 16000), id="one burst is no divergence"),
    ],
)
def test_goes_on(history: History) -> None:
    assert isinstance(POLICY.decide(history, Limits()), Iterate)


def test_a_plateau_can_be_declared_sooner() -> None:
    history = rounds(MEMORY_PAGES, 20000, 20000)
    assert POLICY.decide(history, Limits(plateau_rounds=2)) == Finish(
        FinishReason.PLATEAU, forecast(history, Limits(plateau_rounds=2))
    )


def test_postcopy_after_its_time() -> None:
    history = rounds(MEMORY_PAGES)
    verdict = POLICY.decide(history, Limits(allow_postcopy=True, postcopy_after_seconds=2.0))
    assert isinstance(verdict, SwitchToPostcopy)
    assert verdict.reason is FinishReason.POSTCOPY_TIME
    assert isinstance(POLICY.decide(history, Limits(postcopy_after_seconds=2.0)), Iterate), "it was not allowed"


def test_postcopy_instead_of_giving_up_but_not_instead_of_the_goal() -> None:
    limits = Limits(allow_postcopy=True)
    stuck = POLICY.decide(rounds(MEMORY_PAGES, 20000, 20000, 20000), limits)
    assert isinstance(stuck, SwitchToPostcopy)
    assert stuck.reason is FinishReason.PLATEAU
    assert isinstance(POLICY.decide(rounds(MEMORY_PAGES, 200), limits), Finish)


def test_throttles_instead_of_a_plateau_until_there_is_nothing_left() -> None:
    limits = Limits(allow_throttle=True)
    stuck = (MEMORY_PAGES, 20000, 20000, 20000)
    first = POLICY.decide(rounds(*stuck), limits)
    assert isinstance(first, Iterate)
    assert first.throttle_percent == 20
    most = POLICY.decide(rounds(*stuck, throttle_percents=(99, 99, 99, 99)), limits)
    assert isinstance(most, Finish)
    assert most.reason is FinishReason.PLATEAU


def test_a_new_throttle_is_given_time_to_show_its_effect() -> None:
    """The last rounds did not pay, but the latest is the first that was dirtied under 99 %, the last step."""
    stuck = (MEMORY_PAGES, 20000, 20000, 20000)
    limits = Limits(allow_throttle=True)
    assert isinstance(POLICY.decide(rounds(*stuck, throttle_percents=(90, 90, 90, 99)), limits), Iterate)
    assert isinstance(POLICY.decide(rounds(*stuck, throttle_percents=(90, 90, 99, 99)), limits), Iterate)


def test_every_reason_has_a_sentence() -> None:
    assert all(reason.sentence for reason in FinishReason)


# --- the classic policy


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        pytest.param(rounds(5000), None, id="the first round cannot grow: go-criu stops here"),
        pytest.param(rounds(63), FinishReason.IDLE, id="tiny"),
        pytest.param(rounds(64), None, id="not tiny"),
        pytest.param(rounds(5000, 1000, 1031), None, id="growth of 31"),
        pytest.param(rounds(5000, 1000, 1032), FinishReason.DIVERGING, id="growth of 32"),
        pytest.param(rounds(*range(5000, 4300, -100)), None, id="7 rounds"),
        pytest.param(rounds(*range(5000, 4200, -100)), FinishReason.ROUND_LIMIT, id="8 rounds"),
    ],
)
def test_classic(history: History, reason: FinishReason | None) -> None:
    verdict = ClassicPolicy().decide(history, Limits())
    assert (verdict.reason if isinstance(verdict, Finish) else None) is reason


# --- the forecast


def test_forecast_of_a_steady_writer() -> None:
    """A fifth of the link: the next stop comes after the last, short round, not after a window as long as before."""
    history, verdict = writer(POLICY, Limits(), LINK_BYTES_PER_SECOND / 5 / PAGE_SIZE_BYTES, MEMORY_PAGES)
    assert isinstance(verdict, Finish)
    assert verdict.forecast is not None
    dirty_bytes = LINK_BYTES_PER_SECOND / 5 * history[-1].duration_seconds
    assert verdict.forecast.dirty_bytes == pytest.approx(dirty_bytes, rel=0.1)
    assert verdict.forecast.dirty_rate_bytes_per_second == pytest.approx(LINK_BYTES_PER_SECOND / 5, rel=0.01)
    assert verdict.forecast.bandwidth_bytes_per_second == pytest.approx(LINK_BYTES_PER_SECOND)


def test_forecast_of_a_hot_set_does_not_shrink_with_the_window() -> None:
    history = rounds(MEMORY_PAGES, 20000, 20000)
    assert forecast(history, Limits()).dirty_bytes == pytest.approx(20000 * PAGE_SIZE_BYTES)


def test_a_longer_window_dirties_no_more_than_one_as_long_did() -> None:
    history = rounds(MEMORY_PAGES, 6000, 5000, 20000)
    assert history[3].duration_seconds > history[2].duration_seconds
    assert forecast(history, Limits()).dirty_bytes <= 20000 * PAGE_SIZE_BYTES


def test_windows_under_different_throttles_are_not_compared() -> None:
    """Less was dirtied in the last window because of the throttle, not because the window was shorter."""
    pages = (MEMORY_PAGES, 40000, 10000)
    free = forecast(rounds(*pages), Limits()).dirty_bytes
    held = forecast(rounds(*pages, throttle_percents=(0, 50, 50)), Limits()).dirty_bytes
    assert free < held == pytest.approx(10000 * PAGE_SIZE_BYTES)


def test_every_part_of_the_pause_counts() -> None:
    history = rounds(MEMORY_PAGES, 2000)
    base = forecast(history, Limits())
    limits = Limits(image_bytes=5_000_000, restore_seconds_per_byte=1e-9, switch_cost_seconds=0.2)
    full = forecast(history, limits)
    assert base.fixed_seconds == pytest.approx(FREEZE_SECONDS + OVERHEAD_SECONDS)
    assert full.fixed_seconds == pytest.approx(FREEZE_SECONDS + 0.2)
    assert full.image_seconds == pytest.approx(0.05)
    assert full.restore_seconds == pytest.approx(MEMORY_PAGES * PAGE_SIZE_BYTES * 1e-9)
    parts = full.fixed_seconds + full.transfer_seconds + full.image_seconds + full.restore_seconds
    assert full.expected_pause_seconds == pytest.approx(parts)


def test_bandwidth_is_not_taken_from_a_round_that_fits_into_socket_buffers() -> None:
    history = rounds(MEMORY_PAGES, 100)
    quick = replace(history[1], transfer_seconds=1e-6)
    expected = forecast((history[0], quick), Limits()).bandwidth_bytes_per_second
    assert expected == pytest.approx(LINK_BYTES_PER_SECOND)


def test_bandwidth_follows_the_link_and_the_limit() -> None:
    slow = replace(rounds(MEMORY_PAGES, 10000)[1], transfer_seconds=10000 * PAGE_SIZE_BYTES / 50e6)
    history = (rounds(MEMORY_PAGES)[0], slow)
    assert forecast(history, Limits()).bandwidth_bytes_per_second == pytest.approx(50e6)
    assert forecast(history, Limits(bandwidth_limit_bytes_per_second=1e6)).bandwidth_bytes_per_second == 1e6


def test_compressed_pages_cost_what_they_weigh_on_the_wire() -> None:
    plain = rounds(MEMORY_PAGES, 20000)
    halved = tuple(
        replace(stats, bytes_sent=stats.bytes_sent // 2, transfer_seconds=stats.transfer_seconds / 2) for stats in plain
    )
    assert forecast(halved, Limits()).transfer_seconds == pytest.approx(forecast(plain, Limits()).transfer_seconds / 2)


def test_the_prior_serves_only_until_something_was_measured() -> None:
    blind = replace(rounds(MEMORY_PAGES)[0], frozen_seconds=0.0, duration_seconds=0.0)
    assert forecast((blind,), Limits(fixed_cost_prior_seconds=0.123)).fixed_seconds == 0.123
    assert forecast(rounds(MEMORY_PAGES), Limits(fixed_cost_prior_seconds=0.123)).fixed_seconds == pytest.approx(0.04)


def test_no_round_no_forecast() -> None:
    with pytest.raises(ValueError, match="no round"):
        forecast((), Limits())


@pytest.mark.parametrize(
    "values",
    [
        {"downtime_goal_seconds": math.nan},
        {"downtime_goal_seconds": -1.0},
        {"deadline_seconds": -1.0},
        {"max_rounds": -1},
        {"max_growth_ratio": 0.5},
        {"plateau_rounds": 0},
        {"bandwidth_limit_bytes_per_second": 0.0},
        {"image_bytes": -5},
    ],
)
def test_limits_that_cannot_be_meant(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Limits(**values)  # type: ignore[arg-type]


# --- for any history

goals = st.floats(min_value=0.0, max_value=10.0)
page_counts = st.integers(min_value=0, max_value=MEMORY_PAGES)
sane_histories = st.lists(page_counts, min_size=1, max_size=12).map(lambda pages: rounds(*pages))
any_float = st.floats(allow_nan=True, allow_infinity=True)
any_count = st.integers(min_value=-(2**64), max_value=2**64)
wild_stats = st.builds(
    IterStats,
    started_at_seconds=any_float,
    duration_seconds=any_float,
    frozen_seconds=any_float,
    pages_scanned=any_count,
    pages_written=any_count,
    pages_skipped_parent=any_count,
    bytes_sent=any_count,
    transfer_seconds=any_float,
    throttle_percent=st.integers(min_value=0, max_value=99),
)
any_limits = st.builds(
    Limits,
    downtime_goal_seconds=goals,
    deadline_seconds=st.none() | st.floats(min_value=0, max_value=1e6),
    max_rounds=st.integers(min_value=0, max_value=40),
    min_pages=st.integers(min_value=0, max_value=1000),
    plateau_rounds=st.integers(min_value=1, max_value=5),
    restore_seconds_per_byte=st.floats(min_value=0, max_value=1e-6),
    image_bytes=st.integers(min_value=0, max_value=2**40),
    bandwidth_limit_bytes_per_second=st.none() | st.floats(min_value=1, max_value=1e12),
    allow_throttle=st.booleans(),
    allow_postcopy=st.booleans(),
    postcopy_after_seconds=st.none() | st.floats(min_value=0, max_value=1e6),
)


@settings(deadline=None)
@given(history=st.lists(wild_stats, min_size=1, max_size=8).map(tuple), limits=any_limits)
def test_any_statistics_give_a_verdict_and_finite_figures(history: History, limits: Limits) -> None:
    for policy in (POLICY, ClassicPolicy()):
        policy.decide(history, limits)
    expected = forecast(history, limits)
    assert math.isfinite(expected.expected_pause_seconds)
    assert expected.expected_pause_seconds >= 0
    assert math.isfinite(expected.next_round_seconds)
    assert math.isfinite(expected.bandwidth_bytes_per_second)
    assert expected.dirty_bytes >= 0


@settings(deadline=None)
@given(history=sane_histories, limits=any_limits)
def test_never_another_round_at_the_goal_or_the_limit(history: History, limits: Limits) -> None:
    verdict = POLICY.decide(history, limits)
    expected = forecast(history, limits)
    if expected.expected_pause_seconds <= limits.downtime_goal_seconds:
        assert verdict == Finish(FinishReason.GOAL_REACHED, expected)
    elif len(history) >= limits.max_rounds:
        assert not isinstance(verdict, Iterate)


@settings(deadline=None)
@given(
    limits=any_limits,
    rate=st.floats(min_value=0, max_value=1e6),
    working_set_pages=page_counts,
)
def test_ends_within_the_round_limit(limits: Limits, rate: float, working_set_pages: int) -> None:
    assume(limits.max_rounds > 0)
    history, _ = writer(POLICY, limits, rate, working_set_pages)
    assert len(history) <= limits.max_rounds
    assert len(writer(ClassicPolicy(), limits, rate, working_set_pages)[0]) <= 8


@settings(deadline=None)
@given(
    history=sane_histories,
    deadline_seconds=st.floats(min_value=0, max_value=60),
    goal=goals,
)
def test_no_round_begins_that_is_expected_to_miss_the_deadline(
    history: History, deadline_seconds: float, goal: float
) -> None:
    limits = Limits(deadline_seconds=deadline_seconds, downtime_goal_seconds=goal)
    verdict = POLICY.decide(history, limits)
    if isinstance(verdict, Iterate):
        expected = forecast(history, limits)
        elapsed_seconds = history[-1].started_at_seconds + history[-1].duration_seconds - history[0].started_at_seconds
        later_pause_seconds = expected.expected_pause_seconds - expected.next_gain_seconds
        assert elapsed_seconds + expected.next_round_seconds + later_pause_seconds <= deadline_seconds


@settings(deadline=None)
@given(
    pages=st.lists(page_counts, min_size=1, max_size=8),
    share=st.floats(min_value=0, max_value=1),
    limits=any_limits,
)
def test_a_lower_dirty_rate_never_lengthens_the_expected_pause(pages: list[int], share: float, limits: Limits) -> None:
    """The same windows and the same link, but every round found only a share of the pages dirty."""
    history = rounds(MEMORY_PAGES, *pages)
    lower = (history[0], *(_with_pages(stats, int(stats.pages_written * share)) for stats in history[1:]))
    high, low = forecast(history, limits), forecast(lower, limits)
    tolerance_seconds = 2 * PAGE_SIZE_BYTES / high.bandwidth_bytes_per_second  # shares are rounded
    assert low.expected_pause_seconds <= high.expected_pause_seconds * 1.001 + tolerance_seconds


@settings(deadline=None)
@given(pages=st.lists(page_counts, min_size=1, max_size=8), fewer=page_counts, limits=any_limits)
def test_fewer_dirty_pages_in_the_last_round_never_lengthen_the_expected_pause(
    pages: list[int], fewer: int, limits: Limits
) -> None:
    history = rounds(MEMORY_PAGES, *pages)
    assume(fewer <= pages[-1])
    lower = (*history[:-1], _with_pages(history[-1], fewer))
    low, high = forecast(lower, limits), forecast(history, limits)
    assert low.expected_pause_seconds <= high.expected_pause_seconds * (1 + 1e-9)


def _with_pages(stats: IterStats, pages: int) -> IterStats:
    """The same round at the same times with fewer pages; the link stays what it was."""
    return replace(
        stats,
        pages_written=pages,
        pages_skipped_parent=MEMORY_PAGES - pages,
        bytes_sent=pages * PAGE_SIZE_BYTES,
        transfer_seconds=pages * PAGE_SIZE_BYTES / LINK_BYTES_PER_SECOND,
        duration_seconds=pages * PAGE_SIZE_BYTES / LINK_BYTES_PER_SECOND + FREEZE_SECONDS + OVERHEAD_SECONDS,
    )
