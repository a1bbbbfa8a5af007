"""Runs the `main` of one of phauld's small processes, in a Python that starts sooner and stays smaller.

    python -I -S bare.py MODULE ARGUMENT…    arguments begin at `sys.argv[2]`

They outlive phauld, or must be there at once. Without site packages they have the standard library alone, and of
phaul's what needs no more than that.
"""

import os
import sys


def bare_python(module: str) -> list[str]:
    """What to put before the arguments."""
    return [sys.executable, "-I", "-S", __file__, module]


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    __import__(f"phauld.{sys.argv[1]}", fromlist=["main"]).main()
