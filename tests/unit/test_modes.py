"""The choice of the mode: never one that cannot work, never without a reason."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaul_client.modes import Choice, Mode, NodeCapabilities, ProblemCode, Refusal, RestoreMode, Wish, choose

MIB = 1 << 20
ABLE = NodeCapabilities(name="a", criu_version=40101, mem_track=True, lazy_pages=True, pipe_max_size_bytes=4 * MIB)
DESTINATION = replace(ABLE, name="b")
BLIND = replace(ABLE, mem_track=False)
EAGER_ONLY = replace(DESTINATION, lazy_pages=False)
SMALL_PIPES = replace(ABLE, pipe_max_size_bytes=MIB)


def chosen(wish: Wish, source: NodeCapabilities = ABLE, destination: NodeCapabilities = DESTINATION) -> Choice:
    answer = choose(wish, source, destination)
    assert isinstance(answer, Choice), answer
    return answer


def refused(
    wish: Wish, source: NodeCapabilities = ABLE, destination: NodeCapabilities = DESTINATION
) -> dict[ProblemCode, str]:
    answer = choose(wish, source, destination)
    assert isinstance(answer, Refusal), answer
    assert all(problem.cause and problem.remedy for problem in answer.problems)
    return {problem.code: problem.cause for problem in answer.problems}


BIG = Wish(memory_bytes=512 * MIB)
SMALL = Wish(memory_bytes=16 * MIB)


@pytest.mark.parametrize(
    ("wish", "source", "destination", "mode", "restore_mode"),
    [
        pytest.param(BIG, ABLE, DESTINATION, Mode.PRE_COPY, RestoreMode.LAZY, id="able nodes"),
        pytest.param(BIG, BLIND, DESTINATION, Mode.STOP_COPY, RestoreMode.LAZY, id="no tracking"),
        pytest.param(BIG, ABLE, EAGER_ONLY, Mode.PRE_COPY, RestoreMode.EAGER, id="no lazy pages"),
        pytest.param(SMALL, ABLE, DESTINATION, Mode.PRE_COPY, RestoreMode.EAGER, id="small: lazy gains nothing"),
        pytest.param(
            replace(BIG, allow_postcopy=True), ABLE, DESTINATION, Mode.HYBRID, RestoreMode.LAZY, id="post-copy allowed"
        ),
        pytest.param(
            replace(BIG, allow_postcopy=True), BLIND, DESTINATION, Mode.POST_COPY, RestoreMode.LAZY, id="blind, allowed"
        ),
        pytest.param(
            replace(SMALL, allow_postcopy=True), BLIND, DESTINATION, Mode.STOP_COPY, RestoreMode.EAGER, id="fits anyway"
        ),
        pytest.param(
            replace(BIG, allow_postcopy=True, restore_mode=RestoreMode.EAGER),
            ABLE,
            DESTINATION,
            Mode.PRE_COPY,
            RestoreMode.EAGER,
            id="eager asked for rules post-copy out",
        ),
        pytest.param(
            replace(BIG, allow_postcopy=True),
            SMALL_PIPES,
            DESTINATION,
            Mode.PRE_COPY,
            RestoreMode.LAZY,
            id="small pipes",
        ),
    ],
)
def test_auto(
    wish: Wish, source: NodeCapabilities, destination: NodeCapabilities, mode: Mode, restore_mode: RestoreMode
) -> None:
    choice = chosen(wish, source, destination)
    assert (choice.mode, choice.restore_mode) == (mode, restore_mode)


FORKED = replace(BIG, own_bytes=100 * MIB, forked_bytes=400 * MIB)


@pytest.mark.parametrize(
    ("wish", "restore_mode"),
    [
        (FORKED, RestoreMode.EAGER),
        (replace(FORKED, own_bytes=400 * MIB), RestoreMode.EAGER),
        (replace(FORKED, own_bytes=401 * MIB), RestoreMode.LAZY),
        (replace(FORKED, own_bytes=1 * MIB, forked_bytes=63 * MIB), RestoreMode.LAZY),
        (replace(FORKED, restore_mode=RestoreMode.LAZY), RestoreMode.LAZY),
        (replace(FORKED, mode=Mode.POST_COPY), RestoreMode.LAZY),
    ],
    ids=["much more", "as much again", "less than there is", "not much", "asked for", "post-copy"],
)
def test_what_processes_share_since_a_fork_stays_shared(wish: Wish, restore_mode: RestoreMode) -> None:
    assert chosen(wish, BLIND).restore_mode is restore_mode


def test_the_reasons_say_what_becomes_of_shared_memory() -> None:
    shares = "no memory would be shared since a fork any more: it is 100 MiB now, and would be 500"
    assert chosen(FORKED, BLIND).reasons[-1] == f"eager restore: lazy would gain 0.3 s, but {shares}"
    assert chosen(replace(FORKED, mode=Mode.POST_COPY), BLIND).reasons[-1].endswith(f"part of post-copy, but {shares}")


def test_the_reasons_say_what_was_missing() -> None:
    assert "the kernel of a does not track memory" in " ".join(chosen(BIG, BLIND).reasons)
    assert "b has no lazy pages" in " ".join(chosen(BIG, ABLE, EAGER_ONLY).reasons)
    pipes = chosen(replace(BIG, allow_postcopy=True), replace(SMALL_PIPES, mem_track=False))
    assert "fs.pipe-max-size of a is 1048576 bytes" in " ".join(pipes.reasons)


def test_what_reserves_too_much_moves_by_stop_copy_only() -> None:
    wish = replace(BIG, address_space_bytes=8 << 40, allow_postcopy=True)
    assert chosen(wish).mode is Mode.STOP_COPY
    for mode in (Mode.PRE_COPY, Mode.HYBRID, Mode.POST_COPY):
        (cause,) = refused(replace(wish, mode=mode)).values()
        assert "8192 GiB" in cause
        assert "32 GiB of memory" in cause
        assert chosen(replace(wish, mode=mode, address_space_bytes=200 << 30)).mode is mode


def test_what_the_destination_may_not_map_is_restored_eagerly() -> None:
    small = replace(DESTINATION, mapping_limit_bytes=24 << 30)
    wish = replace(BIG, mapping_bytes=100 << 30)
    choice = chosen(wish, BLIND, small)
    assert (choice.mode, choice.restore_mode) == (Mode.STOP_COPY, RestoreMode.EAGER)
    assert "100 GiB" in choice.reasons[-1]
    assert chosen(wish, ABLE, small).mode is Mode.STOP_COPY
    assert refused(replace(wish, restore_mode=RestoreMode.LAZY), BLIND, small).keys() == {ProblemCode.OVERCOMMIT}
    assert refused(replace(wish, mode=Mode.POST_COPY), ABLE, small).keys() == {ProblemCode.OVERCOMMIT}
    assert chosen(wish, BLIND, replace(small, mapping_limit_bytes=0)).restore_mode is RestoreMode.LAZY


def test_the_goal_and_the_bandwidth_decide_whether_stop_copy_will_do() -> None:
    wish = Wish(memory_bytes=256 * MIB, allow_postcopy=True)
    assert chosen(wish, BLIND).mode is Mode.POST_COPY
    assert chosen(replace(wish, downtime_goal_seconds=5.0), BLIND).mode is Mode.STOP_COPY
    assert chosen(replace(wish, bandwidth_bytes_per_second=2e9), BLIND).mode is Mode.STOP_COPY


@pytest.mark.parametrize(
    ("mode", "source", "destination", "codes"),
    [
        (Mode.PRE_COPY, BLIND, DESTINATION, {ProblemCode.NO_MEMORY_TRACKING}),
        (Mode.HYBRID, BLIND, EAGER_ONLY, {ProblemCode.NO_MEMORY_TRACKING, ProblemCode.NO_LAZY_PAGES}),
        (Mode.POST_COPY, ABLE, EAGER_ONLY, {ProblemCode.NO_LAZY_PAGES}),
        (Mode.POST_COPY, SMALL_PIPES, DESTINATION, {ProblemCode.PIPE_SIZE_TOO_SMALL}),
        (Mode.STOP_COPY, replace(ABLE, criu_version=0), DESTINATION, {ProblemCode.CRIU_MISSING}),
        (Mode.AUTO, ABLE, replace(DESTINATION, criu_version=31701), {ProblemCode.CRIU_TOO_OLD}),
        (Mode.AUTO, ABLE, replace(DESTINATION, criu_version=40200), {ProblemCode.CRIU_STREAMS_DIFFER}),
        (Mode.STOP_COPY, replace(ABLE, criu_version=40201), DESTINATION, {ProblemCode.CRIU_STREAMS_DIFFER}),
    ],
)
def test_what_cannot_work_is_refused_with_all_its_causes(
    mode: Mode, source: NodeCapabilities, destination: NodeCapabilities, codes: set[ProblemCode]
) -> None:
    assert refused(replace(BIG, mode=mode), source, destination).keys() == codes


def test_refusals_of_the_restore_mode() -> None:
    assert refused(replace(BIG, restore_mode=RestoreMode.LAZY), ABLE, EAGER_ONLY).keys() == {ProblemCode.NO_LAZY_PAGES}
    eager = replace(BIG, mode=Mode.POST_COPY, restore_mode=RestoreMode.EAGER)
    assert refused(eager).keys() == {ProblemCode.EAGER_POSTCOPY}


def test_the_refusal_names_the_node_and_its_version() -> None:
    cause = refused(BIG, ABLE, replace(DESTINATION, criu_version=31701))[ProblemCode.CRIU_TOO_OLD]
    assert cause == "criu 3.17 on b is older than 4.1"


def test_a_node_that_may_exceed_the_pipe_size_is_not_refused() -> None:
    source = replace(SMALL_PIPES, may_exceed_pipe_size=True)
    assert chosen(replace(BIG, mode=Mode.POST_COPY), source).mode is Mode.POST_COPY


nodes = st.builds(
    NodeCapabilities,
    name=st.sampled_from(["a", "b"]),
    criu_version=st.sampled_from([0, 31701, 40100, 40101, 40200]),
    mem_track=st.booleans(),
    lazy_pages=st.booleans(),
    pipe_max_size_bytes=st.sampled_from([MIB, 4 * MIB]),
    may_exceed_pipe_size=st.booleans(),
)
wishes = st.builds(
    Wish,
    mode=st.sampled_from(Mode),
    restore_mode=st.sampled_from(RestoreMode),
    downtime_goal_seconds=st.floats(min_value=0, max_value=10),
    memory_bytes=st.integers(min_value=0, max_value=2**40),
    bandwidth_bytes_per_second=st.none() | st.floats(min_value=1, max_value=1e11),
    allow_postcopy=st.booleans(),
)


@settings(deadline=None)
@given(wish=wishes, source=nodes, destination=nodes)
def test_a_choice_works_and_is_what_was_asked_for(
    wish: Wish, source: NodeCapabilities, destination: NodeCapabilities
) -> None:
    answer = choose(wish, source, destination)
    if isinstance(answer, Refusal):
        assert answer.problems
        return
    assert answer.mode is not Mode.AUTO
    assert wish.mode in (answer.mode, Mode.AUTO)
    assert answer.restore_mode is not RestoreMode.AUTO
    assert wish.restore_mode in (answer.restore_mode, RestoreMode.AUTO)
    assert answer.reasons
    again = replace(wish, mode=answer.mode, restore_mode=answer.restore_mode)
    assert isinstance(choose(again, source, destination), Choice), "what auto chose must pass when asked for"


@settings(deadline=None)
@given(wish=wishes, source=nodes, destination=nodes)
def test_auto_never_makes_a_tree_depend_on_two_nodes_unasked(
    wish: Wish, source: NodeCapabilities, destination: NodeCapabilities
) -> None:
    answer = choose(replace(wish, mode=Mode.AUTO, allow_postcopy=False), source, destination)
    if isinstance(answer, Choice):
        assert answer.mode in (Mode.STOP_COPY, Mode.PRE_COPY)


@settings(deadline=None)
@given(source=nodes, destination=nodes, wish=wishes)
def test_auto_is_refused_only_for_want_of_criu_or_of_the_restore_asked_for(
    wish: Wish, source: NodeCapabilities, destination: NodeCapabilities
) -> None:
    answer = choose(replace(wish, mode=Mode.AUTO, restore_mode=RestoreMode.AUTO), source, destination)
    if isinstance(answer, Refusal):
        of_criu = {ProblemCode.CRIU_MISSING, ProblemCode.CRIU_TOO_OLD, ProblemCode.CRIU_STREAMS_DIFFER}
        assert {problem.code for problem in answer.problems} <= of_criu
