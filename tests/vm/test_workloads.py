"""Real programs under load between two kernels, in every mode; their own clients verify the data (docs/workloads.md).

A client follows its server from guest to guest, but for PostgreSQL's, whose connections and address move along. It
runs as its own user, with a transaction open across every move, on a directory that --sync carries.
"""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import Report
from tests.vm.guest import Guest, Process
from tests.vm.image import LabMissing
from tests.vm.lab import Lab
from tests.vm.programs import DATA, USER, unpack_all
from tests.vm.scenarios import Answer, Moved, milliseconds, move, ready, take
from tests.vm.test_precopy import DIGEST, FILL
from tests.workloads.titles import PAGE, has_cell

pytestmark = [pytest.mark.timeout(900), pytest.mark.seldom]

PORT: Final = 7300
REDIS_MIB: Final = 4  #: beside what its client writes; making it takes redis far more
ADDRESS: Final = "10.77.3.100"
CLIENTS: Final = Path("/phaul/tests/workloads")
RESULT: Final = "/tmp/client.json"
START_SECONDS: Final = 90.0
ANSWERS: Final = 50
PACE: Final = "0.02"  #: what else a guest does has its processor as well
END_PHAULD: Final = "while pkill -KILL -f '[p]hauld --listen'; do sleep 0.1; done"
#: In this order, there and back.
MODES: Final[dict[str, Answer]] = {
    "pre-copy": {},
    "post-copy": {},
    "hybrid": {"downtime_goal": "0.001s", "postcopy_after": "1s"},
    "stop-copy": {},
}
#: What PostgreSQL takes along.
CARRIED: Final = {"tcp_policy": "TCP_POLICY_KEEP", "move_addresses": [ADDRESS], "sync_directories": [DATA]}
SERVERS: Final = {
    "redis": f"redis-server --port {PORT} --bind 0.0.0.0 --protected-mode no --save '' --dir /tmp",
    "nginx": "nginx -e stderr -c /tmp/nginx/nginx.conf -p /tmp/nginx",
    "memcached": f"memcached -p {PORT} -l 0.0.0.0 -u root -t 4",
}
PROTOCOLS: Final = {"redis": "redis", "nginx": "http", "memcached": "memcached"}
PREPARE: Final = f"""
mkdir -p /tmp/nginx
cd {CLIENTS.parents[1]}
python3 -c 'import pathlib, tests.workloads.catalogue as it; it.PORT = {PORT}; it._nginx(pathlib.Path("/tmp/nginx"))'
sed -i 's/error_log [^;]*/error_log stderr/' /tmp/nginx/nginx.conf
"""
POSTGRES: Final = f"/usr/lib/postgresql/17/bin/postgres -D {DATA}/main"
SETTINGS: Final = f"""
listen_addresses = '{ADDRESS}'
port = {PORT}
unix_socket_directories = '/tmp'
dynamic_shared_memory_type = sysv
shared_buffers = 16MB
"""


async def seen(guest: Guest) -> Answer:
    done = await guest.run(["cat", RESULT], check=False)
    found: Answer = json.loads(done.stdout or '{"answers": 0, "failure": ""}')
    assert not found["failure"], found
    return found


async def progress(guest: Guest) -> None:
    """Wait for more answers."""
    before = (await seen(guest))["answers"]
    async with asyncio.timeout(START_SECONDS):
        while (await seen(guest))["answers"] < before + ANSWERS:  # noqa: ASYNC110
            await asyncio.sleep(0.3)


async def client(lab: Lab, program: str, *arguments: str) -> Process:
    await lab.a.run(["rm", "-f", RESULT])
    started = await lab.a.start(["python3", "-I", "-S", CLIENTS / program, *arguments], log="/var/log/client.log")
    await progress(lab.a)
    return started


def record(report: Report, name: str, mode: str, moved: Moved, gap_ms: float, answers: int) -> None:
    """Into the report, and docs/workloads.md has a value for it."""
    row = {
        "workload": name,
        "mode": mode,
        "client_gap_ms": gap_ms,
        "pause_ms": milliseconds(moved.record.get("pause")),
        "total_ms": milliseconds(moved.record.get("total")),
        "rounds": [each["pages_written"] for each in moved.rounds],
        "answers": answers,
    }
    report.setdefault("lab_workloads", []).append(row)
    print(row)


def assert_on_the_page(name: str) -> None:
    text = PAGE.read_text()
    assert all(has_cell(text, "lab_workloads", name, mode) for mode in MODES), "scripts/workloads-table writes it"


