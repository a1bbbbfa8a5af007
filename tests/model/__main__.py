"""python -m tests.model [CRASHES MESSAGES DISASTERS]: walk, and print what was found."""

from __future__ import annotations

import sys
import time

from phaul_client.commit import POSTCOPY_TRANSITIONS as POSTCOPY_SOURCE
from phauld.session import POSTCOPY_TRANSITIONS as POSTCOPY_DESTINATION
from tests.model.explorer import Explorer
from tests.model.world import Faults, Rules

ORDERS = {"eager": Rules(), "post-copy": Rules(POSTCOPY_SOURCE, POSTCOPY_DESTINATION)}
BUDGETS = [Faults(), Faults(1), Faults(0, 1), Faults(0, 0, 1), Faults(2), Faults(1, 1), Faults(1, 0, 1), Faults(2, 1)]


def main(arguments: list[str]) -> int:
    budgets = [Faults(*map(int, arguments))] if arguments else BUDGETS
    broken = 0
    for name, rules in ORDERS.items():
        for faults in budgets:
            started = time.monotonic()
            verdict = Explorer(rules, faults).run()
            print(f"{name:9} {faults}: {verdict} ({time.monotonic() - started:.1f} s)", flush=True)
            broken += bool(verdict.broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
