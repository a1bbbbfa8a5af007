"""The unix socket: root and the members of socket_group, nobody else."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.attacks.conftest import Tried
from tests.attacks.target import Target

pytestmark = pytest.mark.criu
NOBODY, DAEMON = 65534, 1  #: ids that every Debian has
ASK = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[3]))
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[1])
    print("yes")
except OSError as error:
    print(error.strerror)
"""


async def ask(target: Target, user: int, group: int) -> str:
    socket = target.directory / "phauld.sock"
    argv = [sys.executable, "-c", ASK, str(socket), str(group), str(user)]
    asking = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    output, _ = await asking.communicate()
    return output.decode()


async def test_who_may_connect(certificates: Path, tried: Tried) -> None:
    with Target.running(certificates, socket_group="daemon") as target:
        os.chmod(target.directory, 0o755)
        found = os.stat(target.directory / "phauld.sock")
        assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o660, 0, DAEMON)
        assert "yes" in await ask(target, 0, 0)
        assert "yes" in await ask(target, NOBODY, DAEMON)
        assert "Permission denied" in await ask(target, NOBODY, NOBODY)
    with Target.running(certificates) as target:
        os.chmod(target.directory, 0o755)
        assert "Permission denied" in await ask(target, NOBODY, DAEMON)
    tried("a user who is neither root nor in socket_group, at the unix socket", "Permission denied")
