"""phauld's configuration: a TOML file, then the environment, then flags, each over the one before.

Bad configuration is refused as a whole with the place and the reason; nothing is half configured.
"""

import dataclasses
import grp
import ipaddress
import math
import os
import re
import socket
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from phaul_client.errors import InvalidRequest
from phaul_client.tls import CERTIFICATE_FILE

ENVIRONMENT_PREFIX: Final = "PHAULD_"
DEFAULT_PORT: Final = 7707
DEFAULT_DATA_PORT: Final = 7708
STANDARD_TLS_DIR: Final = Path("/etc/phaul/tls")
MAX_HOOK_SECONDS: Final = 8.0  #: less than a call of the other node waits for


class BadSetting(InvalidRequest):
    """A setting has a value that cannot be meant.

    Attributes:
        setting: which one, as it is called in the file.
    """

    def __init__(self, setting: str, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{setting}: {message}", remedy=remedy)
        self.setting = setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What one phauld is told. Each field is a key of the file, `PHAULD_<FIELD>` in the environment, and a flag."""

    listen: str = f"127.0.0.1:{DEFAULT_PORT}"  #: HOST:PORT of the gRPC server; port 0 chooses a free one
    unix: Path = Path("/run/phaul/phauld.sock")  #: the local gRPC socket, mode 0660
    data_port: int = DEFAULT_DATA_PORT  #: port of the page streams, on the host of `listen`; 0 chooses a free one
    state_dir: Path = Path("/var/lib/phaul")  #: what must survive a reboot: workloads, records
    images_dir: Path = Path("/var/lib/phaul/images")  #: images of migrations under way, where memory has no room
    images_in_memory: bool = True  #: put them into memory_images_dir when they fit
    memory_images_dir: Path = Path("/dev/shm/phaul")  #: on tmpfs
    log_dir: Path = Path("/var/log/phaul")  #: the output of workloads
    socket_group: str = ""  #: whose members may do everything through the unix socket; empty: root's group
    node_name: str = field(default_factory=socket.gethostname)  #: how people call this node
    criu: Path | None = None  #: the criu binary; found by itself when not given
    tls_dir: Path | None = None  #: ca.crt, node.crt, node.key, policy.toml: mutual TLS, gRPC's and the pages'
    kernel_tls: bool = True  #: leave the TLS of pages to the kernel where it can; see docs/security.md
    insecure: bool = False  #: serve the network in clear: everything, or with TLS the pages of older peers only
    log_level: str = "info"  #: debug, info, warning or error
    log_format: str = "text"  #: text for people, or json: one object a line
    otlp_endpoint: str = ""  #: where traces are sent by OTLP over gRPC; empty: none are made
    http_listen: str = ""  #: HOST:PORT of the page, /metrics and /healthz; HTTPS beyond loopback with tls_dir
    lease_seconds: float = 30.0  #: an incoming migration whose source is silent for so long is aborted
    hooks_dir: Path = Path("/etc/phaul/hooks.d")  #: programs that are called when a tree leaves or comes
    hook_seconds: float = 4.0  #: all hooks of a phase together
    sync_roots: tuple[Path, ...] = ()  #: what `--sync` of other nodes may write here: these directories, and below
    max_incoming: int = 16  #: incoming migrations at a time
    max_outgoing: int = 16  #: outgoing migrations at a time
    journal_keep: int = 1000  #: finished migrations that the journal keeps, of each direction

    def __post_init__(self) -> None:
        host, _ = self.address
        if not self.insecure and not self.tls_dir and not is_loopback(host):
            raise BadSetting(
                "listen",
                f"{self.listen!r} reaches beyond this machine without TLS: anyone there could move processes",
                remedy="listen on loopback, give --tls-dir DIR, or say --insecure on a network that you trust",
            )
        if not self.node_name.strip() or not self.node_name.isprintable():
            raise BadSetting("node_name", f"{self.node_name!r} is no name")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise BadSetting("log_level", f"{self.log_level!r} is none of debug, info, warning, error")
        if self.log_format not in ("text", "json"):
            raise BadSetting("log_format", f"{self.log_format!r} is neither text nor json")
        if self.http_listen:
            self._check_http()
        if self.otlp_endpoint and not re.match(r"https?://[^/]+|unix:.", self.otlp_endpoint):
            raise BadSetting("otlp_endpoint", f"{self.otlp_endpoint!r} is not http://HOST:PORT, https:// or unix:PATH")
        if self.socket_group:
            self._check_group()
        if not 0 <= self.data_port <= 65535:
            raise BadSetting("data_port", f"{self.data_port} is not a port")
        if self.hook_seconds > MAX_HOOK_SECONDS:
            raise BadSetting(
                "hook_seconds", f"{self.hook_seconds:g} is above {MAX_HOOK_SECONDS:g}: a node waits for it"
            )
        for name in ("lease_seconds", "hook_seconds", "max_incoming", "max_outgoing", "journal_keep"):
            if getattr(self, name) <= 0:
                raise BadSetting(name, f"{getattr(self, name)} is not above 0")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `listen`. Raises `InvalidRequest`."""
        return split_address("listen", self.listen)

    def _check_group(self) -> None:
        try:
            grp.getgrnam(self.socket_group)
        except KeyError:
            remedy = f"groupadd --system {self.socket_group}"
            raise BadSetting("socket_group", f"there is no group {self.socket_group!r}", remedy=remedy) from None

    def _check_http(self) -> None:
        host, _ = split_address("http_listen", self.http_listen)
        if not self.insecure and not self.tls_dir and not is_loopback(host):
            raise BadSetting(
                "http_listen",
                f"{self.http_listen!r} shows beyond this machine what runs here, in clear and to anyone",
                remedy="listen on loopback, or give --tls-dir DIR: then it is HTTPS for those whom the policy names",
            )


def split_address(setting: str, text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises `BadSetting`."""
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not host or not port.isdigit() or int(port) > 65535 or (":" in host and not bracketed):
        raise BadSetting(setting, f"{text!r} is not HOST:PORT ([::1]:7707 with an IPv6 address)")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _line_of(text: str, key: str) -> int:
    for number, line in enumerate(text.splitlines(), 1):
        if line.split("=")[0].strip().strip("\"'[]") == key:
            return number
    return 1


def _convert(value: Any, kind: Any) -> Any:
    """Make `value`, a TOML value or a string, of type `kind`. Raises `ValueError` with the reason."""
    if isinstance(kind, types.UnionType):
        (kind,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("1", "true", "yes", "on"):
            return True
        if str(value).lower() in ("0", "false", "no", "off"):
            return False
        raise ValueError(f"{value!r} is neither true nor false")
    if kind == tuple[Path, ...]:
        words = value.split(":") if isinstance(value, str) else value
        if not isinstance(words, list):
            raise ValueError(f"{value!r} is no list of directories")
        return tuple(_convert(each, Path) for each in words if each)
    if kind in (int, float):
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError(f"{value!r} is not {'a whole number' if kind is int else 'a number'}")
        try:
            number = kind(value)
        except (TypeError, ValueError):
            raise ValueError(f"{value!r} is not {'a whole number' if kind is int else 'a number'}") from None
        if not math.isfinite(number):
            raise ValueError(f"{value!r} is not a number")
        return number
    if not isinstance(value, str | Path):
        raise ValueError(f"{value!r} is not text")
    if kind is Path:
        if not Path(value).is_absolute():
            raise ValueError(f"{str(value)!r} is not an absolute path")
        return Path(value)
    return str(value)


def load_config(
    file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    flags: Mapping[str, object] = types.MappingProxyType({}),
    standard_tls_dir: Path = STANDARD_TLS_DIR,
) -> Config:
    """Read the configuration. Raises `InvalidRequest` naming the line, variable or flag and the reason.

    Who listens beyond loopback, says nothing about TLS, and has certificates in the standard directory means those.
    """
    kinds = typing.get_type_hints(Config)
    known = {each.name for each in dataclasses.fields(Config)}
    found: dict[str, tuple[object, str]] = {}
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
            table = tomllib.loads(text)
        except OSError as exc:
            raise InvalidRequest(f"{file}: {exc.strerror}") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise InvalidRequest(f"{file}: {exc}") from exc
        found |= {key: (value, f"{file}, line {_line_of(text, key)}") for key, value in table.items()}
    for name, text_value in environment.items():
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name.startswith(ENVIRONMENT_PREFIX) and key != "config":
            found[key] = (text_value, f"environment variable {name}")
    for key, value in flags.items():
        if value is not None:
            found[key] = (value, f"--{key.replace('_', '-')}")
    values: dict[str, Any] = {}
    for key, (value, place) in found.items():
        if key not in known:
            raise InvalidRequest(f"{place}: {key!r} is unknown", remedy=f"known are: {', '.join(sorted(known))}")
        try:
            values[key] = _convert(value, kinds[key])
        except ValueError as exc:
            raise InvalidRequest(f"{place}: {key}: {exc}") from exc
    try:
        if "listen" in values and "tls_dir" not in values and not values.get("insecure"):
            beyond = not is_loopback(split_address("listen", values["listen"])[0])
            if beyond and (standard_tls_dir / CERTIFICATE_FILE).exists():
                values["tls_dir"] = standard_tls_dir
        return Config(**values)
    except BadSetting as exc:
        place = found[exc.setting][1] if exc.setting in found else "default"
        raise InvalidRequest(f"{place}: {exc}", remedy=exc.remedy) from exc
