"""The agent inside a guest: starts commands and moves files for the tests, over a virtio-serial port.

A frame is its length (4 bytes, big endian) and a JSON object; bytes are base64 in it. Every request has an `id` and is
answered with the same `id`, in any order: {"id", "answer"} or {"id", "error"}. A process is named by the `id` of the
request that started it; its end comes as {"ended": that id, "returncode", "stdout", "stderr"}. The first frame says
hello. Only the standard library: it runs on the guest's bare Python.
"""

import base64
import json
import os
import signal
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PORT = "/dev/vport0p1"
_LENGTH = struct.Struct(">I")
_CHUNK_BYTES = 1 << 16

port_fd = os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
send_lock = threading.Lock()
#: keeps a command's end from being told before its start, and a signal from reaching a reused PID
processes_lock = threading.Lock()
processes: dict[int, subprocess.Popen[bytes]] = {}


def send(frame: dict[str, Any]) -> None:
    """Send a frame, one at a time."""
    body = json.dumps(frame).encode()
    rest = memoryview(_LENGTH.pack(len(body)) + body)
    with send_lock:
        while rest:
            rest = rest[os.write(port_fd, rest) :]


def receive(size: int) -> bytes:
    """Exactly `size` bytes."""
    parts: list[bytes] = []
    while size:
        part = os.read(port_fd, min(size, _CHUNK_BYTES))
        if not part:
            raise SystemExit("the host closed the port")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def start(request: dict[str, Any]) -> int:
    """Start a command in a session of its own; its PID. Without a log its output is kept for the end."""
    log = request["log"]
    if log is None:
        output_fd = os.memfd_create("stdout", os.MFD_CLOEXEC)
        errors_fd = os.memfd_create("stderr", os.MFD_CLOEXEC)
    else:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        output_fd = errors_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    input_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    if request["stdin"]:
        os.close(input_fd)
        input_fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(input_fd), "wb") as stdin:
            stdin.write(base64.b64decode(request["stdin"]))
        os.lseek(input_fd, 0, os.SEEK_SET)
    try:
        process = subprocess.Popen(
            request["argv"],
            stdin=input_fd,
            stdout=output_fd,
            stderr=errors_fd,
            env={**os.environ, **request["env"]},
            cwd=request["cwd"],
            start_new_session=True,
        )
    except BaseException:
        for fd in {output_fd, errors_fd}:
            os.close(fd)
        raise
    finally:
        os.close(input_fd)
    processes[request["id"]] = process
    threading.Thread(target=tell_the_end, args=(request["id"], process, output_fd, errors_fd), daemon=True).start()
    return process.pid


def tell_the_end(number: int, process: subprocess.Popen[bytes], output_fd: int, errors_fd: int) -> None:
    """Wait for a process and report how it ended. What it left running may keep its output open; nobody waits."""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with processes_lock:
        returncode = process.wait()
        del processes[number]
    end: dict[str, Any] = {"ended": number, "returncode": returncode}
    if output_fd != errors_fd:
        end["stdout"], end["stderr"] = content(output_fd), content(errors_fd)
        os.close(errors_fd)
    os.close(output_fd)
    send(end)


def content(fd: int) -> str:
    """All of a memory file, as base64."""
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        return base64.b64encode(file.read()).decode()


def send_signal(request: dict[str, Any]) -> bool:
    """Signal a process that was started here, or its whole session; whether it still ran."""
    with processes_lock:
        if (process := processes.get(request["process"])) is None:
            return False
        (os.killpg if request["session"] else os.kill)(process.pid, signal.Signals(request["number"]))
    return True


def put(request: dict[str, Any]) -> None:
    """Write a file, whole or not at all."""
    path = Path(request["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(base64.b64decode(request["data"]))
    new.chmod(request["mode"])
    new.replace(path)


def get(request: dict[str, Any]) -> str:
    """Read a file."""
    return base64.b64encode(Path(request["path"]).read_bytes()).decode()


OPERATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {"start": start, "signal": send_signal, "put": put, "get": get}


def answer(request: dict[str, Any]) -> None:
    """Do what is asked and answer."""
    try:
        result: Any = OPERATIONS[request["do"]](request)
    except Exception as exc:
        send({"id": request["id"], "error": f"{type(exc).__name__}: {exc}"})
    else:
        send({"id": request["id"], "answer": result})


def main() -> None:
    """Say hello, then answer until the guest dies."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    send({"hello": boot_id, "kernel": os.uname().release, "cpus": os.cpu_count()})
    while True:
        (size,) = _LENGTH.unpack(receive(_LENGTH.size))
        request = json.loads(receive(size))
        if request["do"] == "start":
            with processes_lock:
                answer(request)
        else:
            threading.Thread(target=answer, args=(request,), daemon=True).start()


if __name__ == "__main__":
    main()
