"""Who may call what: every call has a rule, and a certificate without a right is refused."""

import pytest

from phaul.v1 import migrations_pb2, node_pb2, remote_pb2
from phaul_client.errors import InvalidRequest
from phauld.access import RIGHTS, Right, may_drive, parse_policy, peer_name

POLICY = f"""
revoked = ["{"ab" * 32}"]
[peers.sender]
receive_from = true
[peers.admin]
administer = true
send_to = true
addresses = ["10.0.0.1"]
"""


def test_every_call_has_a_rule() -> None:
    services = [
        each for file in (remote_pb2, migrations_pb2, node_pb2) for each in file.DESCRIPTOR.services_by_name.values()
    ]
    calls = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert set(RIGHTS) == calls


@pytest.mark.parametrize("method", RIGHTS)
def test_matrix(method: str) -> None:
    policy = parse_policy(POLICY)

    def allowed(name: str, fingerprint: str = "cd" * 32) -> bool:
        return not policy.refusal(method, [f"phaul://node/{name}", name], fingerprint)

    right = RIGHTS[method]
    assert allowed("sender") is (right in (Right.KNOWN, Right.RECEIVE_FROM))
    assert allowed("admin") is (right in (Right.KNOWN, Right.ADMINISTER))
    assert not allowed("stranger")
    assert not allowed("admin", "ab" * 32)
    assert policy.refusal(method, ["admin"], "")


def test_unknown_call() -> None:
    assert parse_policy(POLICY).refusal("/phaul.v1.Node/New", ["phaul://node/admin"], "")


def test_names() -> None:
    assert peer_name(["phaul://node/a", "a"]) == "a"
    for sans in (["a"], ["phaul://node/a", "phaul://node/b"], ["phaul://node/a/b"], ["phaul://node/"]):
        assert peer_name(sans) is None


def test_destination() -> None:
    policy = parse_policy(POLICY)
    assert policy.destination("admin") == policy.destination("10.0.0.1") == "admin"
    for host in ("sender", "stranger", "10.0.0.2"):
        with pytest.raises(InvalidRequest) as caught:
            policy.destination(host)
        assert caught.value.reason == "UNAUTHORIZED"


@pytest.mark.parametrize(
    "text", ["x", "peers = 1", "[peers.a]\nodd = true", "[peers.a]\nsend_to = 1", "revoked = ['x']", "odd = 1"]
)
def test_a_policy_with_a_mistake_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_policy(text)


def test_a_session_is_its_owners() -> None:
    assert may_drive("a", "a")
    assert not may_drive("a", "b")
    assert may_drive("a", "")  # root on the unix socket
    assert may_drive("", "b")  # opened without TLS, or by an older phauld
