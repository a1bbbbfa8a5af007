"""What is written into the journal and read from it, each in one statement (pure)."""

from typing import Final

from phaul_client import commit
from phauld import session


def _quoted(phases: frozenset[commit.Phase] | frozenset[session.Phase]) -> str:
    return ", ".join(f"'{phase}'" for phase in sorted(phases))


RECORD_OUTGOING: Final = """
    INSERT INTO outgoing (migration_id, phase, created_at, updated_at, detail)
    VALUES (:migration_id, :phase, :now, :now, :detail)
    ON CONFLICT (migration_id) DO UPDATE
    SET phase = excluded.phase, updated_at = excluded.updated_at, detail = merged(detail, :detail)
"""
RECORD_INCOMING: Final = """
    INSERT INTO incoming (migration_id, phase, source_node_id, created_at, updated_at, detail, failure)
    VALUES (:migration_id, :phase, :source_node_id, :now, :now, json_patch('{}', :detail), :failure)
    ON CONFLICT (migration_id) DO UPDATE
    SET phase = excluded.phase, updated_at = excluded.updated_at, detail = merged(detail, :detail),
        failure = coalesce(excluded.failure, failure)
"""
REPORT: Final = "UPDATE outgoing SET report = :report WHERE migration_id = :migration_id"
CLEANED: Final = "UPDATE incoming SET cleaned = 1 WHERE migration_id = :migration_id"

_OUTGOING: Final = "SELECT migration_id, phase, created_at, updated_at, detail, report FROM outgoing"
_INCOMING: Final = """
    SELECT migration_id, phase, source_node_id, cleaned, created_at, updated_at, detail, failure FROM incoming
"""
_NEWEST_FIRST: Final = "ORDER BY sequence DESC"
ONE_OUTGOING: Final = f"{_OUTGOING} WHERE migration_id = ?"
EVERY_OUTGOING: Final = f"{_OUTGOING} {_NEWEST_FIRST} LIMIT ?"
UNFINISHED_OUTGOING: Final = f"{_OUTGOING} WHERE phase NOT IN ({_quoted(commit.FINAL)}) {_NEWEST_FIRST} LIMIT ?"
ONE_INCOMING: Final = f"{_INCOMING} WHERE migration_id = ?"
UNFINISHED_INCOMING: Final = f"""
    {_INCOMING} WHERE NOT cleaned OR phase NOT IN ({_quoted(session.FINAL)}) {_NEWEST_FIRST}
"""

#: What is left of the detail of a session: whose it is. Whatever is shorter than this is left as it is.
ANSWER_CHARACTERS: Final = 400
DROP_OUTGOING: Final = f"""
    DELETE FROM outgoing WHERE sequence IN (
        SELECT sequence FROM outgoing WHERE phase IN ({_quoted(commit.FINAL)})
        ORDER BY sequence DESC LIMIT :at_most OFFSET :keep
    )
"""
CUT_INCOMING: Final = f"""
    UPDATE incoming
    SET detail = json_patch('{{}}', json_object('owner', json_extract(detail, '$.owner'))), failure = NULL
    WHERE sequence IN (
        SELECT sequence FROM incoming WHERE sequence < (
            SELECT sequence FROM incoming WHERE cleaned AND phase IN ({_quoted(session.FINAL)})
            ORDER BY sequence DESC LIMIT 1 OFFSET :keep - 1
        )
        AND cleaned AND phase IN ({_quoted(session.FINAL)})
        AND length(detail) + length(coalesce(failure, '')) > :answer
        LIMIT :at_most
    )
"""
