"""scripts/workloads-table: what it makes of a report, and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from tests.workloads.titles import MODES, PAGE, TABLES, TITLES, has_cell

SCRIPT: Final = Path(__file__).parents[2] / "scripts/workloads-table"
HEAD: Final = "# Workloads\n"
TAIL: Final = "\nThe end.\n"


def page(directory: Path) -> Path:
    text = HEAD + "".join(f"{begin}old {name}\n{end}" for name, (begin, end) in TABLES.items()) + TAIL
    path = directory / "workloads.md"
    path.write_text(text)
    return path


def write(path: Path, *reports: dict[str, Any]) -> str:
    files = [path.with_suffix(f".{number}.json") for number in range(len(reports))]
    for file, report in zip(files, reports, strict=True):
        file.write_text(json.dumps(report))
    environment = {**os.environ, "PHAUL_WORKLOADS_PAGE": str(path)}
    subprocess.run([sys.executable, SCRIPT, *files], env=environment, check=True, timeout=60)
    return path.read_text()


def row(workload: str, mode: str, gap: float, pause: float) -> dict[str, object]:
    return {"workload": workload, "mode": mode, "client_gap_ms": gap, "pause_ms": pause}


def test_the_rows_are_in_order_and_the_last_value_counts(tmp_path: Path) -> None:
    rows = [row("nginx", "lazy", 10.4, 9.6), row("redis", "eager", 1, 1), row("redis", "eager", 2.5, 1.5)]
    text = write(page(tmp_path), {"workloads": rows, "more": 1})
    table = text.partition(TABLES["workloads"][0])[2].partition(TABLES["workloads"][1])[0]
    assert table.strip().splitlines() == [
        "| workload | its client | stop-copy, eager | stop-copy, lazy | post-copy |",
        "|---|---|--:|--:|--:|",
        f"| redis | {TITLES['redis'][1]} | 2 (2) | - | - |",
        f"| {TITLES['nginx'][0]} | {TITLES['nginx'][1]} | - | 10 (10) | - |",
    ]
    assert text.startswith(HEAD)
    assert text.endswith(TAIL)
    assert "old lab_workloads" in text
    assert has_cell(text, "workloads", "redis", "eager")
    assert not has_cell(text, "workloads", "redis", "lazy")
    assert not has_cell(text, "workloads", "jvm", "lazy")


def test_several_reports_and_writing_it_again(tmp_path: Path) -> None:
    path = page(tmp_path)
    reports = ({"workloads": [row("go", "eager", 1, 1)]}, {"lab_workloads": [row("redis", "hybrid", 1, 1)]})
    text = write(path, *reports)
    assert write(path, *reports) == text
    assert has_cell(text, "lab_workloads", "redis", "hybrid")
    assert "old" not in text


def test_a_page_without_the_table_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "workloads.md"
    path.write_text(HEAD)
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"workloads": [row("go", "eager", 1, 1)]}))
    environment = {**os.environ, "PHAUL_WORKLOADS_PAGE": str(path)}
    done = subprocess.run([sys.executable, SCRIPT, file], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert path.read_text() == HEAD


def test_the_page_has_the_tables() -> None:
    text = PAGE.read_text()
    for name, (begin, end) in TABLES.items():
        head = " | ".join(MODES[name].values())
        assert head in text.partition(begin)[2].partition(end)[0], name
