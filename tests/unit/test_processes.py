"""`descendants` against processes of this machine."""

import os
import signal
import subprocess
import sys

from phaul_criu.processes import descendants

#: A child of the first thread, one of another thread, and a grandchild; each says when it is there.
TREE = """
import os, signal, subprocess, sys, threading
def child(code): return subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE)
leaf = "print(1, flush=True); import signal; signal.pause()"
inner = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-I', '-S', '-c', %r], stdout=-1);" % leaf
inner += "p.stdout.readline(); print(p.pid, flush=True); p.wait()"
first = child(inner)
grandchild = int(first.stdout.readline())
def other():
    global second
    second = child(leaf)
    second.stdout.readline()
    print(first.pid, grandchild, second.pid, flush=True)
    done.wait()
done = threading.Event()
threading.Thread(target=other, daemon=True).start()
signal.pause()
"""


def test_descendants_of_every_thread_and_of_several_roots() -> None:
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", TREE], stdout=subprocess.PIPE, start_new_session=True
    ) as tree:
        try:
            assert tree.stdout is not None
            first, grandchild, second = map(int, tree.stdout.readline().split())
            found = list(descendants(tree.pid))
            assert found[0] == tree.pid
            assert sorted(found) == sorted((tree.pid, first, grandchild, second))
            assert found.index(first) < found.index(grandchild)
            assert sorted(descendants(first, second)) == sorted((first, grandchild, second))
        finally:
            os.killpg(tree.pid, signal.SIGKILL)


def test_a_process_that_is_gone_has_no_descendants() -> None:
    gone = subprocess.Popen([sys.executable, "-I", "-S", "-c", ""])
    gone.wait()
    assert list(descendants(gone.pid)) == [gone.pid]
