"""The destination's node: phauld driving the real table of `phauld.session`, criu, and the copy of the tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from phauld.errors import PhaseError
from phauld.session import LEASED, Action, Do, Event, Phase, Record, Step, advance, recover
from tests.model.world import Call, Copy, DestinationCriu, DestinationTodo, Micro, NodeState, Reply, Rules, World

Move = tuple[str, World]

PARTS: Final[dict[Action, tuple[DestinationTodo, ...]]] = {
    Do.KILL_TREE: (Micro.KILL_CRIU, Micro.KILL_TASKS),
    # what these do is of no matter here; the look itself is made when phauld is idle in COMMITTING
    Do.CLEAN_UP: (),
    Do.START_PAGE_SERVER: (),
    Do.LOOK_AT_TREE: (),
}
EVENTS: Final = {
    Call.OPEN: (Event.OPEN_SESSION,),
    Call.IMAGES: (Event.START_ITER, Event.FINAL_ROUND_ENDED),
    Call.RESTORE: (Event.RESTORE,),
    Call.COMMIT: (Event.COMMIT,),
    Call.GET: (Event.GET_SESSION,),
    Call.ABORT: (Event.ABORT,),
}
WAITS: Final = frozenset({Call.RESTORE, Call.COMMIT})
NO_CRIU: Final = frozenset({DestinationCriu.NONE, DestinationCriu.GONE})


def _take(world: World, step: Step, caller: Call | None = None) -> World:
    todo: list[DestinationTodo] = []
    for action in step.actions:
        if action is Do.ANSWER:
            assert caller is not None, f"{step}: nobody to answer"
            todo.append(("ANSWER", caller))
        else:
            todo.extend(PARTS.get(action, (action,)))
    return world._replace(destination=step.phase, destination_todo=tuple(todo))


def _feed(world: World, event: Event, rules: Rules) -> World:
    assert world.destination is not None
    try:
        return _take(world, advance(world.destination, event, rules.destination))
    except PhaseError:
        return world


def _serve(world: World, call: Call, rules: Rules) -> World:
    """Take a call. A call that does not fit is refused; one that starts something long waits."""
    phase, steps = world.destination, []
    assert phase is not None
    events = EVENTS[call]
    if call is Call.IMAGES and (Phase.OPEN, Event.RESTORE) in rules.destination:
        events = (Event.START_ITER, Event.ROUND_ENDED)
    try:
        for event in events:
            steps.append(advance(phase, event, rules.destination))
            phase = steps[-1].phase
    except PhaseError:
        return world._replace(replies=world.replies | {Reply(call, None)})
    if call in WAITS and Do.ANSWER not in steps[-1].actions:
        world = world._replace(waiting=world.waiting | {call})
    return _take(world, steps[-1], call)


def _act(world: World) -> World:
    """Run the first thing to do."""
    head, rest = world.destination_todo[0], world.destination_todo[1:]
    world = world._replace(destination_todo=rest)
    criu = world.destination_criu
    match head:
        case Record(phase):
            return world._replace(destination_journal=phase)
        case ("ANSWER", Call() as call):
            return world._replace(replies=world.replies | {Reply(call, world.destination)})
        case Do.ANSWER_WAITING:
            answers = {Reply(call, world.destination) for call in world.waiting}
            return world._replace(replies=world.replies | answers, waiting=frozenset())
        case Do.START_RESTORE:
            return world._replace(destination_criu=DestinationCriu.RESTORING)
        case Do.RELEASE_TREE:
            held = criu is DestinationCriu.HOLDING
            return world._replace(destination_criu=DestinationCriu.RELEASING) if held else world
        case Micro.KILL_CRIU:
            return _kill_criu(world)
        case Micro.KILL_TASKS:
            return world if world.copy is Copy.NONE else world._replace(copy=Copy.DEAD)
        case _:
            raise AssertionError(head)


def _kill_criu(world: World) -> World:
    if world.destination_criu in NO_CRIU:
        return world
    stuck = world.copy is Copy.HELD or world.destination_criu is DestinationCriu.RESTORING
    return world._replace(destination_criu=DestinationCriu.GONE, copy=Copy.STUCK if stuck else world.copy)


def _happenings(world: World, rules: Rules) -> Iterator[Event]:
    """What an idle phauld may notice, or be told by its clock."""
    phase, criu = world.destination, world.destination_criu
    if phase is Phase.RESTORING and criu is DestinationCriu.HOLDING:
        yield Event.TREE_HELD
    if phase in (Phase.RESTORING, Phase.PREPARED) and criu in NO_CRIU:
        yield Event.TREE_LOST
    if phase is Phase.COMMITTING and (criu in NO_CRIU or not rules.looks_after_criu):
        yield Event.TREE_RUNS if world.copy_ran else Event.TREE_NEVER_RAN
    if phase in LEASED or (phase, Event.LEASE_EXPIRED) in rules.destination:
        yield Event.LEASE_EXPIRED


def daemon_moves(world: World, rules: Rules) -> Iterator[Move]:
    """What phauld may do next."""
    if world.destination_node is NodeState.GONE:
        return
    if world.destination is None:
        journaled = world.destination_journal
        step = Step(journaled) if journaled is Phase.ABSENT else recover(journaled, rules.destination)
        yield "destination phauld starts", _take(world, step)
        return
    if not rules.serial and Call.GET in world.requests:
        asked = world._replace(requests=world.requests - {Call.GET})
        answer = Reply(Call.GET, world.destination)
        yield "destination answers in between", asked._replace(replies=world.replies | {answer})
    if world.destination_todo:
        yield f"destination: {_name(world.destination_todo[0])}", _act(world)
        return
    for event in _happenings(world, rules):
        yield f"destination in {world.destination}: {event}", _feed(world, event, rules)
    for call in world.requests:
        rest = world._replace(requests=world.requests - {call})
        yield f"destination in {world.destination}: call {call}", _serve(rest, call, rules)


def criu_moves(world: World) -> Iterator[Move]:
    """What criu, or a phauld that waits for it, may do next."""
    dead = world._replace(destination_criu=DestinationCriu.GONE, copy=Copy.DEAD)
    if world.pages_lost and world.copy is Copy.RUNS:
        yield "the copy dies of a missing page", world._replace(copy=Copy.DEAD)
    match world.destination_criu:
        case DestinationCriu.RESTORING:
            yield (
                "destination criu: post-restore",
                world._replace(destination_criu=DestinationCriu.HOLDING, copy=Copy.HELD),
            )
            yield "destination criu: restore fails", dead
        case DestinationCriu.RELEASING:
            yield (
                "destination criu lets the copy go",
                world._replace(destination_criu=DestinationCriu.GONE, copy=Copy.RUNS, copy_ran=True),
            )
            yield "destination criu: restore fails after all", dead
            if world.destination is Phase.COMMITTING and not world.destination_todo:
                yield "destination phauld kills a criu that does not end", _kill_criu(world)
        case DestinationCriu.UNWINDING:
            yield "destination criu kills the copy", dead


def crashes(world: World) -> Iterator[Move]:
    """kill -9."""
    if world.destination is not None:
        criu = world.destination_criu
        if criu in (DestinationCriu.RESTORING, DestinationCriu.HOLDING):
            criu = DestinationCriu.UNWINDING
        yield (
            "destination phauld is killed",
            world._replace(destination=None, destination_todo=(), waiting=frozenset(), destination_criu=criu),
        )
    if world.destination_criu not in NO_CRIU:
        yield "destination criu is killed", _kill_criu(world)


def disasters(world: World) -> Iterator[Move]:
    """The node boots again, or never does; or its journal is lost while what runs there runs on."""
    if world.destination_node is NodeState.GONE:
        return
    down = world._replace(destination=None, destination_todo=(), waiting=frozenset(), destination_struck=True)
    criu = world.destination_criu
    if criu in (DestinationCriu.RESTORING, DestinationCriu.HOLDING):
        criu = DestinationCriu.UNWINDING
    yield (
        "destination phauld is killed and its journal lost",
        down._replace(destination_journal=Phase.ABSENT, destination_criu=criu),
    )
    copy = Copy.NONE if world.copy is Copy.NONE else Copy.DEAD
    dark = down._replace(destination_criu=DestinationCriu.NONE, copy=copy)
    yield "destination node boots again", dark
    yield "destination node is gone", dark._replace(destination_node=NodeState.GONE)


def _name(todo: DestinationTodo) -> str:
    if isinstance(todo, tuple):
        return " ".join(todo)
    return f"journal {todo.phase}" if isinstance(todo, Record) else str(todo)
