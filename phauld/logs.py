"""How phauld's log lines look: text for people, or one JSON object a line for programs.

The lines of phaul are `event key=%s key=%d …`, so the keys and the values that were given are fields of the object.
"""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Final

TEXT_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s %(message)s"
_FIELD: Final = re.compile(r"(?:(\w+)=)?%[-#0 +]*[\d.]*[srdifxg]")
_PLAIN: Final = (str, int, float, bool, type(None))


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, event, message, and a field for each key, always with its type."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _FIELD.split(str(record.msg))[0].strip(" :,"),
            "message": record.getMessage(),
        }
        for key, value in fields(record).items():
            line.setdefault(key, value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a record's message names with `key=%s`; nothing if the message is not of that kind."""
    found = list(_FIELD.finditer(str(record.msg).replace("%%", "")))
    given = record.args if isinstance(record.args, tuple) else ()
    if len(found) != len(given):
        return {}
    pairs = zip(found, given, strict=True)
    return {match[1]: value if type(value) in _PLAIN else str(value) for match, value in pairs if match[1]}


def set_up(level: str, log_format: str) -> None:
    """Log to standard error from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in ("grpc", "asyncio", "aiohttp"):
        logging.getLogger(name).setLevel(logging.WARNING)
