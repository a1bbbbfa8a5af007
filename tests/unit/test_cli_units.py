"""Times, sizes and rates: what people write, and what they read."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul.v1 import types_pb2
from phaul_client.cli.parameters import parse_cpus, parse_restart
from phaul_client.cli.units import (
    format_bytes,
    format_rate,
    format_seconds,
    parse_duration,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300ms", 0.3),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5s", 1.5),
        ("2 min", 120.0),
        ("250us", 0.00025),
        ("1d", 86400.0),
        (" 10S ", 10.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("300", "did you mean 300s or 300ms"),
        ("", "no time with a unit"),
        ("soon", "no time with a unit"),
        ("5m!", "no time with a unit"),
        ("-5s", "no time with a unit"),
        ("5 parsecs", "'parsecs' in '5 parsecs' is none of us, ms"),
        ("0s", "more than 0"),
        ("99999d", "less than ten years"),
        ("1..5s", "no time with a unit"),
    ],
)
def test_durations_that_are_none(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [
        ("100M", 100 << 20),
        ("500KiB/s", 500 << 10),
        ("1G", 1 << 30),
        ("1GB", 10**9),
        ("1Gbit", 125_000_000),
        ("8kbit/s", 1000),
        ("1.5 MB/s", 1_500_000),
        ("4096", 4096),
        ("10b", 10),
    ],
)
def test_rates(text: str, bytes_per_second: int) -> None:
    assert parse_rate(text) == bytes_per_second


@pytest.mark.parametrize("text", ["", "fast", "M", "-1M", "10X", "10ib", "10MM", "10 M B", "0", "0.1", "1bit"])
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"no rate|at least one byte"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1 << 20, "1.0 MiB"),
        (1000 << 20, "1.0 GiB"),
        (999 << 20, "999 MiB"),
        (150 << 30, "150 GiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_bytes_for_people(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text
    assert format_rate(size_bytes) == f"{text}/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0004, "0.4 ms"),
        (0.00996, "10 ms"),
        (0.143, "143 ms"),
        (0.9996, "1.00 s"),
        (2.347, "2.35 s"),
        (9.996, "10.0 s"),
        (59.96, "1 min 0 s"),
        (245, "4 min 5 s"),
        (3 * 3600 + 12 * 60 + 59, "3 h 12 min"),
        (90000, "1 d 1 h"),
        (-0.02, "-20 ms"),
    ],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.floats(min_value=0.001, max_value=1e8))
def test_what_is_written_as_milliseconds_is_read_as_such(milliseconds: float) -> None:
    assert parse_duration(f"{milliseconds:.6f}ms") == pytest.approx(milliseconds / 1000, rel=1e-2)


@given(st.text(max_size=12))
def test_nothing_but_a_value_error(text: str) -> None:
    for parse in (parse_duration, parse_rate):
        with contextlib.suppress(ValueError):
            assert parse(text) > 0


@pytest.mark.parametrize(("text", "size_bytes"), [("64M", 64 << 20), ("1.5GiB", 3 << 29), ("2GB", 2 * 10**9), ("7", 7)])
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "M", "1Gbit", "1M/s", "-1", "1 apple"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "mode", "most"),
    [
        ("no", types_pb2.RESTART_MODE_NO, 0),
        ("always", types_pb2.RESTART_MODE_ALWAYS, 0),
        ("on-failure", types_pb2.RESTART_MODE_ON_FAILURE, 0),
        ("on-failure:5", types_pb2.RESTART_MODE_ON_FAILURE, 5),
    ],
)
def test_restart_policies(text: str, mode: types_pb2.RestartMode.ValueType, most: int) -> None:
    assert parse_restart(text) == types_pb2.RestartPolicy(mode=mode, max_restarts=most)


@pytest.mark.parametrize("text", ["", "yes", "always:3", "on-failure:", "on-failure:0", "on-failure:x"])
def test_what_is_no_restart_policy(text: str) -> None:
    with pytest.raises(ValueError, match="is none of no, on-failure"):
        parse_restart(text)


@pytest.mark.parametrize(("text", "millis"), [("2", 2000), ("0.5", 500), ("0.01", 10)])
def test_processors(text: str, millis: int) -> None:
    assert parse_cpus(text) == millis


@pytest.mark.parametrize("text", ["", "0", "0.001", "nan", "inf", "-1", "two"])
def test_what_is_no_number_of_processors(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of processors"):
        parse_cpus(text)
