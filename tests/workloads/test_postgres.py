"""PostgreSQL moves with its connections, under load and with a transaction open; its client and pg_amcheck verify it.

criu may read the limits of another user's processes with CAP_SYS_RESOURCE only, which this machine may lack, and
PostgreSQL refuses to be root's: here it is, and is told that it is not (programs/not_root.c). In the lab it runs as
its own user (tests/vm/test_postgres.py).
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.need import need
from tests.node.test_daemons import migrate
from tests.node.test_move_address import ADDRESS, give
from tests.nodes import Nodes
from tests.workloads.catalogue import PORT, PROGRAMS
from tests.workloads.conftest import MODES, Outside, Row, record

pytestmark = [pytest.mark.criu, pytest.mark.timeout(300)]

BY_DEFAULT: Final = "lazy"
PACE: Final = "0.0005"
ROLLED_BACK: Final = 4
CLIENT: Final = Path(__file__).with_name("postgres_client.py")
NEEDS: Final = {"pg_ctlcluster": "postgresql", "gcc": "gcc"}
SETTINGS: Final = f"""
listen_addresses = '{ADDRESS}'
port = {PORT}
unix_socket_directories = '/run'
dynamic_shared_memory_type = sysv
shared_buffers = 32MB
checkpoint_timeout = 30s
"""


@pytest.fixture(scope="module")
def programs() -> Path:
    """The directory with the newest PostgreSQL that is installed here."""
    if reason := need(NEEDS):
        pytest.skip(reason)
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if not found:
        pytest.skip("no PostgreSQL in /usr/lib/postgresql")
    return found[-1].parent


@pytest.fixture
def preload(tmp_path: Path, programs: Path) -> Path:
    """The library that says that nobody is root."""
    library = tmp_path / "not_root.so"
    user = pwd.getpwnam("postgres").pw_uid
    words: list[str | Path] = ["gcc", "-shared", "-fPIC", f"-DUSER_ID={user}", "-o", library, PROGRAMS / "not_root.c"]
    subprocess.run(words, check=True, capture_output=True)
    return library


@pytest.fixture
def data(tmp_path: Path, programs: Path, preload: Path) -> Path:
    """A new cluster with checksums, in a directory that both nodes see."""
    directory = tmp_path / "data"
    directory.mkdir(mode=0o700)
    os.chown(directory, pwd.getpwnam("postgres").pw_uid, -1)
    words: list[str | Path] = [
        programs / "initdb",
        "-D",
        directory,
        "-U",
        "postgres",
        "--auth=trust",
        "--no-locale",
        "-k",
        "--no-sync",
    ]
    subprocess.run(words, env={**os.environ, "LD_PRELOAD": str(preload)}, check=True, capture_output=True)
    with (directory / "postgresql.conf").open("a") as file:
        file.write(SETTINGS)
    with (directory / "pg_hba.conf").open("a") as file:
        file.write("host all all 0.0.0.0/0 trust\n")
    return directory


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[] if mode == "lazy" else [pytest.mark.seldom]) for mode in MODES]
)
async def test_it_moves_with_its_connections_and_an_open_transaction(
    daemons: Nodes, tmp_path: Path, programs: Path, preload: Path, data: Path, mode: str, table: list[Row]
) -> None:
    a, b, other = daemons
    await give(a, ADDRESS)
    server = ["--name", "postgres", "--env", f"LD_PRELOAD={preload}", "--", str(programs / "postgres"), "-D", str(data)]
    await a.phaul("run", *server, check=True)
    result = tmp_path / "client.json"
    words = [sys.executable, "-I", str(CLIENT), str(result), other.lan_address, ADDRESS, str(PORT), PACE]
    client = Outside(result, await other.start(words))
    await client.progress()
    options = ("--move-address", ADDRESS, *MODES[mode])
    exit_code, report = await migrate(a, "postgres", b, *options, "--freeze-budget", "10ms")
    assert exit_code == ROLLED_BACK, report
    await client.progress()
    exit_code, report = await migrate(a, "postgres", b, *options)
    assert exit_code == 0, (report["error"], report["problems"])
    assert report["mode"] == ("post-copy" if mode == "post-copy" else "stop-copy"), report
    await client.progress()
    seen = await client.end()
    assert (seen["connections"], seen["transactions"], seen["read_back"]) == (1, 1, seen["answers"])
    amcheck: list[str | Path] = [
        programs / "pg_amcheck",
        "-h",
        ADDRESS,
        "-p",
        str(PORT),
        "-U",
        "postgres",
        "--install-missing",
        "--all",
    ]
    amcheck += ["--heapallindexed", "--parent-check"]
    await other.run(amcheck)
    await b.phaul("stop", "postgres", "--signal", "INT", "--grace", "30", check=True)
    await other.run([programs / "pg_checksums", "--check", "-D", data])
    record(table, "postgres", mode, report, seen)
