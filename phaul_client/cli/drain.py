"""`phaul drain`: move all workloads of a node to others, a few at a time.

The invariant: a workload that did not move is named, and does not keep the others from moving.
"""

import asyncio
import contextlib
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

import click
import grpc

from phaul.v1 import migrations_pb2, node_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli import parameters
from phaul_client.cli.attempts import DEFAULT_ATTEMPTS, PAUSE_SECONDS, is_over_soon
from phaul_client.cli.connection import CALL_SECONDS, LONG_CALL_SECONDS, Daemon, persistently, translate
from phaul_client.cli.follow import watch
from phaul_client.cli.json_output import failure_json, migration_json, milliseconds, to_line
from phaul_client.cli.migrate import refused
from phaul_client.cli.outcomes import ExitCode, Outcome, exit_code_of, failure_of, is_refusal, outcome_of
from phaul_client.cli.requests import build_options, options_without_destination
from phaul_client.cli.session import Session, command
from phaul_client.cli.spread import Spread
from phaul_client.cli.visible import visible

DEFAULT_JOBS: Final = 2
BUSY_SECONDS: Final = 0.5
RESTARTS: Final = 3  #: how often a workload may end before it has moved
_LEAVE: Final = (
    node_pb2.WORKLOAD_STATE_RUNNING,
    node_pb2.WORKLOAD_STATE_RESTARTING,
    node_pb2.WORKLOAD_STATE_ARRIVING,
)
#: The process runs on here, so that another destination may be asked.
_MAY_TRY_AGAIN: Final = (Outcome.REFUSED, Outcome.ROLLED_BACK)


@command(
    "drain",
    "phaul drain --to node-b                          everything of this node",
    "phaul drain node-a --to node-b,node-c --jobs 4",
    "phaul drain node-a --to node-b --json | tail -n 1 | jq .failed",
)
@click.argument("node", metavar="[NODE]", type=parameters.DAEMON, required=False)
@click.option(
    "--to",
    "destinations",
    type=parameters.DESTINATIONS,
    metavar="NODES",
    multiple=True,
    required=True,
    help="HOST[:PORT], several with commas or by repeating it. What one refuses is offered to the next.",
)
@click.option(
    "--jobs", type=click.IntRange(1, 100), default=DEFAULT_JOBS, show_default=True, help="How many at a time."
)
@click.option(
    "--attempts",
    type=click.IntRange(1, 100),
    default=DEFAULT_ATTEMPTS,
    show_default=True,
    help="How often it is tried for each destination, if the program only looked into /proc just then.",
)
@options_without_destination
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
async def drain(
    session: Session,
    /,
    node: str | None,
    destinations: tuple[tuple[str, ...], ...],
    jobs: int,
    attempts: int,
    quiet: bool,
    **options: Any,
) -> ExitCode:
    """Move all workloads of a node to other nodes.

    NODE is the phauld to empty, by default the one of --daemon. What does not move stays, is named, and does not keep
    the others. Workloads that come meanwhile move as well, and one that arrives or is about to be restarted moves once
    it runs.
    Ctrl-C begins no more and waits for those under way; a second one leaves them to phauld.

    With --json: a line {"event": "report", …} for each end of a migration, and at last {"event": "drained", "moved",
    "failed", …}. Exit code: 0 if all have moved; that of the failures if it is the same for all; otherwise 1.
    """
    spread = Spread([each for group in destinations for each in group])
    async with session.connect_to(node or session.daemon) as daemon:
        work = Drain(daemon, spread, jobs, attempts, build_options(options), as_json=session.json, quiet=quiet)
        await work.run()
    session.show(work.result(), work.summary())
    return work.exit_code()


