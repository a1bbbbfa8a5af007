"""The files of deploy/ say what the code does."""

import configparser
import dataclasses
import re
from pathlib import Path
from typing import Final

from phauld.__main__ import EXIT_CONFIGURATION
from phauld.config import Config, load_config

DEPLOY: Final = Path(__file__).resolve().parents[2] / "deploy"
#: Their defaults differ from node to node, so the sample has examples.
EXAMPLES: Final = {"node_name", "criu", "tls_dir"}


def test_the_sample_has_every_setting_once_with_its_default(tmp_path: Path) -> None:
    settings = re.findall(r"^#(\w+) = (.*)$", (DEPLOY / "phauld.toml").read_text(), re.MULTILINE)
    assert sorted(key for key, _ in settings) == sorted(field.name for field in dataclasses.fields(Config))
    file = tmp_path / "phauld.toml"
    file.write_text("".join(f"{key} = {value}\n" for key, value in settings))
    said, default = load_config(file, {}), Config()
    for key, _ in settings:
        if key not in EXAMPLES:
            assert getattr(said, key) == getattr(default, key), key


def test_the_sample_as_it_is_is_the_default() -> None:
    assert load_config(DEPLOY / "phauld.toml", {}) == Config()


def test_the_unit_ends_phauld_alone_and_does_not_restart_a_wrong_configuration() -> None:
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys have capitals
    unit.read(DEPLOY / "phauld.service")
    service = unit["Service"]
    assert service["KillMode"] == "process"
    assert service["RestartPreventExitStatus"] == str(EXIT_CONFIGURATION)
    directories = {"/run/": "RuntimeDirectory", "/var/lib/": "StateDirectory", "/var/log/": "LogsDirectory"}
    default = Config()
    for path in (default.unix.parent, default.state_dir, default.log_dir):
        assert str(path) in {f"{parent}{service[key]}" for parent, key in directories.items()}
