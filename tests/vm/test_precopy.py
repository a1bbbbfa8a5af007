"""Pre-copy between two kernels: that it converges, what it costs the process, why it stops, and that nothing is lost.

Pauses are what the process itself saw: `--json FILE` has them, and `./check bench -k lab` compares. What is judged here
is pages, which a busy machine hardly changes. The link is slower than the emulator, so that it is what is measured.
"""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from tests.conftest import Report
from tests.vm.lab import Lab
from tests.vm.scenarios import (
    IN_GUEST,
    LINK_BYTES_PER_SECOND,
    Answer,
    Moved,
    ask,
    case,
    move,
    ready,
    take,
    writer,
)

pytestmark = pytest.mark.timeout(560)

MOVES: Final = 20
REDIS_MIB: Final = 48
REDIS_PORT: Final = 6379
REDIS_WRITER: Final = str(IN_GUEST.parents[1] / "victims/redis_writer.py")
UPTIME_DIFFERENCE_SECONDS: Final = 8.0
#: Every value of database 0 in one number; the writer's writes that are not in database 1.
DIGEST: Final = "local h='' for i=1,{n} do h=redis.sha1hex(h..redis.call('GET','block:'..i)) end return h"
LOST: Final = """redis.call('SELECT',1) local lost=0
for i=0,{n}-1 do if redis.call('GET',tostring(i))~=tostring(i) then lost=lost+1 end end return lost"""
FILL: Final = "for i=1,{n} do redis.call('SET','block:'..i,string.rep(i..':',math.floor(1048576/#(i..':')))) end"


@pytest.fixture
def cases(json_report: Report) -> list[Answer]:
    """The report's list."""
    found: list[Answer] = json_report.setdefault("cases", [])
    return found


def assert_converged(moved: Moved) -> None:
    """It ran rounds, and all but the first found pages in the round before."""
    assert moved.done, moved.record
    assert len(moved.rounds) >= 2
    assert moved.rounds[0]["pages_skipped_parent"] == 0
    assert all(each["pages_skipped_parent"] > 0 for each in moved.rounds[1:]), moved.rounds


async def stop_copy_and_pre_copy(lab: Lab, name: str, argv: list[str], **options: Any) -> tuple[Answer, Moved]:
    """The same process there by stop-copy and back by pre-copy; the case, and the way back."""
    await ready(lab)
    answers = await take(
        lab,
        [
            {"run": name, "argv": argv, "on": "a"},
            ask(name, "a", "reset"),
            move(name, "a", "b", "STOP_COPY"),
            ask(name, "b", "check"),
            ask(name, "b", "reset"),
            move(name, "b", "a", "PRE_COPY", **options),
            ask(name, "a", "check"),
            {"stop": name, "on": "a"},
        ],
    )
    there, back = Moved(answers[2]), Moved(answers[5])
    assert there.done, there.record
    found = case(
        name,
        lab,
        back,
        pause_ms=answers[6]["gap_ms"],
        stop_copy_pause_ms=answers[3]["gap_ms"],
        data_intact=answers[3]["intact"] and answers[6]["intact"],
    )
    return found, back


async def pre_copy(lab: Lab, name: str, argv: list[str], **options: Any) -> tuple[Answer, Moved]:
    """Only by pre-copy."""
    await ready(lab)
    answers = await take(
        lab,
        [
            {"run": name, "argv": argv, "on": "a"},
            ask(name, "a", "reset"),
            move(name, "a", "b", "PRE_COPY", **options),
            ask(name, "b", "check"),
            {"stop": name, "on": "b"},
        ],
    )
    moved = Moved(answers[2])
    found = case(
        name, lab, moved, pause_ms=answers[3]["gap_ms"], stop_copy_pause_ms=None, data_intact=answers[3]["intact"]
    )
    return found, moved


async def test_an_idle_process(lab: Lab, cases: list[Answer]) -> None:
    found, moved = await stop_copy_and_pre_copy(lab, "idle-256", writer(256))
    cases.append(found)
    assert_converged(moved)
    assert found["data_intact"]
    assert moved.rounds[1]["pages_written"] < moved.rounds[0]["pages_written"] / 20
    assert moved.rounds[-1]["pages_written"] < moved.rounds[0]["pages_written"] / 20
    assert moved.reason in ("goal-reached", "idle", "plateau")


