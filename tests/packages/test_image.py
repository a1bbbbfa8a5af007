"""The image and deploy/kubernetes.yaml: what the schema says, and processes that move between two pods made of them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from phauld.config import Config
from tests.need import need
from tests.nodes import Nodes, two_nodes
from tests.packages import manifest
from tests.packages.builds import PACKAGE, ROOT, run
from tests.packages.image import NotServing, documented_capabilities, image_root, move, two_pods
from tests.started import CommandFailed
from tests.systemd.machines import missing

pytestmark = pytest.mark.timeout(900)

#: Fields that are wrong in one way each: a name, a type, a value, a place.
WRONG: Final = {
    "hostPID: false": "hostPid: false",
    "terminationGracePeriodSeconds: 45": "terminationGracePeriodSeconds: soon",
    "type: OnDelete": "type: [OnDelete]",
    "drop: [ALL]": "drop: ALL",
    "periodSeconds: 1": "periodSecond: 1",
    "seccompProfile: {type: Unconfined}": "seccompProfile: {types: Unconfined}",
    "mountPath: /dev/shm": "path: /dev/shm",
}
OPTIONS: Final = {
    "eager": ("--restore", "eager"),
    "lazy": ("--restore", "lazy"),
    "postcopy": ("--mode", "post-copy"),
}


@pytest.mark.parametrize("version", manifest.VERSIONS)
def test_the_manifest_fits_the_schema(version: str) -> None:
    assert manifest.validate(manifest.MANIFEST, version) == ""


@pytest.mark.parametrize("right", WRONG)
def test_a_wrong_field_is_found(right: str, tmp_path: Path) -> None:
    text = manifest.MANIFEST.read_text()
    assert right in text
    wrong = tmp_path / "kubernetes.yaml"
    wrong.write_text(text.replace(right, WRONG[right]))
    assert "did not validate" in manifest.validate(wrong, manifest.VERSIONS[-1])


def test_the_capabilities_are_the_same_wherever_they_are_listed() -> None:
    (phauld,) = manifest.pod()["containers"]
    listed = manifest.capabilities(phauld)
    assert listed == sorted(listed) == documented_capabilities()
    rows = re.findall(r"^\| ([A-Z_]+) \|", (ROOT / "docs/packaging.md").read_text(), re.MULTILINE)
    assert rows == listed


def test_what_it_is_told_is_what_phauld_knows(tmp_path: Path) -> None:
    spec, found = manifest.pod(), manifest.objects()
    names = {each["name"] for each in spec["volumes"]}
    for container in (*spec["initContainers"], *spec["containers"]):
        assert {each["name"] for each in container["volumeMounts"]} <= names
    assert found["DaemonSet"]["spec"]["selector"]["matchLabels"].items() <= (
        found["DaemonSet"]["spec"]["template"]["metadata"]["labels"].items()
    )
    assert found["DaemonSet"]["metadata"]["namespace"] == found["Namespace"]["metadata"]["name"]
    settings = manifest.settings(found["ConfigMap"])
    config = Config(**{**settings, "tls_dir": Path(settings["tls_dir"])})
    assert settings["tls_dir"] in {each["mountPath"] for each in spec["containers"][0]["volumeMounts"]}
    ports = {each["name"]: each["containerPort"] for each in spec["containers"][0]["ports"]}
    assert ports == {"grpc": config.address[1], "pages": config.data_port}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = spec["containers"][0][kind]["httpGet"]
        assert f"{get['host']}:{get['port']}" == config.http_listen


# --- with the image ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def image() -> Iterator[Path]:
    """The files of the image of this checkout, which is built for it."""
    if reason := missing():
        pytest.skip(reason)
    if reason := need({"buildah": "buildah", "crun": "crun"}):
        pytest.skip(reason)
    run(PACKAGE, "image", timeout_seconds=800)
    with image_root() as root:
        yield root


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    async with two_nodes(tmp_path / "nodes") as nodes:
        yield nodes


@pytest.mark.seldom
@pytest.mark.criu
async def test_processes_move_between_two_pods(
    image: Path, nodes: Nodes, tmp_path: Path, json_report: dict[str, Any]
) -> None:
    async with two_pods(nodes, image, tmp_path) as (a, b):
        pauses = {}
        for name, options in OPTIONS.items():
            report = await move(a, b, tmp_path / name, *options)
            pauses[name] = report["pause_ms"]
            assert report["mode"] == ("post-copy" if name == "postcopy" else "stop-copy")
        json_report["package_image"] = pauses
        for pod in (a, b):
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert await pod.probe(kind) == "200"


@pytest.mark.seldom
@pytest.mark.criu
@pytest.mark.parametrize("name", manifest.NEEDED)
async def test_none_of_the_capabilities_can_be_left_out(name: str, image: Path, nodes: Nodes, tmp_path: Path) -> None:
    assert name in documented_capabilities()
    with pytest.raises((CommandFailed, NotServing), match=r"does not serve|ended with [1-9]"):
        async with two_pods(nodes, image, tmp_path, without=[name]) as (a, b):
            await move(a, b, tmp_path / "heart", *OPTIONS["eager"])
