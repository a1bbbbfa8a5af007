"""What a last step that came to nothing has ended as, for who asked for the migration. The tree runs on here."""

from __future__ import annotations

import asyncio

from phaul_client.commit import Event
from phaul_client.errors import MigrationCancelled, RolledBack
from phaul_client.status import reason_of, remedy_of


def ended_as(
    migration_id: str, cause: BaseException, stop_wanted: Event | None, freeze_budget_seconds: float
) -> BaseException:
    """`stop_wanted`: why it was stopped, if it was; otherwise `cause` says it."""
    if stop_wanted is Event.CANCELLED:
        return MigrationCancelled(migration_id)
    if stop_wanted is Event.DEADLINE_PASSED:
        return RolledBack(
            migration_id,
            f"the tree stood still for more than {freeze_budget_seconds:g} s and runs on here",
            reason="DEADLINE_EXCEEDED",
            remedy="a larger --freeze-budget, a faster link, or pre-copy",
        )
    if isinstance(cause, asyncio.CancelledError):
        return cause
    return RolledBack(migration_id, str(cause), reason=reason_of(cause), remedy=remedy_of(cause))
