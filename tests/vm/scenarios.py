"""Moving a workload between the guests, as tests tell it: steps for in_guest/moves.py, and what came of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phaul_client.certs import issue, make_ca
from tests.started import CommandFailed
from tests.vm.channel import GuestDied
from tests.vm.guest import Guest
from tests.vm.lab import Lab

IN_GUEST: Final = Path("/phaul/tests/vm/in_guest")
CLOCK_PORT: Final = 7000
WRITER_PORT: Final = 7100
LINK_BYTES_PER_SECOND: Final = 25_000_000
STEPS_SECONDS: Final = 280.0
TLS_DIRECTORY: Final = Path("/run/phaul-tls")  #: of a guest
#: What phauld is started with for TLS, once there are certificates.
TLS: Final = ("--tls-dir", str(TLS_DIRECTORY))
_POLICY: Final = '[peers.{peer}]\nreceive_from = true\nsend_to = true\naddresses = ["{address}", "{peer}"]\n'
Answer = dict[str, Any]


async def ready(lab: Lab, *, bytes_per_second: int | None = LINK_BYTES_PER_SECOND) -> None:
    """A phauld and the time of day of `a` on both guests, and a link of that bandwidth."""
    await lab.bandwidth(bytes_per_second * 8 if bytes_per_second else None)
    for guest in lab.guests:
        if not await _runs(guest, "phauld --listen"):
            await guest.start_phauld()
    if not await _runs(lab.b, "clock.py serve"):
        await lab.b.start(["python3", "-I", IN_GUEST / "clock.py", "serve", str(CLOCK_PORT)])
    await lab.a.run(["sh", "-c", f"until {_FOLLOW} 2>/dev/null; do sleep 0.2; done"])


_FOLLOW: Final = f"python3 -I {IN_GUEST}/clock.py follow b {CLOCK_PORT}"


async def _runs(guest: Guest, words: str) -> bool:
    return (await guest.run(["pgrep", "-f", words], check=False)).returncode == 0


async def give_certificates(lab: Lab, work: Path) -> None:
    """To each guest a certificate of one authority, and a policy that lets the other one in; made below `work`."""
    make_ca(work / "ca")
    for guest, peer in (lab.guests, lab.guests[::-1]):
        issue(work / "ca", guest.name, work / guest.name)
        for file in (work / guest.name).iterdir():
            await guest.put(TLS_DIRECTORY / file.name, file.read_bytes(), 0o600)
        policy = _POLICY.format(peer=peer.name, address=peer.address)
        await guest.put(TLS_DIRECTORY / "policy.toml", policy, 0o600)


async def restart_phaulds(lab: Lab, *arguments: str, insecure: bool) -> None:
    """Both, with these arguments in place of those that they had."""
    for guest in lab.guests:
        await guest.kill_phauld()
        await guest.start_phauld(*arguments, insecure=insecure)


async def take(
    lab: Lab, steps: Sequence[Mapping[str, Any]], timeout_seconds: float = STEPS_SECONDS, *, on: Guest | None = None
) -> list[Answer]:
    """Take the steps in a guest, by default `a`; the answer to each. Raises CommandFailed, TimeoutError, GuestDied."""
    guest = on or lab.a
    command: list[str | Path] = ["python3", IN_GUEST / "moves.py", json.dumps(steps)]
    try:
        done = await guest.run(command, check=False, timeout_seconds=timeout_seconds)
    except GuestDied as exc:
        raise GuestDied(f"{exc}: {guest.console[-3000:]}") from exc
    if done.returncode != 0:  # the last step's answer tells more than the traceback
        raise CommandFailed(f"steps ended with {done.returncode}: {done.stdout[-3000:]}{done.stderr[-1000:]}")
    return [json.loads(line)["answer"] for line in done.stdout.splitlines()]


def writer(mib: int, hot_mib: int = 0, rate: float = 0.0) -> list[str]:
    """The command line of in_guest/writer.py."""
    words = [IN_GUEST / "writer.py", WRITER_PORT, "--mib", mib, "--hot-mib", hot_mib, "--rate", rate]
    return ["python3", "-I", "-S", *map(str, words)]


def ask(name: str, on: str, question: str) -> Answer:
    return {"ask": name, "on": on, "port": WRITER_PORT, "question": question}


def move(name: str, source: str, destination: str, mode: str, **options: Any) -> Answer:
    return {"move": name, "from": source, "to": destination, "options": {"mode": f"MODE_{mode}", **options}}


async def move_a_writer(lab: Lab, mib: int, mode: str, **options: Any) -> Moved:
    """It goes from `a` to `b`, where its data are intact, and ends there."""
    steps = [
        {"run": "writer", "argv": writer(mib), "on": "a"},
        ask("writer", "a", "reset"),
        move("writer", "a", "b", mode, **options),
        ask("writer", "b", "check"),
    ]
    answers = await take(lab, steps)
    await take(lab, [{"stop": "writer", "on": "b"}], on=lab.b)
    assert answers[3]["intact"]
    return Moved(answers[2])


def milliseconds(duration: str | None) -> float | None:
    """Of a Duration in JSON, such as "1.5s"."""
    return None if duration is None else float(duration.removesuffix("s")) * 1000


def switched(step: Answer) -> Answer:
    """The same move, switched to post-copy by UpdateMigration while its first round runs."""
    return {**step, "switch": True}


@dataclass(frozen=True, slots=True)
class Moved:
    """A migration as its record tells it."""

    record: Answer

    @property
    def done(self) -> bool:
        return bool(self.record["phase"] == "MIGRATION_PHASE_DONE")

    @property
    def reason(self) -> str:
        """The word of the policy."""
        word: str = self.record.get("rounds_reason", "").partition(":")[0]
        return word

    @property
    def expected_pause_ms(self) -> float | None:
        return milliseconds(self.record.get("expected_pause"))

    @property
    def rounds(self) -> list[Answer]:
        """Every round, the last dump as well; numbers as numbers."""
        return [
            {
                "final": each.get("final", False),
                "pages_written": int(each.get("pages_written", 0)),
                "pages_skipped_parent": int(each.get("pages_skipped_parent", 0)),
                "bytes_sent": int(each.get("bytes_sent", 0)),
                "duration_ms": milliseconds(each.get("duration", "0s")),
                "frozen_ms": milliseconds(each.get("frozen", "0s")),
                "dirty_rate_bytes_per_second": int(each.get("dirty_rate_bytes_per_second", 0)),
                "bandwidth_bytes_per_second": int(each.get("bandwidth_bytes_per_second", 0)),
                "expected_pause_ms": milliseconds(each.get("expected_pause")),
                "throttle_percent": int(each.get("throttle_percent", 0)),
            }
            for each in self.record.get("rounds", [])
        ]


def case(name: str, lab: Lab, moved: Moved, **more: Any) -> Answer:
    """One entry of the report's "cases"."""
    kernels = {"kernel_source": lab.a.kernel, "kernel_destination": lab.b.kernel}
    return {
        "name": name,
        "mode": moved.record.get("mode", "").removeprefix("MODE_").lower().replace("_", "-"),
        "restore_mode": moved.record.get("restore_mode", "").removeprefix("RESTORE_MODE_").lower(),
        **kernels,
        "accelerator": lab.accelerator,
        "link_bytes_per_second": LINK_BYTES_PER_SECOND,
        "rounds": moved.rounds,
        "reported_pause_ms": milliseconds(moved.record.get("pause")),
        "expected_pause_ms": moved.expected_pause_ms,
        "total_ms": milliseconds(moved.record.get("total")),
        "reason": moved.reason,
        "moved": moved.done,
        "timeline": [
            [each["name"], milliseconds(each.get("start")), milliseconds(each.get("end"))]
            for each in moved.record.get("timeline", [])
        ],
        **more,
    }
