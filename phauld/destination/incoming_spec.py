"""What the source said of one incoming migration when it opened the session, or what the journal still says of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from phaul_client.addresses import Address, parse_address
from phaul_client.hooks import Hook, parse_hook
from phaul_criu.requests import RestoreOptions
from phauld.containers.place import ContainerPlace
from phauld.containers.podman_place import place_from_journal
from phauld.destination.page_stream import PipeTerms
from phauld.destination.placement import Promise
from phauld.journal import IncomingEntry
from phauld.trees.restart_policy import NO_ATTEMPTS, Attempts
from phauld.trees.workload_spec import WorkloadSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """What OpenSession said."""

    migration_id: str
    source_node_id: str
    spec: WorkloadSpec
    restore: RestoreOptions  #: everything but descriptors
    carried: tuple[Path, ...]
    lease_seconds: float
    promise: Promise
    place: str = ""  #: of the images, in memory or on disk, and why
    postcopy: bool = False  #: pages may come after the commit
    stands_still: bool = False  #: from its first page on
    addresses: tuple[Address, ...] = ()  #: that move along
    hooks: tuple[Hook, ...] = ()  #: that are told, beside those of this node
    source_name: str = ""
    container: ContainerPlace | None = None
    sync: tuple[str, ...] = ()  #: directories that `--sync` brings
    sync_overwrite: bool = False
    attempts: Attempts = NO_ATTEMPTS  #: how often it was started again so far
    owner: str = ""  #: the name in the certificate that opened it; empty without TLS
    pipe: PipeTerms | None = None  #: between its page stream and the network

    @classmethod
    def unknown(cls, migration_id: str, source_node_id: str = "", owner: str = "") -> Incoming:
        """What is left to say of a session whose opening was never seen, or is long past."""
        return cls(
            migration_id=migration_id,
            source_node_id=source_node_id,
            spec=WorkloadSpec(name=f"moved-{migration_id[:8]}", argv=()),
            restore=RestoreOptions(images_dir_fd=-1),
            carried=(),
            lease_seconds=0,
            promise=Promise(bytes=0, in_memory=False),
            owner=owner,
        )

    @classmethod
    def from_journal(cls, entry: IncomingEntry) -> Incoming:
        """What the journal says of a session of an earlier phauld."""
        known = cls.unknown(entry.migration_id, entry.source_node_id, entry.detail.get("owner", ""))
        if "record" not in entry.detail:
            return known
        return dataclasses.replace(
            known,
            spec=dataclasses.replace(known.spec, name=entry.detail["workload"]),
            carried=tuple(Path(path) for path in entry.detail["carried"]),
            postcopy="relay" in entry.detail,
            addresses=tuple(map(parse_address, entry.detail.get("addresses", ()))),
            hooks=tuple(map(parse_hook, entry.detail.get("hooks", ()))),
            source_name=entry.detail.get("source_name", ""),
            container=place_from_journal(entry.detail["container"]) if entry.detail.get("container") else None,
            sync=tuple(entry.detail.get("sync", ())),
        )
