"""The first cause of a failure is found in criu's log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul_criu import logs

#: Messages in the form of criu 4.1's sources, and the code of the cause.
LINES = [
    ("(00.02) Warn  (compel/src/lib/infect.c:133): Unable to interrupt task: 9 (No such process)", "no-such-process"),
    (
        "(00.02) Warn  (compel/src/lib/infect.c:133): Unable to interrupt task: 9 (Operation not permitted)",
        "not-permitted",
    ),
    ("(00.00) Error (criu/cr-restore.c:1230): Can't fork for 4242: File exists", "pid-taken"),
    ("(00.02) Error (criu/files-reg.c:1790): Can't lookup mount=24 for fd=0 path=/dev/null", "mount-outside"),
    (
        "(00.01) Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option.",
        "tcp-connected",
    ),
    ("(00.20) Error (criu/sockets.c:628): sockets: Can't get 1:16 opt: Operation not supported", "kernel-too-new"),
    ("(00.109080) Error (criu/sk-inet.c:176): inet: In-flight connection (l) for 1a3d3", "tcp-in-flight"),
    ("(00.01)     12: Error (criu/sk-inet.c:912): inet: Connected TCP socket in image", "tcp-connected"),
    (
        "(00.01)     12: Error (criu/sk-inet.c:1059): inet: Can't bind inet socket (id 3): "
        "Cannot assign requested address",
        "address-missing",
    ),
    (
        "(00.01)     12: Error (criu/sk-inet.c:1059): inet: Can't bind inet socket (id 3): Address already in use",
        "address-in-use",
    ),
    ("(00.01)     12: Error (criu/files-reg.c:2153): File usr/bin/x has bad build-ID", "file-differs"),
    ("(00.01)     12: Error (criu/files-reg.c:2175): File tmp/log has bad size 10 (expect 8)", "file-differs"),
    ("(00.01)     12: Error (criu/files-reg.c:2294): File tmp/log has bad mode 0644 (expect 0600)", "file-differs"),
    (
        "(00.01)     12: Error (criu/files-reg.c:2353): Can't open file tmp/x on restore: No such file or directory",
        "file-missing",
    ),
    (
        "(00.01) Error (criu/cr-dump.c:1681): A session leader of 7(7) is outside of its pid namespace",
        "session-leader-outside",
    ),
    ("(00.01) Error (criu/tty.c:1830): tty: Found dangling tty with sid 10 pgid 12 (pts) on peer fd 0.", "terminal"),
    (
        "(00.01) Error (criu/files-reg.c:1031): Can't dump ghost file /tmp/x of 2097152 size, increase limit",
        "ghost-file-too-big",
    ),
    (
        "(00.01) Error (criu/files-reg.c:1122): Can't create link remap for /tmp/x. Use link-remap option.",
        "link-remap-needed",
    ),
    (
        "(00.01) Error (criu/sk-unix.c:874): unix: External socket is used. Consider using --ext-unix-sk option.",
        "unix-socket-outside",
    ),
    ("(00.01) Error (criu/file-lock.c:110): Some file locks are hold by dumping tasks!", "file-lock"),
    ("(00.01) Error (criu/files-ext.c:98): Can't dump file 5 of that type [20600] (chr 195:255)", "unsupported-file"),
    ("(00.01) Error (criu/arch/x86/cpu.c:297): cpu: CPU capabilities do not match run time", "cpu-differs"),
    (
        "(00.01) Error (criu/config.c:1130): Tracking memory is not available. Consider omitting --track-mem option.",
        "no-memory-tracking",
    ),
    ("(00.01) Error (criu/page-pipe.c:424): page-pipe: splice: -1: Bad file descriptor", "pipe-limit"),
    ("(00.01) Error (criu/page-xfer.c:191): page-xfer: Can't write pages to socket: Broken pipe", "page-connection"),
    ("(00.01) Error (criu/image.c:700): Can't write: No space left on device", "no-space"),
]


@pytest.mark.parametrize(("line", "code"), LINES)
def test_known_causes_have_a_code_and_a_remedy(line: str, code: str) -> None:
    cause = logs.first_cause(f"(00.001) Version: 4.1.1\n{line}\n(00.9) Error (criu/cr-dump.c:2111): Dumping FAILED.\n")
    assert cause is not None
    assert cause.code == code
    assert cause.remedy
    assert line.endswith(cause.message)
    assert f"({cause.file}:{cause.line})" in line


def test_an_unknown_error_is_a_cause_without_a_remedy() -> None:
    cause = logs.first_cause("(00.1)   7: Error (criu/x.c:5): it broke\n(00.2) Error (criu/y.c:6): so did this\n")
    assert cause == logs.Cause(message="it broke", file="criu/x.c", line=5)


def test_a_known_cause_comes_before_an_unknown_one() -> None:
    log = "(00.1) Error (criu/x.c:5): it broke\n(00.2) Error (criu/y.c:6): Can't fork for 3: File exists\n"
    cause = logs.first_cause(log)
    assert cause is not None
    assert cause.code == "pid-taken"


@pytest.mark.parametrize(
    "log",
    [
        "",
        "(00.1) Version: 4.1.1\n(00.2) Warn  (criu/x.c:1): careful\n",
        "(00.0) Error (criu/util.c:1): Can't setup RLIMIT_NOFILE for self: Operation not permitted\n",
        "(00.9) Error (criu/cr-dump.c:2111): Dumping FAILED.\n",
        "(00.9) Error (criu/cr-service.c:233): RPC client reported script error\n",
    ],
)
def test_harmless_lines_are_no_cause(log: str) -> None:
    assert logs.first_cause(log) is None


@pytest.mark.parametrize("start", ["", "    12: ", "pie: 12: ", "    pie: 12: "])
def test_a_log_without_times_is_read_as_well(start: str) -> None:
    """That of warnings and errors alone."""
    cause = logs.first_cause(f"{start}Error (criu/x.c:5): it broke\nError (criu/y.c:6): so did this\n")
    assert cause == logs.Cause(message="it broke", file="criu/x.c", line=5)


def test_errors_of_the_code_inside_the_tree_count() -> None:
    cause = logs.first_cause("(00.02) pie: 9: Error (criu/pie/restorer.c:1200): Can't restore 9\n")
    assert cause is not None
    assert cause.message == "Can't restore 9"


def test_tail_is_the_end() -> None:
    assert logs.tail("a\nb\nc\n", lines=2) == "b\nc"


@given(st.text(max_size=300))
def test_no_text_is_a_crash(text: str) -> None:
    logs.first_cause(text)
    logs.explain(text)
    logs.first_cause(f"(00.1) Error (criu/x.c:5): {text}")
