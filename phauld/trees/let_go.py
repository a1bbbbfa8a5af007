"""Whether a restored tree was let go, when its criu is gone and cannot say: what its tasks do is looked at.

With the standard library alone: see `bare.py`.
"""

import os
import time

from phauld.proc import descendants, is_ending, was_killed

LOOKS = 20
LOOK_SECONDS = 0.05


def was_let_go(pid: int, criu: str) -> bool | None:
    """Whether a restored process runs its own code: not criu's, and not the restorer that criu put into it.

    None: it is on a processor, and it may be the restorer's code on its way to where that waits; look again.

    The restorer is the one place where a task waits for criu, in an anonymous mapping that is writable and executable
    (criu/pie/restorer.c; seen with criu 4.1 and 4.2).
    """
    try:
        if os.path.samefile(f"/proc/{pid}/exe", criu):
            return False
        with open(f"/proc/{pid}/syscall", "rb") as file:
            words = file.read().split()
        counter = None if words[0] == b"running" else int(words[-1], 16)
        with open(f"/proc/{pid}/maps", "rb") as file:
            for line in file:
                fields = line.split()
                if counter is None:
                    if len(fields) == 5 and fields[1].startswith(b"rwx"):
                        return None
                    continue
                start, _, end = fields[0].partition(b"-")
                if int(start, 16) <= counter < int(end, 16):
                    return not (len(fields) == 5 and fields[1].startswith(b"rwx"))
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended, so it was let go
    except OSError:
        return False  # what cannot be looked at is not taken for running: it is killed, and runs on at its source
    return True


def look_at(directory: str, roots: list[int], criu: str) -> bool:
    """Whether the tree was let go; criu is gone. Its exit status says nothing: it may fail after it let go."""
    if not os.path.exists(os.path.join(directory, "released")):
        return False
    always_busy = True  # a program that compiles its code looks like the restorer while it computes, but for long
    for _ in range(LOOKS):
        if any(was_killed(root) for root in roots):
            return False
        is_on_its_way = any(map(is_ending, roots))
        found = [was_let_go(pid, criu) for pid in descendants(roots)]
        if not is_on_its_way and all(found):
            return not any(was_killed(root) for root in roots)  # while it was looked at
        always_busy = always_busy and not is_on_its_way and False not in found
        time.sleep(LOOK_SECONDS)
    return always_busy
