"""Log lines as objects; and what nobody asked for is not even imported."""

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from phauld.logs import JsonFormatter


def line(message: str, *arguments: object, exc_info: Any = None) -> dict[str, Any]:
    record = logging.LogRecord("phauld.x", logging.WARNING, __file__, 1, message, arguments, exc_info)
    made: dict[str, Any] = json.loads(JsonFormatter().format(record))
    return made


def test_keys_become_fields_with_their_types() -> None:
    made = line("moved migration_id=%s pid=%d pause_ms=%.1f to=%r", "abc", 7, 12.34, "b")
    assert made["event"] == "moved"
    assert (made["migration_id"], made["pid"], made["pause_ms"], made["to"]) == ("abc", 7, 12.34, "b")
    assert made["message"] == "moved migration_id=abc pid=7 pause_ms=12.3 to='b'"
    assert (made["level"], made["logger"]) == ("warning", "phauld.x")


@pytest.mark.parametrize("text", ["plain", "a\nb", '{"x": 1}', "100 %"])
def test_a_line_without_keys_is_one_line_all_the_same(text: str) -> None:
    assert line(text)["message"] == text


def test_no_key_replaces_what_every_line_has() -> None:
    made = line("it level=%s message=%s", "x", "y")
    assert (made["level"], made["message"]) == ("warning", "it level=x message=y")


def test_a_traceback_stays_in_its_line() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        assert "ValueError: no" in line("failed method=%s", "m", exc_info=sys.exc_info())["exception"]


def test_without_its_setting_nothing_of_http_metrics_and_traces_is_imported() -> None:
    program = "import sys, phauld.server; print({n.split('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "phauld" in done.stdout
    assert not [each for each in ("aiohttp", "prometheus_client", "opentelemetry") if f"'{each}'" in done.stdout]
