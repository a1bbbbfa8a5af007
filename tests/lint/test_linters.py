"""The linters, as tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def lint(program: str, *arguments: str | Path) -> None:
    """Run a linter in the checkout; its output is the failure."""
    path = shutil.which(program, path=TOOLS)
    if path is None:
        pytest.skip(f"{program} is not installed: run scripts/setup")
    done = subprocess.run(
        [path, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280
    )
    if done.returncode != 0:
        pytest.fail(done.stdout, pytrace=False)


def test_ruff_check() -> None:
    lint("ruff", "check")


def test_ruff_format() -> None:
    lint("ruff", "format", "--check", "--diff")


@pytest.mark.timeout(300)
def test_mypy() -> None:
    lint("mypy")


def shell_scripts() -> list[Path]:
    """Files that are tracked by git, or new and not ignored, and start with a shell's `#!`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return sorted(path for path in paths if path.is_file() and is_shell(path))


def is_shell(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(100)
    return first.startswith(b"#!") and first.split()[-1].split(b"/")[-1] in {b"sh", b"bash", b"dash"}


def test_shellcheck() -> None:
    scripts = shell_scripts()
    assert ROOT / "scripts" / "setup" in scripts
    lint("shellcheck", *scripts)
