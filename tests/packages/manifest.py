"""deploy/kubernetes.yaml as a kubelet would read it: what its containers are told, get mounted and may do."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.packages.builds import ROOT, run, tools

MANIFEST: Final = ROOT / "deploy" / "kubernetes.yaml"
#: the oldest that knows appArmorProfile, and the newest that the tool knows
VERSIONS: Final = ("1.30.0", "1.37.0")
#: of the policy in it, which whoever uses it replaces
EXAMPLE_ADDRESSES: Final = {"node-a": "192.0.2.1", "node-b": "192.0.2.2"}
#: Without any one of these nothing moves, whoever's it is.
NEEDED: Final = (
    *("DAC_OVERRIDE", "NET_ADMIN", "SETGID", "SETPCAP", "SETUID"),
    *("SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE", "SYS_TIME"),
)
_TO_JSON: Final = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))"


def validate(manifest: Path, version: str) -> str:
    """What the schema of a version has against it; empty if nothing."""
    words = [str(tools() / "python"), "-m", "kubernetes_validate", "--strict", "--quiet", "-k", version, str(manifest)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout or f"ended with {done.returncode}" if done.returncode else ""


def objects(manifest: Path = MANIFEST) -> dict[str, Any]:
    """Its objects by kind."""
    found = json.loads(run(tools() / "python", "-c", _TO_JSON, manifest).splitlines()[-1])
    return {each["kind"]: each for each in found}


def pod(manifest: Path = MANIFEST) -> dict[str, Any]:
    """The pod that the DaemonSet makes on each node."""
    spec: dict[str, Any] = objects(manifest)["DaemonSet"]["spec"]["template"]["spec"]
    return spec


def capabilities(container: Mapping[str, Any]) -> list[str]:
    """What it has, all others being dropped."""
    found = container["securityContext"]["capabilities"]
    assert found["drop"] == ["ALL"]
    return list(found.get("add", []))


def settings(config_map: Mapping[str, Any]) -> dict[str, Any]:
    """phauld.toml of the ConfigMap. Raises TOMLDecodeError."""
    tomllib.loads(config_map["data"]["policy.toml"])
    return tomllib.loads(config_map["data"]["phauld.toml"])


@dataclass(frozen=True)
class Volumes:
    """The volumes of one node's pod, as directories below one of ours."""

    directory: Path

    def fill(self, spec: Mapping[str, Any], config: Mapping[str, str], secret: Mapping[str, bytes]) -> None:
        """Make them. A kind of volume that is not known here is an error."""
        for volume in spec["volumes"]:
            where = self.directory / volume["name"]
            where.mkdir(parents=True)
            match volume:
                case {"emptyDir": _} | {"hostPath": _}:
                    pass
                case {"configMap": {"name": "phauld"}}:
                    for name, text in config.items():
                        (where / name).write_text(text)
                case {"secret": {"secretName": "phauld-tls", "defaultMode": mode}}:
                    for name, content in secret.items():
                        (where / name).write_bytes(content)
                        (where / name).chmod(mode)
                case _:
                    raise AssertionError(f"what is {volume}?")

    def mounts(self, container: Mapping[str, Any]) -> list[dict[str, Any]]:
        """For an OCI runtime; parents before what is below them."""
        found = sorted(container.get("volumeMounts", []), key=lambda each: str(each["mountPath"]))
        return [
            {
                "destination": each["mountPath"],
                "type": "bind",
                "source": str(self.directory / each["name"]),
                "options": ["rbind", "ro" if each.get("readOnly") else "rw"],
            }
            for each in found
        ]


def environment(container: Mapping[str, Any], node_name: str) -> dict[str, str]:
    """Its variables; the node's name is the only thing that is looked up."""
    found = {}
    for each in container.get("env", []):
        assert each["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
        found[each["name"]] = node_name
    return found
