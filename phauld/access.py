"""Which peer may call what (pure): rights of each call, and the policy file.

A peer is the NAME in the one URI `phaul://node/NAME` of its certificate, never an address.
"""

import enum
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from phaul_client.errors import InvalidRequest

URI_PREFIX: Final = "phaul://node/"
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")


class Right(enum.StrEnum):
    """What a peer may be allowed."""

    KNOWN = "known"  #: any peer in the policy
    RECEIVE_FROM = "receive_from"  #: it may send trees to this node
    ADMINISTER = "administer"  #: it may do what root may do here with `phaul`


_REMOTE: Final = (
    *(
        "CheckTree",
        "OpenSession",
        "OpenStream",
        "StartIter",
        "StopIter",
        "PutImages",
        "SyncFiles",
        "PutFiles",
        "Restore",
        "Commit",
        "Abort",
    ),
    *("GetSession", "RenewLease"),
)
_MIGRATIONS: Final = (
    *("StartMigration", "GetMigration", "ListMigrations", "WatchMigration", "CancelMigration", "UpdateMigration"),
    "Resolve",
)
_NODE: Final = (
    *("Doctor", "Preflight", "RunWorkload", "ListWorkloads", "GetWorkload", "WaitWorkload", "StopWorkload"),
    *("RemoveWorkload", "ReadWorkloadLog"),
)
RIGHTS: Final = {
    **{f"/phaul.v1.Remote/{name}": Right.RECEIVE_FROM for name in _REMOTE},
    **{f"/phaul.v1.Migrations/{name}": Right.ADMINISTER for name in _MIGRATIONS},
    **{f"/phaul.v1.Node/{name}": Right.ADMINISTER for name in _NODE},
    "/phaul.v1.Node/GetInfo": Right.KNOWN,
}
#: Services for inspection, by the beginning of their methods' names. channelz tells who is connected from where.
INSPECTION_RIGHTS: Final = {
    "/grpc.health.": Right.KNOWN,
    "/grpc.reflection.": Right.KNOWN,
    "/grpc.channelz.": Right.ADMINISTER,
}


#: Of http_listen. The others show what runs here.
HTTP_RIGHTS: Final = {"/metrics": Right.KNOWN, "/healthz": Right.KNOWN}


def right_for(method: str) -> Right | None:
    """The right that a call needs; `None`: nobody may make it."""
    found = RIGHTS.get(method)
    if found is None:
        found = next((right for prefix, right in INSPECTION_RIGHTS.items() if method.startswith(prefix)), None)
    return found


def may_drive(owner: str, caller: str) -> bool:
    """Whether `caller` may make calls about the session that `owner` opened.

    Without a name: root on the unix socket, or a daemon without TLS, where nobody has one.
    """
    return not caller or not owner or owner == caller


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What the policy says of one peer."""

    receive_from: bool = False
    send_to: bool = False
    administer: bool = False
    addresses: tuple[str, ...] = ()  #: at which its certificate is expected


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The policy file, parsed."""

    peers: dict[str, Peer] = field(default_factory=dict)
    revoked: frozenset[str] = frozenset()  #: SHA-256 of certificates

    def refusal(self, method: str, sans: Iterable[str], fingerprint: str) -> str:
        """Why a peer with this certificate may not make this call; empty: it may."""
        right = right_for(method)
        return f"no rule for {method}" if right is None else self.refusal_of(right, sans, fingerprint)

    def refusal_of(self, right: Right, sans: Iterable[str], fingerprint: str) -> str:
        """Why a peer with this certificate has not this right; empty: it has."""
        if fingerprint in self.revoked:
            return "its certificate is revoked"
        name = peer_name(sans)
        if name is None:
            return f"its certificate has not exactly one URI {URI_PREFIX}NAME"
        peer = self.peers.get(name)
        if peer is None:
            return f"{name} is not in the policy"
        allowed = right is Right.KNOWN or getattr(peer, right)
        return "" if allowed else f"{name} has no right {right}"

    def destination(self, host: str) -> str:
        """The name that the certificate at `host` must have. Raises `InvalidRequest` if we may not send there."""
        name = next((name for name, peer in self.peers.items() if host in (name, *peer.addresses)), None)
        if name is None or not self.peers[name].send_to:
            remedy = "the policy file: [peers.NAME] with send_to = true, and addresses = [...] if it is not called so"
            raise InvalidRequest(f"the policy does not allow to send to {host}", reason="UNAUTHORIZED", remedy=remedy)
        return name


def peer_name(sans: Iterable[str]) -> str | None:
    """The node that a certificate with these subject alternative names is of."""
    names = [san.removeprefix(URI_PREFIX) for san in sans if san.startswith(URI_PREFIX)]
    return names[0] if len(names) == 1 and _NAME.fullmatch(names[0]) else None


def parse_policy(text: str) -> Policy:
    """Parse the file. Raises `InvalidRequest`: a policy with an unknown word allows nothing."""
    try:
        table = tomllib.loads(text)
        peers = {name: _peer(name, value) for name, value in table.pop("peers", {}).items()}
        revoked = frozenset(str(each).lower().replace(":", "") for each in table.pop("revoked", []))
        if table:
            raise ValueError(f"{', '.join(table)} is unknown; there are [peers.NAME] and revoked")
        if odd := [each for each in revoked if not _FINGERPRINT.fullmatch(each)]:
            raise ValueError(f"{odd[0]!r} is no SHA-256 of a certificate")
    except (tomllib.TOMLDecodeError, ValueError, TypeError, AttributeError) as exc:
        raise InvalidRequest(f"policy: {exc}") from exc
    return Policy(peers=peers, revoked=revoked)


def _peer(name: str, value: dict[str, Any]) -> Peer:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no node's name")
    addresses = tuple(map(str, value.pop("addresses", ())))
    rights = ("receive_from", "send_to", "administer")
    if unknown := [key for key in value if key not in rights]:
        raise ValueError(f"[peers.{name}]: {unknown[0]} is unknown; there are {', '.join(rights)} and addresses")
    peer = Peer(addresses=addresses, **value)
    for right in rights:
        if not isinstance(getattr(peer, right), bool):
            raise ValueError(f"{name}: {right} is neither true nor false")
    return peer
