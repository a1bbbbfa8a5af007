"""The workloads: how each is started, who its client is, and what this machine must have for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.workloads.client import HTTP_BODY

PROGRAMS: Final = Path(__file__).parent / "programs"
PORT: Final = 7300
_NGINX: Final = """daemon off; worker_processes 3; error_log {d}/error.log; pid {d}/pid; master_process on; user root;
events {{ worker_connections 256; }}
http {{ access_log off; client_body_temp_path {d}/body; proxy_temp_path {d}/proxy; fastcgi_temp_path {d}/fcgi;
 uwsgi_temp_path {d}/uwsgi; scgi_temp_path {d}/scgi; server {{ listen 0.0.0.0:{port}; root {d}; }} }}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One of them. Its client is another process, or, without a protocol, the workload itself by its beats file."""

    name: str
    protocol: str = ""
    needs: dict[str, str] = field(default_factory=dict)  #: program, and the Debian package that has it
    own_files: bool = False  #: in a directory of its node, as its locks cannot be had twice on files that nodes share
    #: Makes what it needs in a directory; the words that start it.
    prepare: Callable[[Path], list[str]]


def _redis(directory: Path) -> list[str]:
    return f"redis-server --port {PORT} --bind 0.0.0.0 --protected-mode no --save '' --dir {directory}".split()


def _nginx(directory: Path) -> list[str]:
    (directory / "nginx.conf").write_text(_NGINX.format(d=directory, port=PORT))
    (directory / "data").write_bytes(HTTP_BODY)
    return ["nginx", "-c", str(directory / "nginx.conf"), "-p", str(directory)]


def _compiled(source: str, *compiler: str) -> Callable[[Path], list[str]]:
    def prepare(directory: Path) -> list[str]:
        program = directory / "program"
        subprocess.run([*compiler, "-o", program, PROGRAMS / source], check=True, capture_output=True, cwd=directory)
        return [str(program)]

    return prepare


def _java(directory: Path) -> list[str]:
    words = ["java", "-Xmx128m", "-XX:+UseSerialGC", "-XX:-UsePerfData", str(PROGRAMS / "Lines.java"), str(PORT)]
    return words


def _go(directory: Path) -> list[str]:
    return [*_compiled("lines.go", "go", "build")(directory), str(PORT)]


def _threads(directory: Path) -> list[str]:
    return [*_compiled("threads.c", "gcc", "-O1", "-pthread")(directory), str(directory / "beats")]


def _tree(directory: Path) -> list[str]:
    return [sys.executable, "-I", str(PROGRAMS / "tree.py"), str(directory / "beats")]


WORKLOADS: Final = (
    Workload(name="redis", protocol="redis", needs={"redis-server": "redis-server"}, prepare=_redis),
    Workload(name="nginx", protocol="http", needs={"nginx": "nginx-light"}, prepare=_nginx),
    Workload(
        name="memcached",
        protocol="memcached",
        needs={"memcached": "memcached"},
        prepare=lambda _: ["memcached", "-p", str(PORT), "-l", "0.0.0.0", "-u", "root", "-t", "4"],
    ),
    Workload(
        name="asyncio",
        protocol="lines",
        prepare=lambda _: [sys.executable, "-I", str(PROGRAMS / "lines.py"), str(PORT)],
    ),
    Workload(
        name="node",
        protocol="lines",
        needs={"node": "nodejs"},
        prepare=lambda _: ["node", str(PROGRAMS / "lines.js"), str(PORT)],
    ),
    Workload(name="jvm", protocol="lines", needs={"java": "default-jdk-headless"}, prepare=_java),
    Workload(name="go", protocol="lines", needs={"go": "golang-go"}, prepare=_go),
    Workload(name="threads", needs={"gcc": "gcc"}, prepare=_threads),
    Workload(name="tree", own_files=True, prepare=_tree),
)
