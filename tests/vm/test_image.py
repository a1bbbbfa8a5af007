"""Where the image comes from, without building it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.vm import image


def test_another_recipe_is_another_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = image.recipe_hash()
    changed = tmp_path / "requirements.txt"
    shutil.copy(image.REQUIREMENTS, changed)
    monkeypatch.setattr(image, "REQUIREMENTS", changed)
    assert image.recipe_hash() == before
    with changed.open("a") as file:
        file.write("another==1\n")
    assert image.recipe_hash() != before


def test_only_root_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(image.LabMissing, match=r"by root|missing: "):
        image.ensure_image()


def test_half_an_image_is_none(tmp_path: Path) -> None:
    (tmp_path / "root.ext4").touch()
    assert image.find(tmp_path) is None
    (tmp_path / "vmlinuz").touch()
    assert image.find(tmp_path) is not None


def test_archives_of_earlier_recipes_are_kept_for_a_week(tmp_path: Path) -> None:
    old, recent, used, other = (tmp_path / name for name in ("programs-1", "programs-2", "programs-3", "root.ext4"))
    for path in (old, recent, used, other):
        path.touch()
        if path is not recent:
            os.utime(path, (0, 0))
    image.forget_unused("programs-*", used)
    assert sorted(tmp_path.iterdir()) == [recent, used, other]
    assert used.stat().st_mtime > 0
