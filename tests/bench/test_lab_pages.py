"""How fast pages travel between the lab's two guests: in clear, under the kernels' TLS, and under that of page pipes.

    ./check bench -k lab_pages

Only their kernels can do TLS. Their processors are emulated, one each: a ratio says more than a figure, and a cipher
costs more here than on a real processor, which has instructions for it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.vm.image import LabMissing
from tests.vm.lab import Lab, open_lab
from tests.vm.scenarios import TLS, give_certificates, move_a_writer, ready, restart_phaulds

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

MIB: Final = 128
#: Of each: what phauld is started with, and what the move's status says of the pages.
VARIANTS: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "in clear": ((), "as criu sends them"),
    "TLS by the kernels": (TLS, "TLS by the kernels"),
    "TLS by page pipes": ((*TLS, "--kernel-tls", "false"), "checksums, TLS"),
}


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    try:
        async with open_lab() as lab:
            await give_certificates(lab, tmp_path)
            await ready(lab, bytes_per_second=None)
            yield lab
    except LabMissing as exc:
        pytest.skip(str(exc))


async def test_lab_pages(lab: Lab, json_report: dict[str, Any], quick: bool) -> None:
    """Each variant in turn, the order turned each time."""
    speeds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    names = list(VARIANTS)
    for number in range(1 if quick else 3):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            speeds[name].append(await _speed(lab, *VARIANTS[name]))
            sys.stdout.write(f"\nlab, {name}: {speeds[name][-1] / 1e6:.0f} MB/s")
    clear = speeds["in clear"]
    for name, values in speeds.items():
        ratio = statistics.median(one / other for one, other in zip(values, clear, strict=True))
        row = {"link": f"lab ({lab.accelerator})", "variant": name, "mib": MIB, "bytes_per_second": values}
        json_report.setdefault("pages", []).append({**row, "wire_share": 1.0, "of_clear": ratio})
        sys.stdout.write(f"\nlab, {MIB} MiB, {name}: {statistics.median(values) / 1e6:.0f} MB/s, {ratio:.2f} of clear")
    sys.stdout.write("\n")


async def _speed(lab: Lab, arguments: tuple[str, ...], page_stream: str) -> float:
    await restart_phaulds(lab, *arguments, insecure=not arguments)
    found = await move_a_writer(lab, MIB, "STOP_COPY")
    assert found.done, found.record
    assert found.record["page_stream"] == page_stream
    return float(found.rounds[-1]["bandwidth_bytes_per_second"])
