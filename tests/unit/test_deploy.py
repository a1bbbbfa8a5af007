"""The files of deploy/ say what the code does."""

import configparser
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Final

from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

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


def test_grafana_knows_all_that_the_dashboard_says() -> None:
    """Read by Grafana's own types and written again nothing is lost: a word that Grafana does not know would be."""
    plugins.register_default_plugins()
    said = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    assert _lost(said, _by_grafana(said)) == []
    said["panels"][0]["titel"] = "In doubt"
    assert _lost(said, _by_grafana(said)) == ["/panels/0/titel"]


def _by_grafana(said: Any) -> Any:
    return json.loads(json.dumps(Dashboard.from_json(said), cls=JSONEncoder))


def _lost(said: Any, kept: Any, path: str = "") -> list[str]:
    if isinstance(said, dict) and isinstance(kept, dict):
        return [each for key in said for each in _lost(said[key], kept.get(key), f"{path}/{key}")]
    if isinstance(said, list) and isinstance(kept, list) and len(said) == len(kept):
        return [each for number in range(len(said)) for each in _lost(said[number], kept[number], f"{path}/{number}")]
    return [] if said == kept else [path]


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]
    places = [each["gridPos"] for each in panels]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({each["id"] for each in panels}) == len(panels)


def test_the_unit_ends_phauld_alone_and_does_not_restart_a_wrong_configuration() -> None:
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys have capitals
    unit.read(DEPLOY / "phauld.service")
    service = unit["Service"]
    assert service["KillMode"] == "process"
    assert service["RestartPreventExitStatus"].split() == ["2", str(EXIT_CONFIGURATION)]
    directories = {"/run/": "RuntimeDirectory", "/var/lib/": "StateDirectory", "/var/log/": "LogsDirectory"}
    default = Config()
    for path in (default.unix.parent, default.state_dir, default.log_dir):
        assert str(path) in {f"{parent}{service[key]}" for parent, key in directories.items()}