class Drain:
    """One drain of one node."""

    def __init__(
        self, daemon: Daemon, spread: Spread, jobs: int, attempts: int, options: Any, *, as_json: bool, quiet: bool
    ) -> None:
        self._daemon = daemon
        self._spread = spread
        self._jobs = jobs
        self._attempts = attempts
        self._options = options
        self._as_json = as_json
        self._quiet = quiet
        self._stopped = False
        self._left = False
        self._waiting: deque[str] = deque()
        self._started = time.monotonic()
        self._total = 0
        self.ended: dict[str, Migration] = {}  #: the last attempt of each

    async def run(self) -> None:
        """Until nothing more runs there but what failed. Raises `PhaulError`."""
        with self._interruptible():
            while not self._stopped and (names := await self._names()):
                self._total += len(names)
                self._waiting.extend(names)
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self._jobs, len(names))):
                        group.create_task(self._worker())

    async def _names(self) -> list[str]:
        request = node_pb2.ListWorkloadsRequest(states=_LEAVE)
        listed = await self._daemon.node.ListWorkloads(request, timeout=CALL_SECONDS)
        return [each.name for each in listed.workloads if each.name not in self.ended]

    async def _worker(self) -> None:
        while self._waiting and not self._stopped:
            name = self._waiting.popleft()
            for _ in range(RESTARTS):
                if not await self._until_it_runs(name):
                    break
                await self._offer(name)
                if await self._pid(name) != 0:  # else it ended under way, and runs again before long
                    break

    async def _offer(self, name: str) -> None:
        """To one destination after the other, until one has taken it."""
        tried: list[str] = []
        while (destination := self._spread.take(tried)) is not None and not self._stopped:
            tried.append(destination)
            migration = await self._try(name, destination)
            outcome = outcome_of(migration)
            self._spread.ended(destination, moved=outcome is Outcome.MOVED)
            self.ended[name] = migration
            self._show(name, migration)
            if outcome not in _MAY_TRY_AGAIN:
                break

    async def _try(self, name: str, destination: str) -> Migration:
        """The last attempt, after others that failed for what is over in a moment; those are shown as well."""
        migration = await self._move(name, destination)
        for _ in range(1, self._attempts):
            if self._stopped or not is_over_soon(migration):
                break
            self._show(name, migration)
            await asyncio.sleep(PAUSE_SECONDS)
            migration = await self._move(name, destination)
        return migration

    async def _until_it_runs(self, name: str) -> bool:
        """`False` if we are to begin nothing more, or if it will not run here: what was to arrive did not."""
        while not self._stopped:
            if (pid := await self._pid(name)) != 0:
                self._total -= pid is None and name not in self.ended
                return pid is not None
            await asyncio.sleep(BUSY_SECONDS)
        self._waiting.appendleft(name)
        return False

    async def _pid(self, name: str) -> int | None:
        """0 if it arrives, or is about to be restarted; `None` if it is not, and does not run."""
        request = node_pb2.ListWorkloadsRequest(states=_LEAVE)
        listed = await self._daemon.node.ListWorkloads(request, timeout=CALL_SECONDS)
        return next((each.pid for each in listed.workloads if each.name == name), None)

    async def _move(self, name: str, destination: str) -> Migration:
        request = migrations_pb2.StartMigrationRequest(workload=name, destination=destination, options=self._options)
        while True:
            try:
                answer = await self._daemon.migrations.StartMigration(request, timeout=LONG_CALL_SECONDS)
                break
            except grpc.aio.AioRpcError as exc:
                error = translate(self._daemon.address, exc)
                if error.reason == "TOO_MANY_MIGRATIONS" and not self._stopped:
                    await asyncio.sleep(BUSY_SECONDS)
                    continue
                if not is_refusal(error):
                    raise error from exc
                return refused(request, error)
        migration_id = answer.migration.migration_id
        return await persistently(lambda: watch(self._daemon, migration_id, lambda _: None), self._tell)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def interrupted() -> None:
            if self._stopped:
                self._left = True
                task.cancel()
            else:
                self._stopped = True
                self._tell("begins no more and waits for those under way; Ctrl-C again leaves them to phauld")

        loop.add_signal_handler(signal.SIGINT, interrupted)
        try:
            yield
        except asyncio.CancelledError:
            if not self._left:
                raise
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    def _show(self, name: str, migration: Migration) -> None:
        if self._as_json:
            click.echo(to_line({"event": "report", **migration_json(migration)}))
        elif not self._quiet:
            failure = failure_of(migration)
            how = f"{milliseconds(migration.pause):.0f} ms" if failure is None else failure.message
            where = migration.destination_address
            self._tell(f"[{len(self.ended)}/{self._total}] {name} {outcome_of(migration)} ({where}): {how}")

    def _tell(self, message: str) -> None:
        click.echo(visible(f"phaul: {message}"), err=True)

    def _failed(self) -> dict[str, Migration]:
        return {name: each for name, each in self.ended.items() if outcome_of(each) is not Outcome.MOVED}

    def _not_tried(self) -> Sequence[str]:
        return list(self._waiting)

    def result(self) -> dict[str, Any]:
        """The last line for programs."""
        failed = self._failed()
        return {
            "event": "drained",
            "moved": len(self.ended) - len(failed),
            "failed": [
                {
                    "workload": name,
                    "outcome": str(outcome_of(each)),
                    "error": failure_json(failure) if (failure := failure_of(each)) is not None else None,
                }
                for name, each in failed.items()
            ],
            "not_tried": self._not_tried(),
            "destinations": self._spread.moved,
            "total_ms": round((time.monotonic() - self._started) * 1000, 3),
        }

    def summary(self) -> str:
        """The same for people."""
        failed, left = self._failed(), self._not_tried()
        places = ", ".join(f"{count} to {place}" for place, count in self._spread.moved.items())
        lines = [f"moved {len(self.ended) - len(failed)} of {len(self.ended) + len(left)} workloads: {places}"]
        for name, each in failed.items():
            failure = failure_of(each)
            lines.append(f"  {name} {outcome_of(each)}: {failure.message if failure is not None else ''}")
            lines += [f"    remedy: {failure.remedy}"] if failure is not None and failure.remedy else []
        return "\n".join(lines + ([f"  not tried: {', '.join(left)}"] if left else []))

    def exit_code(self) -> ExitCode:
        """Of the whole."""
        if self._stopped and (self._left or self._waiting):
            return ExitCode.INTERRUPTED
        codes = {exit_code_of(each) for each in self._failed().values()}
        return codes.pop() if len(codes) == 1 else ExitCode.FAILED if codes else ExitCode.OK
