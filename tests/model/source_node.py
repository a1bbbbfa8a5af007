"""The source's node: phauld driving the real table of `phaul_client.commit`, criu, and the tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from phaul_client.commit import CANCELLABLE, IN_DOUBT, Action, Do, Event, Phase, Record, Step, advance, recover
from phaul_client.errors import PhaseError
from phauld import session
from tests.model.world import Call, Copy, DestinationCriu, Micro, NodeState, Reply, Rules, SourceCriu, SourceTodo, World

Move = tuple[str, World]

PARTS: Final[dict[Action, tuple[SourceTodo, ...]]] = {
    Do.STOP_TREE: (Micro.STOP_ONE_TASK, Micro.STOP_ONE_TASK, Micro.LOOK_AT_CRIU),
    Do.RESUME_TREE: (Micro.RELEASE_CRIU, Micro.CONTINUE_TASKS),
    Do.KILL_TREE: (Micro.TELL_CRIU_TO_KILL, Micro.KILL_TASKS),
    # what these do is of no matter here
    Do.CLEAN_UP: (),
    Do.SERVE_PAGES: (),
}
REQUESTS: Final = {
    Do.OPEN_SESSION: Call.OPEN,
    Do.COPY_IMAGES: Call.IMAGES,
    Do.SEND_RESTORE: Call.RESTORE,
    Do.ABORT_DESTINATION: Call.ABORT,
    Do.SEND_COMMIT: Call.COMMIT,
    Do.ASK_DESTINATION: Call.GET,
}
SUCCESS: Final = {
    Reply(Call.OPEN, session.Phase.OPEN): Event.SESSION_OPENED,
    Reply(Call.IMAGES, session.Phase.RECEIVED): Event.IMAGES_COPIED,
    Reply(Call.IMAGES, session.Phase.OPEN): Event.IMAGES_COPIED,  # post-copy
    Reply(Call.RESTORE, session.Phase.PREPARED): Event.DESTINATION_PREPARED,
}
ANSWERS: Final = {
    session.Phase.ABSENT: Event.DESTINATION_NOT_FOUND,
    session.Phase.PREPARED: Event.DESTINATION_PREPARED,
    session.Phase.COMMITTING: Event.DESTINATION_COMMITTING,
    session.Phase.RUNNING: Event.DESTINATION_RUNNING,
    session.Phase.ABORTED: Event.DESTINATION_ABORTED,
}
#: where an answer is still waited for
WAITS_FOR: Final = {
    Call.OPEN: frozenset({Phase.OPENING}),
    Call.IMAGES: frozenset({Phase.COPYING_IMAGES}),
    Call.RESTORE: frozenset({Phase.RESTORING}),
    Call.COMMIT: IN_DOUBT,
    Call.GET: IN_DOUBT,
    Call.ABORT: frozenset[Phase](),
}
NEEDS_CRIU: Final = frozenset(
    {Phase.FREEZING, Phase.COPYING_IMAGES, Phase.SERVING, Phase.RESTORING, Phase.PREPARED, Phase.FILLING}
)
LETS_CRIU_GO: Final = frozenset({Phase.COMMITTED, Phase.HELD, Phase.CONFIRMED, Phase.ROLLING_BACK})
FAILURES: Final = (Event.CANCELLED, Event.FAILED, Event.DEADLINE_PASSED)
NO_CRIU: Final = frozenset({SourceCriu.NONE, SourceCriu.GONE})


def _take(world: World, step: Step) -> World:
    todo = tuple(part for action in step.actions for part in PARTS.get(action, (action,)))
    nothing_changed = step.phase is world.source and not step.actions
    asking = world.asking and nothing_changed  # then the question is still open
    return world._replace(source=step.phase, source_todo=todo, asking=asking)


def _feed(world: World, event: Event, rules: Rules) -> World:
    assert world.source is not None
    try:
        return _take(world, advance(world.source, event, rules.source))
    except PhaseError:
        return world  # the shell drops what does not fit


def _event_of(reply: Reply) -> Event:
    if reply.call in (Call.COMMIT, Call.GET):
        return ANSWERS.get(reply.phase, Event.NO_ANSWER) if reply.phase else Event.NO_ANSWER
    return SUCCESS.get(reply, Event.FAILED)


def _act(world: World, rules: Rules) -> World:
    """Run the first thing to do."""
    head, rest = world.source_todo[0], world.source_todo[1:]
    world = world._replace(source_todo=rest)
    criu = world.source_criu
    match head:
        case Event():
            return _feed(world, head, rules)
        case Record(phase):
            return world._replace(source_journal=phase)
        case Do.START_DUMP:
            return world._replace(source_criu=SourceCriu.DUMPING)
        case Do.ANSWER_POST_DUMP:
            return world._replace(source_criu=SourceCriu.SERVING) if criu is SourceCriu.HOLDING else world
        case Micro.STOP_ONE_TASK:
            return world._replace(stopped=world.stopped + 1)
        case Micro.LOOK_AT_CRIU:
            held = criu in (SourceCriu.HOLDING, SourceCriu.SERVING) or not rules.looks_after_stop
            return world._replace(source_todo=(Event.TREE_STOPPED if held else Event.CRIU_LOST,))
        case Micro.RELEASE_CRIU:
            return world if criu in NO_CRIU else world._replace(source_criu=SourceCriu.UNWINDING)
        case Micro.CONTINUE_TASKS:
            return world._replace(stopped=0)
        case Micro.TELL_CRIU_TO_KILL:
            return _end_criu(world)
        case Micro.KILL_TASKS:
            return world._replace(source_alive=False)
        case Do():
            asking = head in (Do.SEND_COMMIT, Do.ASK_DESTINATION)
            return world._replace(requests=world.requests | {REQUESTS[head]}, asking=asking)
        case _:
            raise AssertionError(head)


def _happenings(world: World) -> Iterator[Event]:
    """What an idle phauld may notice, or be told by its user and its clocks."""
    phase, criu = world.source, world.source_criu
    if phase in CANCELLABLE:
        yield from FAILURES
    if phase is Phase.PREFLIGHT:
        yield Event.PREFLIGHT_PASSED
    elif phase is Phase.ITERATING:
        yield Event.LAST_ROUND
    elif phase is Phase.FREEZING and criu is SourceCriu.HOLDING:
        yield Event.TREE_FROZEN
    elif phase is Phase.SERVING and criu is SourceCriu.SERVING:
        yield Event.PAGES_READY
    elif phase is Phase.FILLING:
        yield Event.DOUBT_EXPIRED
        if _needs_no_page(world):
            yield Event.PAGES_FILLED
    elif phase is Phase.CONFIRMED and criu in NO_CRIU:
        yield Event.TREE_KILLED
    elif phase is Phase.ROLLING_BACK and criu in NO_CRIU:
        yield Event.TREE_RESUMED
    if phase in LETS_CRIU_GO and criu is SourceCriu.GONE:
        yield Event.CRIU_LOST
    if phase in NEEDS_CRIU and criu in NO_CRIU and not (phase is Phase.FILLING and _needs_no_page(world)):
        yield Event.CRIU_LOST
    if phase in IN_DOUBT:
        if world.asking:
            yield Event.NO_ANSWER
        if phase is Phase.COMMITTED:
            yield Event.DOUBT_EXPIRED
        yield from _resolutions(world)


def _needs_no_page(world: World) -> bool:
    ended = world.copy is Copy.DEAD and world.destination is session.Phase.RUNNING and not world.pages_lost
    return world.filled or ended


def _resolutions(world: World) -> Iterator[Event]:
    """What an operator who has looked may say: the node is gone, or its journal, and what runs there is known."""
    if world.destination_node is NodeState.GONE:
        yield Event.RESOLVED_RESUME
        yield Event.RESOLVED_KILL
    elif world.destination_cannot_answer and world.destination_criu is DestinationCriu.GONE:
        yield Event.RESOLVED_KILL if world.copy is Copy.RUNS else Event.RESOLVED_RESUME


def daemon_moves(world: World, rules: Rules) -> Iterator[Move]:
    """What phauld may do next."""
    if world.source_node is NodeState.GONE:
        return
    if world.source is None:
        if world.source_journal is None:  # nothing was begun; nothing is left to do
            return
        yield "source phauld starts", _take(world, recover(world.source_journal, rules.source))
        return
    if world.source_todo:
        yield f"source: {_name(world.source_todo[0])}", _act(world, rules)
        if isinstance(world.source_todo[0], Event):
            for event in FAILURES:
                yield f"source in {world.source}: {event}", _feed(world, event, rules)
        return
    for event in _happenings(world):
        yield f"source in {world.source}: {event}", _feed(world, event, rules)
    for reply in world.replies:
        rest = world._replace(replies=world.replies - {reply})
        yield f"source in {world.source}: answer {reply.phase} to {reply.call}", _feed(rest, _event_of(reply), rules)


def criu_moves(world: World) -> Iterator[Move]:
    """What criu may do next."""
    match world.source_criu:
        case SourceCriu.DUMPING:
            yield "source criu: post-dump", world._replace(source_criu=SourceCriu.HOLDING, imaged=True)
        case SourceCriu.UNWINDING:
            yield "source criu lets the tree go", world._replace(source_criu=SourceCriu.GONE)
        case SourceCriu.KILLING:
            yield "source criu kills the tree", world._replace(source_criu=SourceCriu.GONE, source_alive=False)
        case SourceCriu.SERVING if world.copy is Copy.RUNS and not world.filled:
            yield "every page is at the destination", world._replace(filled=True)


def _end_criu(world: World) -> World:
    """Success, or the end of the page connection: criu kills the tree. A copy that still needs pages dies of it."""
    if world.source_criu not in (SourceCriu.HOLDING, SourceCriu.SERVING):
        return world
    starved = world.source_criu is SourceCriu.SERVING and not world.filled
    return world._replace(source_criu=SourceCriu.KILLING, copy=Copy.DEAD if starved else world.copy)


def _lose_criu(world: World) -> World:
    serving = world.source_criu is SourceCriu.SERVING and not world.filled
    looked = world.source_todo == (Event.TREE_STOPPED,)
    committed = not IN_DOUBT.isdisjoint((world.source, world.source_journal)) or world.source_journal is Phase.FILLING
    lost = serving and (looked or committed)
    return world._replace(source_criu=SourceCriu.GONE, pages_lost=world.pages_lost or lost)


def crashes(world: World, rules: Rules) -> Iterator[Move]:
    """kill -9."""
    if world.source is not None:
        criu = world.source_criu
        if criu in (SourceCriu.DUMPING, SourceCriu.HOLDING):
            criu = SourceCriu.UNWINDING
        elif criu is SourceCriu.SERVING and not rules.page_relay_outlives_phauld:
            criu = SourceCriu.KILLING  # an end of file on the page connection reads as success
        yield (
            "source phauld is killed",
            world._replace(source=None, source_todo=(), asking=False, source_criu=criu),
        )
    if world.source_criu not in NO_CRIU:
        yield "source criu is killed", _lose_criu(world)


def disasters(world: World) -> Iterator[Move]:
    """The node boots again, or never does."""
    if world.source_node is NodeState.GONE:
        return
    dark = _lose_criu(world)._replace(
        source=None, source_todo=(), asking=False, source_criu=SourceCriu.NONE, source_alive=False, source_struck=True
    )
    yield "source node boots again", dark
    yield "source node is gone", dark._replace(source_node=NodeState.GONE)


def _name(todo: SourceTodo) -> str:
    return f"journal {todo.phase}" if isinstance(todo, Record) else str(todo)
