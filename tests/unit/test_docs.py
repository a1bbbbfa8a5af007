"""The pages say what is there: links lead somewhere, modules exist, and every reason and setting is explained."""

import dataclasses
import re
from pathlib import Path
from typing import Final

import pytest

from phaul.v1 import types_pb2
from phauld.config import Config

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def first_cells(page: str) -> set[str]:
    """Every word in backticks in the first column of a page's tables."""
    rows = re.findall(r"^\|([^|]*)\|", (ROOT / page).read_text(), re.MULTILINE)
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_reason_is_explained_and_no_other() -> None:
    known = {name.removeprefix("ERROR_REASON_") for name in types_pb2.ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118 - not a dict
    assert {each for each in first_cells("docs/operations.md") if each.isupper() and "." not in each} == known


def test_every_setting_is_explained_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)`(?:, `\w+`)? \| `([^`]+)` \|", (ROOT / "docs/operations.md").read_text(), re.M))
    explained = first_cells("docs/operations.md")
    for field in dataclasses.fields(Config):
        assert field.name in explained
        if field.name in rows:
            default = getattr(Config(), field.name)
            assert rows[field.name] == (
                str(default).lower()
                if isinstance(default, bool)
                else f"{default:g}"
                if isinstance(default, float)
                else str(default)
            ), field.name


def test_every_module_of_the_architecture_exists() -> None:
    missing = [each for each in first_cells("docs/architecture.md") if "/" in each and not (ROOT / each).exists()]
    assert missing == []


def test_every_name_of_the_api_in_the_terms_exists() -> None:
    api = (ROOT / "docs/api.md").read_text()
    cells = re.findall(r"^\|[^|]+\|[^|]+\|([^|]*)\|$", (ROOT / "docs/terms.md").read_text(), re.MULTILINE)
    for name in {part for cell in cells for word in re.findall(r"`([^`]+)`", cell) for part in word.split(".")}:
        assert name in api, name
