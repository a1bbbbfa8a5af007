"""phauld's configuration: what wins over what, and that every refusal names the place."""

import dataclasses
from pathlib import Path
from typing import get_type_hints

import pytest

from phaul_client.errors import InvalidRequest
from phauld.__main__ import _parser
from phauld.config import DEFAULT_PORT, Config, load_config

NO_ENVIRONMENT: dict[str, str] = {}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "phauld.toml"


def test_defaults_need_nothing() -> None:
    config = load_config(None, NO_ENVIRONMENT)
    assert config == Config()
    assert config.address == ("127.0.0.1", DEFAULT_PORT)


def test_flags_win_over_variables_and_variables_over_the_file(file: Path) -> None:
    file.write_text('node_name = "file"\nmax_incoming = 1\nlease_seconds = 1\nlog_level = "debug"\n')
    environment = {"PHAULD_NODE_NAME": "variable", "PHAULD_MAX_INCOMING": "2", "PHAULD_CONFIG": str(file), "HOME": "/"}
    config = load_config(file, environment, {"node_name": "flag", "max_incoming": None})
    assert (config.node_name, config.max_incoming, config.lease_seconds, config.log_level) == ("flag", 2, 1.0, "debug")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_every_setting_is_a_flag_a_variable_and_a_key(file: Path, name: str) -> None:
    kind, default = get_type_hints(Config)[name], getattr(Config(), name)
    by_kind = {bool: str(not default).lower(), int: "5", float: "5"}
    chosen = {"listen": "127.0.0.1:1", "http_listen": "127.0.0.1:2", "log_level": "error", "log_format": "json"} | {
        "otlp_endpoint": "http://c:1"
    }
    chosen |= {"socket_group": "daemon", "otlp_endpoint": "http://c:1"}
    text = chosen.get(name) or by_kind.get(kind, f"/x/{name}")
    flag = f"--{name.replace('_', '-')}"
    action = next(each for each in _parser()._actions if flag in each.option_strings)
    flags = vars(_parser().parse_args([flag] if action.nargs == 0 else [flag, text]))
    del flags["config"]
    file.write_text(f"{name} = {text if kind in by_kind else repr(text)}\n")
    by_file = load_config(file, NO_ENVIRONMENT)
    assert by_file != Config()
    assert by_file == load_config(None, {f"PHAULD_{name.upper()}": text}) == load_config(None, NO_ENVIRONMENT, flags)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("max_incoming = 0", "0 is not above 0"),
        ("max_incoming = -3", "is not above 0"),
        ("max_incoming = 1.5", "1.5 is not a whole number"),
        ('max_incoming = "many"', "'many' is not a whole number"),
        ("max_incoming = true", "True is not a whole number"),
        ("max_incoming = [1]", r"\[1\] is not a whole number"),
        ("lease_seconds = 'soon'", "'soon' is not a number"),
        ("lease_seconds = nan", "is not a number"),
        ("lease_seconds = inf", "is not a number"),
        ("lease_seconds = 0.0", "is not above 0"),
        ("data_port = 65536", "65536 is not a port"),
        ("data_port = -1", "-1 is not a port"),
        ("insecure = 2", "2 is neither true nor false"),
        ("insecure = 'maybe'", "'maybe' is neither true nor false"),
        ("state_dir = 'here'", "'here' is not an absolute path"),
        ("unix = ''", "'' is not an absolute path"),
        ("criu = 7", "7 is not text"),
        ("node_name = 7", "7 is not text"),
        ("log_level = 'loud'", "none of debug, info, warning, error"),
        ("listen = '7707'", "is not HOST:PORT"),
        ("listen = '127.0.0.1:port'", "is not HOST:PORT"),
        ("listen = '127.0.0.1:70000'", "is not HOST:PORT"),
        ("listen = ':7707'", "is not HOST:PORT"),
        ("listen = '0.0.0.0:7707'", "reaches beyond this machine"),
        ("listen = '[::]:7707'", "reaches beyond this machine"),
        ("listen = '127.example.org:7707'", "reaches beyond this machine"),
        ("lissten = '127.0.0.1:7707'", "'lissten' is unknown"),
        ("[tls]\nfile = 'x'", "'tls' is unknown"),
    ],
)
def test_an_error_in_the_file_names_its_line(file: Path, line: str, says: str) -> None:
    file.write_text(f"# a comment\n\n{line}\n")
    with pytest.raises(InvalidRequest, match=says) as refused:
        load_config(file, NO_ENVIRONMENT)
    assert f"{file}, line 3" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_incoming", "0"),
        ("lease_seconds", "nan"),
        ("data_port", "70000"),
        ("listen", "everywhere"),
        ("listen", "0.0.0.0:1"),
        ("log_level", "loud"),
        ("insecure", "maybe"),
        ("state_dir", "here"),
    ],
)
def test_an_error_in_a_variable_or_a_flag_names_it(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=f"environment variable PHAULD_{name.upper()}: "):
        load_config(None, {f"PHAULD_{name.upper()}": value})
    with pytest.raises(InvalidRequest, match=f"--{name.replace('_', '-')}: "):
        load_config(None, NO_ENVIRONMENT, {name: value})


