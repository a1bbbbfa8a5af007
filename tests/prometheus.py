"""The metrics of a phauld, as Prometheus reads them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from tests.nodes import Node

HTTP: Final = "127.0.0.1:7709"
_FETCH: Final = "import sys, urllib.request; sys.stdout.buffer.write(urllib.request.urlopen(sys.argv[1]).read())"


@dataclass(frozen=True, slots=True)
class Samples:
    """What one look has found."""

    text: str

    def _all(self, name: str) -> list[tuple[dict[str, str], float]]:
        families = text_string_to_metric_families(self.text)
        return [(each.labels, each.value) for family in families for each in family.samples if each.name == name]

    def get(self, name: str, **labels: str) -> float:
        """The sum of those with these labels; 0 if there is none."""
        return sum(value for found, value in self._all(name) if labels.items() <= found.items())

    def values(self, name: str, label: str) -> dict[str, float]:
        """The value for each value of a label."""
        return {found[label]: value for found, value in self._all(name)}

    def labels(self, name: str) -> dict[str, str]:
        """Those of the only sample of this name."""
        ((found, _),) = self._all(name)
        return found


async def scrape(node: Node) -> Samples:
    """Ask the node's phauld, from the node itself."""
    done = await node.run([sys.executable, "-I", "-c", _FETCH, f"http://{HTTP}/metrics"], check=True)
    return Samples(done.stdout)
