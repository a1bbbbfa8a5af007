"""The seed's API with real rounds: client and server in one process over a socket pair, as in the original's test.

Prints {"history": […], "moved", "parent", "server_dirs", "local_dirs", "received_bytes", "kept_bytes"} as JSON.
"""

import asyncio
import dataclasses
import json
import tempfile
from pathlib import Path

from phaul_client.policy import ClassicPolicy
from tests.node.criu_victims import start_victim, subreaper
from tests.seed_api import both_halves


async def main() -> None:
    with tempfile.TemporaryDirectory() as name, subreaper():
        directory = Path(name)
        victim = start_victim(directory, mebibytes=16, workers=1)
        try:
            beats = victim.beats()
            with both_halves(directory / "image", victim.pid, policy=ClassicPolicy(max_rounds=3)) as halves:
                history = await halves.migrate(120)
            victim.reaped()
            victim.restored_as(halves.local.restored_pid)
            pages = list((directory / "image/remote").glob("*/pages-*.img"))
            result = {
                "received_bytes": sum(path.stat().st_size for path in pages),
                "kept_bytes": sum(path.stat().st_blocks * 512 for path in pages),
                "history": [dataclasses.asdict(each) for each in history],
                "moved": victim.is_beating() and victim.is_beating(0) and victim.beats() > beats,
                "parent": halves.local.parent.name if halves.local.parent else "",
                "server_dirs": sorted(path.name for path in (directory / "image/remote").iterdir()),
                "local_dirs": sorted(path.name for path in (directory / "image/local").iterdir()),
            }
        finally:
            victim.kill()
        print(json.dumps(result))


asyncio.run(main())
