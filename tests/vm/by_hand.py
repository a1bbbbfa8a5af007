"""The lab by hand: a prompt for two guests (scripts/lab)."""

from __future__ import annotations

import asyncio
import sys
from typing import Final, TextIO

from tests.started import CommandFailed
from tests.vm.channel import GuestDied
from tests.vm.image import ImageBroken, LabMissing, ensure_image
from tests.vm.lab import Lab, open_lab

HELP: Final = """\
  a COMMAND, b COMMAND   run a shell command in a guest: a uname -r
  phauld                 start phauld in both
  link on, link off      plug the cable in or out
  limit MBIT, limit off  limit its bandwidth in both directions
  kill a, boot a         cut a guest's power, boot it again
  console a              what its kernel said
  quit                   or the end of the input: kill both
"""


async def obey(lab: Lab, line: str, out: TextIO) -> None:
    """Do what a line says. Raises ValueError if it cannot be understood."""
    verb, _, rest = line.partition(" ")
    guests = {guest.name: guest for guest in lab.guests}
    match verb, rest:
        case (("a" | "b"), _) if rest:
            done = await guests[verb].run(["sh", "-c", rest], check=False, timeout_seconds=3600)
            out.write(done.stdout + done.stderr + (f"exit status {done.returncode}\n" if done.returncode else ""))
        case "phauld", "":
            await asyncio.gather(*(guest.start_phauld() for guest in lab.guests))
        case "link", ("on" | "off"):
            await lab.link(rest == "on")
        case "limit", "off":
            await lab.bandwidth(None)
        case "limit", _:
            await lab.bandwidth(int(float(rest) * 1e6))
        case "kill", ("a" | "b"):
            await guests[rest].kill()
        case "boot", ("a" | "b"):
            await guests[rest].boot()
        case "console", ("a" | "b"):
            out.write(guests[rest].console)
        case _:
            raise ValueError(line)


async def prompt(out: TextIO) -> None:
    """Boot, and obey until the input ends."""
    async with open_lab() as lab:
        for guest in lab.guests:
            out.write(f"{guest.name}: {guest.address}, Linux {guest.kernel}, booted in {guest.boot_seconds:.1f} s\n")
        out.write(HELP)
        while True:
            out.write("lab> ")
            out.flush()
            line = await asyncio.to_thread(sys.stdin.readline)
            if not line or line.strip() == "quit":
                return
            try:
                if line.strip():
                    await obey(lab, line.strip(), out)
            except ValueError:
                out.write(HELP)
            except (CommandFailed, GuestDied, TimeoutError) as exc:
                out.write(f"error: {exc or 'too late'}\n")


def main() -> None:
    """`build`, or the prompt."""
    try:
        if sys.argv[1:] == ["build"]:
            sys.stdout.write(f"{ensure_image().disk}\n")
        elif sys.argv[1:]:
            sys.exit("usage: scripts/lab [build]")
        else:
            asyncio.run(prompt(sys.stdout))
    except (LabMissing, ImageBroken, GuestDied, TimeoutError) as exc:
        sys.exit(f"phaul lab: error: {exc}")


if __name__ == "__main__":
    main()