async def prepared(lab: Lab, *arguments: str) -> None:
    """Both guests have the programs and a phauld with these arguments."""
    try:
        await unpack_all(*lab.guests)
    except LabMissing as exc:
        pytest.skip(str(exc))
    for guest in lab.guests:
        await guest.run(["sh", "-c", f"echo 4194304 >/proc/sys/fs/pipe-max-size; {PREPARE}"])
    if arguments:
        for guest in lab.guests:
            await guest.run(["sh", "-c", END_PHAULD])
        await asyncio.gather(*(guest.start_phauld(*arguments) for guest in lab.guests))
    await ready(lab)


async def digest(guest: Guest, name: str) -> str:
    """Of what is in redis beside what its client writes."""
    if name != "redis":
        return ""
    command = ["redis-cli", "-p", str(PORT), "-n", "1", "eval", DIGEST.format(n=REDIS_MIB), "0"]
    return (await guest.run(command)).stdout


@pytest.mark.parametrize("name", SERVERS)
async def test_a_server_in_every_mode(lab: Lab, json_report: Report, name: str) -> None:
    a, b = lab.guests
    await prepared(lab)
    await take(lab, [{"run": name, "argv": SERVERS[name].replace("''", "").split(" "), "on": "a"}])
    await a.run(["sh", "-c", f"until ss -Hltn | grep -q ':{PORT} '; do sleep 0.2; done"])
    if name == "redis":
        await a.run(["redis-cli", "-p", str(PORT), "-n", "1", "eval", FILL.format(n=REDIS_MIB), "0"])
    before = await digest(a, name)
    source, destination = a, b
    for mode, options in MODES.items():
        running = await client(lab, "client.py", PROTOCOLS[name], RESULT, str(PORT), a.address, b.address)
        word = mode.upper().replace("-", "_")
        step = move(name, source.name, destination.name, word, tcp_policy="TCP_POLICY_CLOSE", **options)
        (answer,) = await take(lab, [step])
        await progress(a)
        await running.send_signal(signal.SIGTERM)
        assert await running.wait(120) == 0
        found, moved = await seen(a), Moved(answer)
        assert moved.done, moved.record
        assert found["address"] == destination.address
        assert found["read_back"] == (0 if name == "nginx" else found["answers"])
        assert await digest(destination, name) == before
        record(json_report, name, mode, moved, found["longest_gap_ms"], found["answers"])
        source, destination = destination, source
    await take(lab, [{"stop": name, "on": "a"}])
    assert_on_the_page(name)


async def test_postgres_in_every_mode(lab: Lab, json_report: Report) -> None:
    a, b = lab.guests
    await prepared(lab, "--sync-roots", DATA)
    await a.put("/tmp/settings", SETTINGS)
    await a.run(["sh", "-ec", f"cat /tmp/settings >>{DATA}/main/postgresql.conf"])
    await b.run(["rm", "-rf", DATA])
    await a.run(["ip", "address", "add", f"{ADDRESS}/24", "dev", "eth0"])
    await take(lab, [{"run": "postgres", "argv": POSTGRES.split(), "on": "a", "spec": {"user": USER}}])
    running = await client(lab, "postgres_client.py", RESULT, a.address, ADDRESS, str(PORT), PACE)
    source, destination = a, b
    for number, (mode, options) in enumerate(MODES.items(), 1):
        step = move("postgres", source.name, destination.name, mode.upper().replace("-", "_"), **options)
        step["options"] |= CARRIED
        (answer,) = await take(lab, [step])
        moved = Moved(answer)
        assert moved.done, moved.record
        await progress(a)
        await running.send_signal(signal.SIGUSR1 if number < len(MODES) else signal.SIGTERM)
        async with asyncio.timeout(START_SECONDS):
            while (found := await seen(a))["transactions"] < number:  # noqa: ASYNC110
                await asyncio.sleep(0.3)
        record(json_report, "postgres", mode, moved, found["gaps_ms"][-1], found["answers"])
        source, destination = destination, source
    assert await running.wait(120) == 0
    found = await seen(a)
    assert (found["connections"], found["read_back"]) == (1, found["answers"])
    amcheck = ["/usr/lib/postgresql/17/bin/pg_amcheck", "-h", ADDRESS, "-p", str(PORT), "-U", "postgres"]
    amcheck += ["--install-missing", "--all", "--heapallindexed", "--parent-check"]
    await a.run(amcheck, timeout_seconds=200)
    await take(lab, [{"stop": "postgres", "on": "a"}])
    assert_on_the_page("postgres")
