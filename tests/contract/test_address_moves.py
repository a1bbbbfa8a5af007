"""What an address is made mute with, and is given and taken by: told to a real kernel, in a namespace of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IN_NAMESPACE = """
import asyncio, json, subprocess
from phaul_client.addresses import Address
from phaul_client.errors import PhaulError
from phaul_client.movers import Addresses, find

def run(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout

def tables():
    return run("nft", "list", "ruleset")

async def main():
    for words in ("link add v0 type veth peer name v1", "link set v0 up", "link set v1 up", "link set lo up"):
        run("ip", *words.split())
    four, six = Address("10.0.0.9", 24, "v0"), Address("fd00::9", 64, "v0")
    addresses = Addresses((four, six), "a-b")
    for _ in range(2):  # every act can be repeated
        await addresses.hold()
    muted = tables()
    for rule in (
        "ip daddr 10.0.0.9 drop", "ip saddr 10.0.0.9 drop", "ip6 daddr fd00::9 drop", "ip6 saddr fd00::9 drop",
        "meta mark 0x0000c114 accept", "icmpv6 type nd-neighbor-solicit ",
        "arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp daddr ip 10.0.0.9 drop",
    ):
        assert muted.count(rule) == (2 if "mark" in rule else 1), (rule, muted)
    assert (await find("10.0.0.9"), await find("fd00::9")) == (four, six)
    assert "fd00::9" not in run("ip", "address", "show", "dev", "v0", "tentative")
    for _ in range(2):
        await addresses.show()
    assert tables() == "" and await find("10.0.0.9") == four
    run("ip", "address", "add", "10.0.0.10/24", "dev", "v0")
    for _ in range(2):
        await addresses.withdraw()
    assert (await find("10.0.0.9"), await find("fd00::9")) == (None, None)
    assert await find("10.0.0.10") is not None  # a secondary stays
    for _ in range(2):
        await addresses.put_back()
    await addresses.hold()
    for _ in range(2):
        await addresses.drop()
    assert tables() == "" and await find("fd00::9") is None
    try:
        await Addresses((Address("10.0.0.9", 24, "v7"),)).put_back()
    except PhaulError as exc:
        assert "v7" in str(exc), exc
    else:
        raise AssertionError("an interface that is not there")
    print("done")

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_it_is_held_shown_withdrawn_put_back_and_dropped() -> None:
    argv = ["unshare", "--net", sys.executable, "-c", IN_NAMESPACE]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr
