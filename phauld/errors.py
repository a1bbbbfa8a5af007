"""The daemon's errors are the library's: one tree, drawn in `phaul_client.errors`."""

from __future__ import annotations

from phaul_client.errors import (
    InvalidRequest,
    MigrationCancelled,
    MigrationFailed,
    MigrationNotFound,
    OutcomeUnknown,
    PeerError,
    PeerRefused,
    PeerUnavailable,
    PhaseError,
    PhaulError,
    PreflightRefused,
    RemoteProtocolError,
    RolledBack,
)

__all__ = [
    "InvalidRequest",
    "MigrationCancelled",
    "MigrationFailed",
    "MigrationNotFound",
    "OutcomeUnknown",
    "PeerError",
    "PeerRefused",
    "PeerUnavailable",
    "PhaseError",
    "PhaulError",
    "PreflightRefused",
    "RemoteProtocolError",
    "RolledBack",
]