def test_the_place_is_that_of_the_value_that_won(file: Path) -> None:
    file.write_text("max_incoming = 5\n")
    with pytest.raises(InvalidRequest, match="environment variable PHAULD_MAX_INCOMING"):
        load_config(file, {"PHAULD_MAX_INCOMING": "0"})


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="PHAULD_LISTENN: 'listenn' is unknown") as refused:
        load_config(None, {"PHAULD_LISTENN": "x"})
    assert "listen" in refused.value.remedy


def test_a_file_that_is_not_there_or_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"none\.toml: No such file"):
        load_config(tmp_path / "none.toml", NO_ENVIRONMENT)
    with pytest.raises(InvalidRequest, match="Is a directory"):
        load_config(tmp_path, NO_ENVIRONMENT)
    (tmp_path / "bad.toml").write_text("listen = 'a'\nlisten\n")
    with pytest.raises(InvalidRequest, match=r"bad\.toml: .*line 2"):
        load_config(tmp_path / "bad.toml", NO_ENVIRONMENT)
    (tmp_path / "latin.toml").write_bytes(b"node_name = '\xe4'\n")
    with pytest.raises(InvalidRequest, match=r"latin\.toml: "):
        load_config(tmp_path / "latin.toml", NO_ENVIRONMENT)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.3.2.1:1", "localhost:1", "[::1]:1"])
def test_loopback_needs_no_consent(listen: str) -> None:
    assert load_config(None, NO_ENVIRONMENT, {"listen": listen}).listen == listen


@pytest.mark.parametrize(
    ("listen", "address"), [("[::]:77", ("::", 77)), ("0.0.0.0:0", ("0.0.0.0", 0)), ("node-a:9", ("node-a", 9))]
)
def test_beyond_loopback_with_consent(listen: str, address: tuple[str, int]) -> None:
    assert load_config(None, NO_ENVIRONMENT, {"listen": listen, "insecure": "yes"}).address == address


def test_beyond_loopback_with_tls_or_not_at_all() -> None:
    found = load_config(None, NO_ENVIRONMENT, {"listen": "0.0.0.0:7707", "tls_dir": "/etc/phaul/tls"})
    assert not found.insecure
    with pytest.raises(InvalidRequest, match="without TLS") as refused:
        load_config(None, NO_ENVIRONMENT, {"listen": "0.0.0.0:7707"})
    assert "--tls-dir" in refused.value.remedy


def test_the_page_is_not_shown_to_the_network_unless_that_was_said() -> None:
    with pytest.raises(InvalidRequest, match="shows beyond this machine"):
        load_config(None, NO_ENVIRONMENT, {"http_listen": "0.0.0.0:7709"})
    assert load_config(None, NO_ENVIRONMENT, {"http_listen": "0.0.0.0:7709", "insecure": "true"}).http_listen


def test_traces_go_to_an_address() -> None:
    with pytest.raises(
        InvalidRequest, match="--otlp-endpoint: otlp_endpoint: 'localhost:4317' is not http://HOST:PORT"
    ):
        load_config(environment={}, flags={"otlp_endpoint": "localhost:4317"})
    assert load_config(environment={}, flags={"otlp_endpoint": "http://localhost:4317"}).otlp_endpoint


def test_the_socket_goes_to_a_group_that_exists() -> None:
    assert load_config(environment={}, flags={"socket_group": "daemon"}).socket_group == "daemon"
    with pytest.raises(
        InvalidRequest, match="--socket-group: socket_group: there is no group 'no-such-group'"
    ) as refused:
        load_config(environment={}, flags={"socket_group": "no-such-group"})
    assert refused.value.remedy == "groupadd --system no-such-group"


def test_certificates_in_the_standard_directory_are_used_beyond_loopback(tmp_path: Path) -> None:
    there: dict[str, object] = {"listen": "0.0.0.0:7707"}
    with pytest.raises(InvalidRequest, match="without TLS"):
        load_config(None, {}, there, tmp_path)
    (tmp_path / "node.crt").touch()
    assert load_config(None, {}, there, tmp_path).tls_dir == tmp_path
    assert load_config(None, {}, {**there, "insecure": "true"}, tmp_path).tls_dir is None
    assert load_config(None, {}, {**there, "tls_dir": "/elsewhere"}, tmp_path).tls_dir == Path("/elsewhere")
    assert load_config(None, {}, {}, tmp_path).tls_dir is None
