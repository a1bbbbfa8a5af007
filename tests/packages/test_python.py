"""The wheel and the source distribution: what is in them, and a process that they move."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, Final

import pytest

from phauld.version import phaul_version
from tests.nodes import Node, Nodes, two_nodes, until
from tests.packages.builds import ROOT, VICTIM, environment, files_of_the_project, run, tool, with_criu
from tests.victims.heartbeat import read_beats

pytestmark = pytest.mark.timeout(300)

REQUIREMENTS: Final = ROOT / "requirements.txt"
PACKAGES: Final = ("phaul_client/", "phaul_criu/", "phauld/", "proto/phaul/")
GENERATED: Final = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
INFO: Final = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}


def expected_in_wheel() -> set[str]:
    """The files of the four packages, what is generated of the .proto files, and the wheel's own."""
    sources = [name.removeprefix("proto/") for name in files_of_the_project() if name.startswith(PACKAGES)]
    protos = [name.removesuffix(".proto") for name in sources if name.endswith(".proto")]
    info = {f"phaul-{phaul_version()}.dist-info/{name}" for name in INFO}
    return {*sources, *(name + suffix for name in protos for suffix in GENERATED), *info}


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {each.filename: archive.read(each) for each in archive.infolist()}


def test_the_wheel_has_what_is_needed_and_nothing_else(wheel: Path) -> None:
    assert set(content(wheel)) == expected_in_wheel()


def test_the_source_distribution_makes_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, sdist)
    (made,) = tmp_path.glob("phaul-*.whl")
    assert content(made) == content(wheel)


def test_the_source_distribution_has_no_generated_code(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert not [name for name in names if "_pb2" in name]
    assert {"scripts/install-criu", "requirements.txt", "LICENSE"} <= {name.partition("/")[2] for name in names}


def test_the_tools_find_nothing(wheel: Path, sdist: Path) -> None:
    tool("twine", "check", "--strict", wheel, sdist)
    # W009: that there are four packages is meant
    tool("check_wheel_contents", "--no-config", "--ignore", "W009", wheel)


@pytest.mark.criu
@pytest.mark.parametrize("kind", ["wheel", pytest.param("sdist", marks=pytest.mark.seldom)])
async def test_a_process_is_moved_by_it(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, json_report: dict[str, Any]
) -> None:
    made: Path = request.getfixturevalue(kind)
    programs = environment(tmp_path / "venv", "--constraint", REQUIREMENTS, made)
    with_criu(programs)
    for name in ("phaul", "phauld"):
        assert run(programs / name, "--version").split()[-1] == phaul_version()
    where = run(programs / "python", "-c", "import phaul.v1, phauld, phaul_client, phaul_criu; print(phauld.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path)
    async with two_nodes(tmp_path / "nodes") as nodes:
        report = await moved(nodes, programs, tmp_path / "beats")
    json_report[f"package_{kind}"] = {"pause_ms": report["pause_ms"], "mode": report["mode"]}


async def moved(nodes: Nodes, programs: Path, beats: Path) -> dict[str, Any]:
    """Move a heart that beats from a to b with the phaul and phauld of an environment; the report."""
    for node in (nodes.a, nodes.b):
        node.programs = programs
        await node.start_phauld()
    await nodes.a.phaul("run", "--name", "heart", "--", programs / "python", VICTIM, beats, "--mib", "8", check=True)
    await until(lambda: read_beats(beats).count)
    done = await nodes.a.phaul("--json", "migrate", "-q", "heart", "--to", nodes.b.address, check=True)
    report: dict[str, Any] = done.events()[-1]
    assert report["outcome"] == "moved"
    assert not await running(nodes.a)
    (there,) = await running(nodes.b)
    await nodes.b.run(["kill", "-USR1", str(there["pid"])])  # its init passes it on
    await until(lambda: read_beats(beats).checks)
    assert read_beats(beats).failures == 0
    return report


async def running(node: Node) -> list[dict[str, Any]]:
    found = (await node.phaul("--json", "ps", check=True)).json()["workloads"]
    return [each for each in found if each["state"] == "running"]