async def test_a_writer_at_a_fifth_of_the_link(lab: Lab, cases: list[Answer]) -> None:
    found, moved = await stop_copy_and_pre_copy(
        lab, "writer-fifth-of-link-256", writer(256, 64, LINK_BYTES_PER_SECOND / 5)
    )
    cases.append(found)
    assert_converged(moved)
    assert found["data_intact"]
    assert len(moved.rounds) > 2
    assert moved.rounds[-1]["pages_written"] < moved.rounds[0]["pages_written"] / 2
    assert moved.expected_pause_ms is not None


async def test_a_writer_above_the_link_is_throttled_if_that_is_allowed(lab: Lab, cases: list[Answer]) -> None:
    argv = writer(64, 48, LINK_BYTES_PER_SECOND * 1.5)
    found, free = await pre_copy(lab, "writer-above-link", argv, downtime_goal="1.5s")
    cases.append(found)
    assert_converged(free)
    assert found["data_intact"]
    assert free.reason in ("plateau", "diverging")
    throttled, held = await pre_copy(lab, "writer-above-link-throttled", argv, downtime_goal="1.5s", throttle=True)
    cases.append(throttled)
    assert_converged(held)
    assert throttled["data_intact"]
    percents = [each["throttle_percent"] for each in held.rounds if not each["final"]]
    assert percents == sorted(percents)
    assert percents[-1] >= 20
    assert held.rounds[-1]["pages_written"] < free.rounds[-1]["pages_written"]
    assert (await lab.a.run(["find", "/sys/fs/cgroup", "-name", "phaul-throttle*"])).stdout == ""


async def test_redis_under_load(lab: Lab, cases: list[Answer]) -> None:
    a, b = lab.guests
    await ready(lab)
    server = ["redis-server", "--save", "", "--protected-mode", "no", "--port", str(REDIS_PORT), "--bind", "0.0.0.0"]
    await take(lab, [{"run": "redis", "argv": server, "on": "a"}])
    await a.run(["sh", "-c", "until redis-cli ping; do sleep 0.2; done"])
    await a.run(["redis-cli", "eval", FILL.format(n=REDIS_MIB), "0"])
    before = (await a.run(["redis-cli", "eval", DIGEST.format(n=REDIS_MIB), "0"])).stdout
    program = ["python3", "-I", "-S", REDIS_WRITER]
    client = await a.start([*program, "/tmp/written", str(REDIS_PORT), a.address, b.address])
    (answer,) = await take(lab, [move("redis", "a", "b", "PRE_COPY", tcp_policy="TCP_POLICY_CLOSE")])
    await a.run(["sleep", "1"])
    assert await client.stop() == 0
    written = json.loads(await a.get("/tmp/written"))
    there = ["redis-cli", "-h", b.address, "eval"]
    after = (await a.run([*there, DIGEST.format(n=REDIS_MIB), "0"])).stdout
    lost = (await a.run([*there, LOST.format(n=written["acknowledged"]), "0"])).stdout.strip()
    await take(lab, [{"stop": "redis", "on": "b"}])
    moved = Moved(answer)
    cases.append(
        case(
            "redis-under-load",
            lab,
            moved,
            pause_ms=written["longest_gap_ms"],
            stop_copy_pause_ms=None,
            data_intact=before == after and lost == "0",
            acknowledged_writes=written["acknowledged"],
        )
    )
    assert_converged(moved)
    assert written["address"] == b.address
    assert (before, lost) == (after, "0")


async def test_a_goal_that_cannot_be_met_ends_on_a_plateau(lab: Lab, cases: list[Answer]) -> None:
    found, moved = await pre_copy(lab, "goal-cannot-be-met", writer(32, 16, 4e6), downtime_goal="0.001s")
    cases.append(found)
    assert_converged(moved)
    assert found["data_intact"]
    assert moved.reason == "plateau"
    assert moved.expected_pause_ms is not None
    assert moved.expected_pause_ms > 1


async def test_the_round_limit_is_kept(lab: Lab, cases: list[Answer]) -> None:
    found, moved = await pre_copy(lab, "round-limit", writer(16, 8, 1e6), downtime_goal="0.001s", max_rounds=2)
    cases.append(found)
    assert_converged(moved)
    assert moved.reason == "round-limit"
    assert [each["final"] for each in moved.rounds] == [False, False, True]


