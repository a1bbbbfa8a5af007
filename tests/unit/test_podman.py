"""What podman says of a container, and what of it cannot move."""

import tomllib
from typing import Any

import pytest

from phaul_client.containers.podman import facts, toml


def inspected(**more: Any) -> dict[str, Any]:
    """As podman 4.3 says it, shortened."""
    found: dict[str, Any] = {
        "Id": "a" * 64,
        "Name": "web",
        "OCIRuntime": "runc",
        "ImageName": "localhost/web:1",
        "StaticDir": "/var/lib/containers/storage/overlay-containers/aa/userdata",
        "PidFile": "/run/containers/storage/overlay-containers/aa/userdata/pidfile",
        "Pod": "",
        "Dependencies": [],
        "ExecIDs": [],
        "Mounts": [{"Type": "bind"}],
        "Config": {"Tty": False, "OpenStdin": False},
        "NetworkSettings": {"SandboxKey": "/run/netns/netns-1", "Networks": {"lan": {}}},
        "HostConfig": {
            "RestartPolicy": {"Name": ""},
            "AutoRemove": False,
            "IpcMode": "shareable",
            "NetworkMode": "bridge",
            "LogConfig": {"Type": "k8s-file", "Path": "/log"},
        },
    }
    for path, value in more.items():
        *parents, last = path.split("__")
        where = found
        for each in parents:
            where = where[each]
        where[last] = value
    return found


def test_one_that_moves() -> None:
    found = facts(inspected())
    assert found.why_not is None
    assert (found.networks, found.has_network, str(found.log_path)) == (("lan",), True, "/log")
    alone = facts(inspected(NetworkSettings={"SandboxKey": "", "Networks": {}}, HostConfig__NetworkMode="none"))
    assert (alone.why_not, alone.has_network) == (None, False)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("HostConfig__RestartPolicy", {"Name": "always"}, "restart policy"),
        ("HostConfig__AutoRemove", True, "--rm"),
        ("Pod", "pod", "pod"),
        ("Dependencies", ["b"], "depends"),
        ("Config__OpenStdin", True, "standard input"),
        ("Config__Healthcheck", {"Test": ["CMD", "true"]}, "health check"),
        ("Mounts", [{"Type": "volume"}], "volume that podman keeps"),
        ("ExecIDs", ["1"], "podman exec"),
        ("HostConfig__IpcMode", "host", "--ipc"),
        ("HostConfig__LogConfig", {"Type": "passthrough", "Path": ""}, "--log-driver"),
        ("NetworkSettings", {"SandboxKey": "", "Networks": {}}, "network"),
        ("OCIRuntime", "/usr/bin/kata", "runtime"),
    ],
)
def test_one_that_does_not(path: str, value: object, why: str) -> None:
    found = facts(inspected(**{path: value}))
    assert found.why_not is not None
    assert why in found.why_not[0]


def test_a_configuration_is_written_as_it_was_read() -> None:
    known = {"engine": {"runtime": "runc", "runtimes": {"a.b": ["/x y", 'q"']}, "n": 3}, "containers": {"init": True}}
    assert tomllib.loads("\n".join(toml(known))) == known
