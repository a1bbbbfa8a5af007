"""A program that looks at itself in /proc in the wrong moment: `phaul migrate` tries again, but not for ever."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import pytest

from tests.nodes import Node, Nodes, until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

REFUSED: Final = 3
ROLLED_BACK: Final = 4
#: Opens its own file in /proc while `wish` is there, and says so by `open`.
PROGRAM: Final = """
import os, sys, time
wish, told = sys.argv[1:]
while True:
    if os.path.exists(wish):
        with open("/proc/self/stat"):
            open(told, "w").close()
            while os.path.exists(wish):
                time.sleep(0.01)
        os.unlink(told)
    time.sleep(0.01)
"""
#: After the preflight the program opens it, once, and closes it when the migration has failed for that.
HOOK: Final = """#!/bin/sh
case $PHAUL_PHASE in
prepare) if rm {once}; then touch {wish}; until [ -e {told} ]; do sleep 0.01; done; fi ;;
abort) rm -f {wish}; while [ -e {told} ]; do sleep 0.01; done; touch {over} ;;
esac
"""


async def start(node: Node, directory: Path) -> tuple[Path, Path]:
    wish, told = directory / "wish", directory / "open"
    await node.phaul("run", "--name", "curious", "--", sys.executable, "-c", PROGRAM, str(wish), str(told), check=True)
    return wish, told


async def arrange(nodes: Nodes, directory: Path) -> tuple[str, ...]:
    """Two daemons, a program that the first migration finds looking, and the words that ask for it."""
    a, b, _ = nodes
    hooks = directory / "hooks"
    hooks.mkdir()
    await a.start_phauld(hooks_dir=hooks)
    await b.start_phauld()
    wish, told = await start(a, directory)
    once, over = directory / "once", directory / "over"
    hook = hooks / "look"
    hook.write_text(HOOK.format(wish=wish, told=told, once=once, over=over))
    hook.chmod(0o755)
    once.touch()
    return ("migrate", "curious", "--to", b.address, "--json")


async def test_what_was_open_in_the_freeze_moves_when_it_is_tried_again(nodes: Nodes, tmp_path: Path) -> None:
    a, over = nodes.a, tmp_path / "over"
    words = await arrange(nodes, tmp_path)
    failed = await a.phaul(*words, "--attempts", "1")
    assert (failed.returncode, failed.events()[-1]["error"]["reason"]) == (ROLLED_BACK, "RESTORE_FAILED"), failed
    assert [each for each in failed.events() if each["event"] == "retry"] == []
    await until(over.exists)  # the hook is called when the migration is over
    done = await a.phaul(*words)
    assert (done.returncode, done.events()[-1]["outcome"]) == (0, "moved"), done


async def test_a_move_that_is_rolled_back_is_tried_again_by_itself(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    words = await arrange(nodes, tmp_path)
    done = await a.phaul(*words, "--attempts", "20")  # it may still be open when the second one looks
    retries = [each for each in done.events() if each["event"] == "retry"]
    assert (done.returncode, done.events()[-1]["outcome"]) == (0, "moved"), done
    assert (retries[0]["attempt"], retries[0]["error"]["reason"]) == (2, "RESTORE_FAILED"), retries
    assert [each["name"] for each in (await b.phaul("ps", "--json")).json()["workloads"]] == ["curious"]
    assert (await a.phaul("ps", "--json")).json() == {"workloads": []}


async def test_a_drain_tries_again_as_well(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    await arrange(nodes, tmp_path)
    done = await a.phaul("drain", "--to", b.address, "--attempts", "20", "--json")
    first, *_, last = done.events()
    assert (done.returncode, last["moved"], last["failed"]) == (0, 1, []), done
    assert (first["outcome"], first["error"]["reason"]) == ("rolled-back", "RESTORE_FAILED"), done


async def test_what_stays_open_is_refused_in_the_end(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    for node in (a, b):
        await node.start_phauld()
    wish, told = await start(a, tmp_path)
    wish.touch()
    await until(told.exists)
    done = await a.phaul("migrate", "curious", "--to", b.address, "--attempts", "2")
    assert done.returncode == REFUSED, done
    assert done.stderr.count("; attempt 2 of 2") == 1
    assert "try again if it is read now and then" in done.stderr.splitlines()[-1]