async def test_to_and_fro(lab: Lab, cases: list[Answer], quick: bool) -> None:
    """With the data verified each time, and clocks that neither stop nor go back."""
    moves = 6 if quick else MOVES
    await ready(lab)
    steps = [{"run": "shuttle", "argv": writer(16, 4, 1e6), "on": "a"}]
    for number in range(moves):
        source, destination = ("a", "b") if number % 2 == 0 else ("b", "a")
        mode = move("shuttle", source, destination, "PRE_COPY", max_rounds=2)
        steps += [ask("shuttle", source, "reset"), mode, ask("shuttle", destination, "check")]
    answers = await take(lab, [*steps, {"stop": "shuttle", "on": "a" if moves % 2 == 0 else "b"}], 540)
    found = [Moved(answer) for answer in answers[2:-1:3]]
    checks = answers[3:-1:3]
    cases.append(
        case(
            f"to-and-fro-{moves}",
            lab,
            found[-1],
            pause_ms=max(check["gap_ms"] for check in checks),
            stop_copy_pause_ms=None,
            data_intact=all(check["intact"] for check in checks),
            pauses_ms=[check["gap_ms"] for check in checks],
            expected_pauses_ms=[each.expected_pause_ms for each in found],
        )
    )
    assert len(found) == len(checks) == moves
    assert all(each.done for each in found)
    assert all(check["intact"] for check in checks)
    assert not any(check["went_back"] for check in checks)
    for guest in lab.guests:
        left = "find /dev/shm/phaul /var/lib/phaul/images -mindepth 1 -maxdepth 1 2>/dev/null || true"
        assert (await guest.run(["sh", "-c", left])).stdout == ""


async def test_clocks_do_not_jump_between_guests_with_different_uptimes(lab: Lab) -> None:
    await lab.b.boot()
    await ready(lab)
    uptimes = [float((await guest.run(["cat", "/proc/uptime"])).stdout.split()[0]) for guest in lab.guests]
    assert uptimes[0] - uptimes[1] > UPTIME_DIFFERENCE_SECONDS
    answers = await take(
        lab,
        [
            {"run": "clocks", "argv": writer(4), "on": "a"},
            ask("clocks", "a", "reset"),
            move("clocks", "a", "b", "PRE_COPY", max_rounds=1),
            ask("clocks", "b", "check"),
            ask("clocks", "b", "reset"),
            move("clocks", "b", "a", "PRE_COPY", max_rounds=1),
            ask("clocks", "a", "check"),
            {"stop": "clocks", "on": "a"},
        ],
    )
    assert Moved(answers[2]).done
    assert Moved(answers[5]).done
    for seen in (answers[3], answers[6]):
        assert seen["went_back"] == 0, seen
        for clock in ("monotonic_ms", "boottime_ms"):
            assert seen[clock] <= seen["gap_ms"] + 1000, seen  # and so far from the difference of the uptimes


async def test_a_process_without_a_time_namespace_is_warned_of(lab: Lab) -> None:
    await ready(lab)
    process = await lab.a.start(["sleep", "100"], log="/var/log/sleep.log")
    answer = await lab.a.phaul("preflight", str(process.pid), "--to", "b", "--json")
    await process.stop()
    found = answer.json()
    assert "problems" in found, answer
    assert [each["severity"] for each in found["problems"] if each["code"] == "clock-jump"] == ["warning"]


async def test_seed_api_with_real_rounds(lab: Lab, json_report: Report) -> None:
    done = await lab.a.run(["python3", IN_GUEST / "seed_rounds.py"], cwd="/phaul", timeout_seconds=150)
    result = json.loads(done.stdout)
    json_report["seed_api"] = result
    history = result["history"]
    assert result["moved"]
    assert len(history) >= 2
    assert history[0]["pages_skipped_parent"] == 0
    assert all(each["pages_skipped_parent"] > each["pages_written"] for each in history[1:])
    assert result["server_dirs"] == [str(number) for number in range(len(history) + 1)]
    assert result["kept_bytes"] < result["received_bytes"], "a page is kept once"
    assert result["local_dirs"] == [result["parent"]], "the source keeps the last round only"
