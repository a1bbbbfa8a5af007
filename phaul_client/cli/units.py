"""Times, sizes and rates as people write them. Pure.

Sizes follow GNU's habit: `K`, `M`, `G` and `KiB` … count in 1024s, `kB`, `MB`, `GB` and bits (`Mbit`) in 1000s.
"""

import math
import re
from typing import Final

_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)")
_QUANTITY: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)(/s|ps)?")
_PREFIXES: Final = "kmgt"
_LONGEST_SECONDS: Final = 10 * 365 * 86400.0


def parse_duration(text: str) -> float:
    """Seconds of "300ms", "5m" or "1h30m". Raises `ValueError` saying what is wrong."""
    compact = text.strip().lower()
    parts = _DURATION_PART.findall(compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact.replace(" ", ""):
        hint = f"; did you mean {compact}s or {compact}ms?" if compact.replace(".", "", 1).isdigit() else ""
        raise ValueError(f"{text!r} is no time with a unit, such as 300ms, 10s or 1h30m{hint}")
    unknown = [unit for _, unit in parts if unit not in _SECONDS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} in {text!r} is none of {', '.join(_SECONDS)}")
    seconds = math.fsum(float(number) * _SECONDS[unit] for number, unit in parts)
    if not 0 < seconds < _LONGEST_SECONDS:
        raise ValueError(f"{text!r} must be more than 0 and less than ten years")
    return seconds


def parse_rate(text: str) -> int:
    """Bytes per second of "100M" (bytes) or "1Gbit". Raises `ValueError` saying what is wrong."""
    match = _QUANTITY.fullmatch(text.strip())
    factor = _unit_factor(match[2]) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is no rate, such as 100M (bytes a second), 500KiB/s or 1Gbit")
    rate = int(float(match[1]) * factor)
    if rate < 1:
        raise ValueError(f"{text!r} must be at least one byte a second; leave it out for no limit")
    return rate


def parse_size(text: str) -> int:
    """Bytes of "64M" or "1.5GiB". Raises `ValueError` saying what is wrong."""
    match = _QUANTITY.fullmatch(text.strip())
    factor = _unit_factor(match[2]) if match and not match[3] and not match[2].lower().endswith("bit") else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is no size, such as 512M, 64KiB or 2GB")
    return int(float(match[1]) * factor)


def _unit_factor(unit: str) -> float | None:
    """Bytes in a unit; `None` if there is no such unit."""
    lower = unit.lower()
    for suffix, base, scale in (("bit", 1000, 1 / 8), ("ib", 1024, 1.0), ("b", 1000, 1.0), ("", 1024, 1.0)):
        if lower.endswith(suffix):
            prefix = lower.removesuffix(suffix)
            if prefix == "":
                return None if suffix == "ib" else scale
            return base ** (_PREFIXES.index(prefix) + 1) * scale if len(prefix) == 1 and prefix in _PREFIXES else None
    return None


def format_bytes(size_bytes: float) -> str:
    """A size for people: "512 B", "1.5 MiB"."""
    if size_bytes < 1024:
        return f"{size_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size_bytes /= 1024
        if size_bytes < 1000 or unit == "TiB":
            break
    return f"{size_bytes:.1f} {unit}" if size_bytes < 100 else f"{size_bytes:.0f} {unit}"


def format_rate(bytes_per_second: float) -> str:
    """A rate for people: "1.5 MiB/s"."""
    return f"{format_bytes(bytes_per_second)}/s"


def format_seconds(seconds: float) -> str:
    """A time for people, in the unit that suits it: "0.4 ms", "143 ms", "2.35 s", "4 min 5 s", "3 h 12 min"."""
    if seconds < 0:
        return f"-{format_seconds(-seconds)}"
    if seconds < 0.9995:
        milliseconds = seconds * 1000
        return f"{milliseconds:.1f} ms" if 0 < milliseconds < 9.95 else f"{milliseconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    for longer, name, shorter, short_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= longer:
            return f"{whole // longer} {name} {whole % longer // shorter} {short_name}"
    return f"{whole} s"
