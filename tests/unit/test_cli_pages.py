"""What the command line tells about itself: manual pages and completion."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from phaul_client.cli import man
from phaul_client.cli.app import main, phaul

PAGES = dict(man.pages(phaul, "0.1.0"))


def test_every_command_has_a_page_and_every_option_is_in_it() -> None:
    assert set(PAGES) == {"phaul.1", *(f"phaul-{name}.1" for name in phaul.commands)}
    for name, command in phaul.commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert man.roff(parameter.opts[-1]) in PAGES[f"phaul-{name}.1"], name


def test_no_text_is_taken_for_a_request() -> None:
    assert man.roff(".so /etc/passwd\n'x\\fB") == "\\&.so /etc/passwd\n\\&'x\\efB"


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("name", sorted(PAGES))
def test_groff_has_nothing_to_say_against_it(name: str) -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-Kutf8", "-ww", "-z"], input=PAGES[name], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_a_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_PHAUL_COMPLETE={shell}_complete" in script
    assert main(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shell": shell, "script": script[:-1]}


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_a_comma_does_not_end_a_help_text_in_fish(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 0
    script = capsys.readouterr().out
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    asked = f"{script}\ncomplete -C 'phaul migrate x --mode'\ncomplete -C 'phaul migrate x --move-a'"
    done = subprocess.run(["fish", "-c", asked], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert "Move this address of the node along, to IFACE there" in done.stdout
