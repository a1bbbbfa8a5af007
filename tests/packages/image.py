"""The image in a pod at each of two nodes, as deploy/kubernetes.yaml tells: what it is told, mounts and may do.

A container has the network of its node, PIDs, mounts and IPC of its own, and is started by crun. Certificates are made
with `phaul certs`. Whatever runs ends with the nodes.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.nodes import PROGRAMS, Node, Nodes, until
from tests.packages import manifest
from tests.packages.builds import ROOT, VICTIM, run
from tests.started import Completed
from tests.victims.heartbeat import read_beats

IMAGE: Final = "localhost/phaul"
DOCKERFILE: Final = ROOT / "Dockerfile"
SHARED: Final = Path("/shared")
_PROBE: Final = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).status)"
#: as the runtimes do where nothing else is said
_MASKED: Final = ("acpi", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "scsi")
_READ_ONLY: Final = ("bus", "fs", "irq", "sys", "sysrq-trigger")


def documented_capabilities() -> list[str]:
    """What the Dockerfile says that a container needs."""
    return re.findall(r"--cap-add[ =](\w+)", DOCKERFILE.read_text())


def entrypoint() -> list[str]:
    """What the image starts, before the arguments."""
    found: list[str] = json.loads(run("buildah", "inspect", "--type", "image", IMAGE))["OCIv1"]["config"]["Entrypoint"]
    return found


@contextlib.contextmanager
def image_root() -> Iterator[Path]:
    """The files of the image, to be written to."""
    container = run("buildah", "from", "--pull-never", IMAGE).strip().splitlines()[-1]
    try:
        yield Path(run("buildah", "mount", container).strip().splitlines()[-1])
    finally:
        run("buildah", "rm", container)


class NotServing(Exception):
    """phauld ended, or does not serve in time."""


class Pod:
    """A pod of the manifest at a node. `without` are capabilities that its phauld is not given."""

    def __init__(self, node: Node, root: Path, directory: Path, shared: Path, without: Sequence[str] = ()) -> None:
        self.node = node
        self.name = f"node-{node.name}"
        self._root = root
        self._directory = directory
        self._shared = shared
        self._without = without
        self._spec = manifest.pod()
        self._volumes = manifest.Volumes(directory / "volumes")
        self._crun: list[str | Path] = ["crun", "--cgroup-manager=disabled", "--root", str(directory / "crun")]

    async def start(self, config: Mapping[str, str], secret: Mapping[str, bytes]) -> None:
        """Run its containers one after the other, the last in the background, until its probe says that it serves."""
        self._volumes.fill(self._spec, config, secret)
        await self.node.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"])  # crun refuses a mixture of versions
        for each in self._spec["initContainers"]:
            await self.node.run([*self._crun, "run", "--bundle", self._bundle(each, each["command"]), each["name"]])
        (phauld,) = self._spec["containers"]
        log = self._directory / "phauld.log"
        words = [*self._crun, "run", "--bundle", self._bundle(phauld, [*entrypoint(), *phauld["args"]]), phauld["name"]]
        process = await self.node.start(words, log=log)
        for _ in range(phauld["startupProbe"]["failureThreshold"] * 10):
            if process.returncode is not None:
                break
            with contextlib.suppress(TimeoutError):
                if await self.probe("startupProbe") == "200":
                    return
                await until(lambda: process.returncode is not None, phauld["startupProbe"]["periodSeconds"] / 10)
        raise NotServing(f"{self.name} does not serve: {log.read_text()}")

    async def probe(self, kind: str) -> str:
        """What the kubelet would get; empty if nothing."""
        (phauld,) = self._spec["containers"]
        get = phauld[kind]["httpGet"]
        url = f"http://{get['host']}:{get['port']}{get['path']}"
        return (await self.node.run(["/usr/bin/env", "python3", "-c", _PROBE, url], check=False)).stdout.strip()

    async def run(self, *argv: str | Path, check: bool = True) -> Completed:
        """A command beside phauld. Raises CommandFailed."""
        return await self.node.run([*self._crun, "exec", "phauld", *argv], check=check)

    async def running(self) -> list[dict[str, Any]]:
        """Its workloads that run."""
        found: list[dict[str, Any]] = (await self.run("phaul", "--json", "ps")).json()["workloads"]
        return [each for each in found if each["state"] == "running"]

    def _bundle(self, container: Mapping[str, Any], argv: Sequence[str]) -> Path:
        """What crun runs for a container of the pod."""
        assert self._spec["hostNetwork"]
        assert not self._spec["hostPID"]
        left_out = {*self._without, *(() if _has_sys_resource() else ("SYS_RESOURCE",))}
        allowed = [name for name in manifest.capabilities(container) if name not in left_out]
        found = manifest.environment(container, self.name)
        process = {
            "user": {"uid": 0, "gid": 0},
            "args": list(argv),
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", *(f"{key}={value}" for key, value in found.items())],
            "cwd": "/",
            "capabilities": {
                kind: [f"CAP_{name}" for name in allowed] for kind in ("bounding", "effective", "permitted")
            },
            "noNewPrivileges": not container["securityContext"]["allowPrivilegeEscalation"],
        }
        mounts = [
            _mount("/proc", "proc"),
            _mount("/dev", "tmpfs", "nosuid", "mode=755", "size=64m"),
            _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
            _mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
            *self._volumes.mounts(container),
            {"destination": str(SHARED), "type": "bind", "source": str(self._shared), "options": ["rbind"]},
        ]
        config = {
            "ociVersion": "1.0.2",
            "process": process,
            "root": {"path": str(self._root), "readonly": container["securityContext"]["readOnlyRootFilesystem"]},
            "hostname": self.name,
            "mounts": mounts,
            "linux": {
                "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")],
                "maskedPaths": [f"/proc/{each}" for each in _MASKED],
                "readonlyPaths": [f"/proc/{each}" for each in _READ_ONLY],
            },
        }
        where = self._directory / str(container["name"])
        where.mkdir()
        (where / "config.json").write_text(json.dumps(config))
        return where


def _has_sys_resource() -> bool:
    """Whether this machine has that to give: those that phaul is developed on have not."""
    bounding = re.search(r"^CapBnd:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert bounding is not None
    return bool(int(bounding[1], 16) >> 24 & 1)


def _mount(destination: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}


def certificates(directory: Path) -> dict[str, bytes]:
    """The secret of the manifest for the two nodes."""
    run(PROGRAMS / "phaul", "certs", "init", "--ca", directory / "ca")
    found = {}
    for name in ("node-a", "node-b"):
        run(PROGRAMS / "phaul", "certs", "issue", "--ca", directory / "ca", "--name", name, "--out", directory / name)
        for kind in ("crt", "key"):
            found[f"{name}.{kind}"] = (directory / name / f"node.{kind}").read_bytes()
    return {**found, "ca.crt": (directory / "node-a/ca.crt").read_bytes()}


@contextlib.asynccontextmanager
async def two_pods(
    nodes: Nodes, root: Path, directory: Path, without: Sequence[str] = ()
) -> AsyncIterator[tuple[Pod, Pod]]:
    """One at each node; they end with the nodes. `directory` is their /shared."""
    shutil.copy(VICTIM, directory)
    secret = certificates(directory / "certificates")
    config = manifest.objects()["ConfigMap"]["data"]
    for node in (nodes.a, nodes.b):
        example = manifest.EXAMPLE_ADDRESSES[f"node-{node.name}"]
        assert example in config["policy.toml"]
        config["policy.toml"] = config["policy.toml"].replace(example, node.address)
    pods = [Pod(node, root, directory / node.name, directory, without) for node in (nodes.a, nodes.b)]
    for each in pods:
        await each.start(config, secret)
    a, b = pods
    yield a, b


async def move(a: Pod, b: Pod, beats: Path, *options: str, heart: Sequence[str] = ()) -> dict[str, Any]:
    """Start a heart in a, move it to b, and let it check its memory there; the report. Raises CommandFailed."""
    words: list[str | Path] = ["/usr/bin/python3", SHARED / VICTIM.name, SHARED / beats.name, "--mib", "8", *heart]
    await a.run("phaul", "run", "--name", beats.name, "--", *words)
    await until(lambda: read_beats(beats).count)
    done = await a.run("phaul", "--json", "migrate", "-q", beats.name, "--to", b.node.address, *options)
    report: dict[str, Any] = done.events()[-1]
    assert report["outcome"] == "moved", report
    assert not await a.running()
    (there,) = await b.running()
    await b.run("sh", "-c", f"kill -USR1 {there['pid']}")
    await until(lambda: read_beats(beats).checks)
    assert read_beats(beats).failures == 0
    await b.run("phaul", "stop", beats.name)
    return report
