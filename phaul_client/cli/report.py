"""The report of one migration as a single HTML page that needs nothing else (pure)."""

import html
import math
from collections.abc import Iterable, Sequence
from string import Template
from typing import Final

from google.protobuf import duration_pb2

from phaul.v1 import types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli import render
from phaul_client.cli.text import duration
from phaul_client.cli.units import format_bytes

_WIDTH: Final = 860
_LABELS: Final = 190
_ROW: Final = 26
_COLOURS: Final = ("c0", "c1")

_PAGE: Final = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>phaul: $title</title>
<style>
 :root { color-scheme: light dark; --fg: #1f2937; --bg: #fff; --quiet: #6b7280; --line: #e5e7eb; --box: #f3f4f6;
  --c0: #2563eb; --c1: #d97706 }
 @media (prefers-color-scheme: dark) { :root { --fg: #e3e8ef; --bg: #10151c; --quiet: #93a0b2; --line: #2a3441;
  --box: #18202a; --c0: #6aa2ff; --c1: #f0a050 } }
 body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em;
  color: var(--fg); background: var(--bg); overflow-wrap: anywhere }
 h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 1.8em }
 table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .2em .8em .2em 0 }
 tr { border-bottom: 1px solid var(--line) } th { color: var(--quiet); font-weight: normal; white-space: nowrap }
 .wide { overflow-x: auto } .wide td { overflow-wrap: normal } .wide svg { min-width: 620px }
 .summary { background: var(--box); padding: 1em; font-family: ui-monospace, "DejaVu Sans Mono", monospace }
 .summary div { white-space: pre-wrap; padding-left: 12ch; text-indent: -12ch }
 .summary div:first-child { font-weight: 600 }
 svg { width: 100%; height: auto; fill: var(--fg) } svg .quiet { fill: var(--quiet) } svg line { stroke: var(--line) }
 .c0 { fill: var(--c0); background: var(--c0) } .c1 { fill: var(--c1); background: var(--c1) }
 .key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em }
</style></head><body>
<h1>$title</h1>
<div class="summary">$summary</div>
<h2>The freeze, step by step</h2>
<p>Milliseconds from the start of the freeze, both nodes on the source's clock. $key</p>
<div class="wide">$picture</div>
<h2>Rounds</h2>
<div class="wide">$rounds</div>
<h2>What preflight found</h2>
<div class="wide">$problems</div>
</body></html>
""")


def report_page(migration: Migration) -> str:
    """The whole page."""
    nodes = tuple(dict.fromkeys(step.node_name for step in migration.timeline))
    key = "".join(f'<span class="key {_colour(nodes, node)}"></span>{html.escape(node)}' for node in nodes)
    return _PAGE.substitute(
        title=html.escape(f"{render.subject(migration)} to {render.destination(migration)}"),
        summary="".join(f"<div>{html.escape(line)}</div>" for line in render.summary(migration).splitlines()),
        key=key,
        picture=timeline_picture(migration.timeline, nodes) if migration.timeline else "<p>It did not freeze.</p>",
        rounds=_rounds(migration.rounds),
        problems=_problems(migration.problems),
    )


def timeline_picture(steps: Sequence[types_pb2.TimelineStep], nodes: Sequence[str]) -> str:
    """A bar for each step, as SVG."""
    origin = min(_milliseconds(step.start) for step in steps)
    end = max(*(_milliseconds(step.end) - origin for step in steps), 1.0)
    scale = (_WIDTH - _LABELS - 60) / end
    height = _ROW * (len(steps) + 1)
    rows = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" font-size="13" xmlns="http://www.w3.org/2000/svg">']
    for value in ticks(end):
        x = _LABELS + value * scale
        rows.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - _ROW}"/>')
        rows.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle" class="quiet">{value:g}</text>')
    for number, step in enumerate(steps):
        start = _milliseconds(step.start) - origin
        length = max(0.0, _milliseconds(step.end) - _milliseconds(step.start))  # one that goes on has no end yet
        x, y, width = _LABELS + start * scale, number * _ROW, max(length * scale, 1.5)
        colour = _colour(nodes, step.node_name)
        rows.append(f'<text x="{_LABELS - 8}" y="{y + 17}" text-anchor="end">{html.escape(step.name)}</text>')
        rows.append(f'<rect x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="{_ROW - 8}" rx="2" class="{colour}"/>')
        rows.append(f'<text x="{x + width + 5:.1f}" y="{y + 17}" class="quiet">{length:.1f}</text>')
    return "\n".join([*rows, "</svg>"])


def ticks(end: float) -> list[float]:
    """Round numbers from 0 to `end`: 4 to 10 of them."""
    power = 10.0 ** math.floor(math.log10(end / 4))
    step = max(factor * power for factor in (1, 2, 5) if factor * power <= end / 4)
    return [number * step for number in range(int(end / step) + 1)]


def _rounds(rounds: Iterable[types_pb2.RoundStats]) -> str:
    return _table(
        ("round", "pages written", "skipped", "sent", "took", "frozen", "expected pause"),
        [
            (
                f"{each.index}{' (last)' if each.final else ''}",
                f"{each.pages_written:,}",
                f"{each.pages_skipped_parent:,}",
                format_bytes(each.bytes_sent),
                duration(each.duration),
                duration(each.frozen),
                duration(each.expected_pause) if each.HasField("expected_pause") else "",
            )
            for each in rounds
        ],
    )


def _problems(problems: Iterable[types_pb2.Problem]) -> str:
    rows = [(each.code, each.node_name, each.subject, each.message, each.remedy) for each in problems]
    return _table(("code", "node", "what", "why", "remedy"), rows) if rows else "<p>Nothing.</p>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>{body}</table>"


def _colour(nodes: Sequence[str], node: str) -> str:
    return _COLOURS[nodes.index(node) % len(_COLOURS)]


def _milliseconds(message: duration_pb2.Duration) -> float:
    return message.ToMicroseconds() / 1000
