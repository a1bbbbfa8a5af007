"""What of the settings can only be found out by trying: directories, certificates, the policy, criu, addresses.

The invariant: what will be as wrong at the next start is a `BadSetting`, which systemd does not try again; what may be
otherwise then (an address that is not there yet, a taken port, a full disk) is not.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from pathlib import Path
from typing import Final

from phaul_client.errors import InvalidRequest
from phaul_client.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, Tls
from phaul_criu.errors import CriuError
from phauld.config import BadSetting, Config
from phauld.guard import Guard

SOCKET_PATH_BYTES: Final = 107  # linux/un.h, without the NUL
#: Not mended by waiting.
_LASTING: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EISDIR)
_LASTING_LISTEN: Final = (errno.EACCES, errno.EPERM)
_CERTIFICATES: Final = "phaul certs issue makes node.crt, node.key and ca.crt that belong together"


def prepare(config: Config) -> None:
    """Make the directories, and look at what phauld will read. Raises `BadSetting`, `OSError`."""
    _make_directories(config)
    if config.unix.is_dir() or (config.unix.exists() and not config.unix.is_socket()):
        raise BadSetting("unix", f"{config.unix} is there, and is no socket")
    if len(os.fsencode(config.unix)) > SOCKET_PATH_BYTES:
        raise BadSetting("unix", f"{config.unix} is longer than {SOCKET_PATH_BYTES} bytes, the most that Linux takes")
    _check_alone(config.unix)
    if config.hooks_dir.exists() and not config.hooks_dir.is_dir():
        raise BadSetting("hooks_dir", f"{config.hooks_dir} is no directory")
    if config.tls_dir is not None:
        check_tls(Tls(config.tls_dir))


def _make_directories(config: Config) -> None:
    for setting, directory, mode in (
        ("state_dir", config.state_dir, 0o700),
        ("images_dir", config.images_dir, 0o700),
        *([("memory_images_dir", config.memory_images_dir, 0o700)] if config.images_in_memory else []),
        ("log_dir", config.log_dir, 0o750),
        ("unix", config.unix.parent, 0o755),
    ):
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=mode)
        except OSError as exc:
            if exc.errno not in _LASTING:
                raise
            where = "" if exc.filename is None or Path(exc.filename) == directory else f" ({exc.filename})"
            why = "it is no directory" if exc.errno == errno.EEXIST else f"{exc.strerror}{where}"
            raise BadSetting(setting, f"cannot make {directory}: {why}", remedy=_who_may(exc)) from exc
        if not os.access(directory, os.W_OK | os.X_OK):
            why = "no permission to write there"
            raise BadSetting(setting, f"{directory}: {why}", remedy=_who_may(PermissionError(errno.EACCES, why)))


def _check_alone(path: Path) -> None:
    """Raises `InvalidRequest` if another process answers at this socket: it is not taken away from it."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return
    remedy = "phaul info tells whose it is; a second phauld wants a --unix, a --state-dir and ports of its own"
    raise InvalidRequest(f"cannot listen on unix:{path}: another phauld serves there", remedy=remedy)


def _who_may(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
        return "phauld must be root: sudo phauld, or systemctl start phauld"
    return "another directory, or make that one a directory that can be written"


def check_tls(tls: Tls) -> None:
    """Raises `BadSetting`: a file is missing, is not what its name says, or does not go with the others."""
    try:
        if not tls.directory.is_dir():
            raise InvalidRequest(f"there is no directory {tls.directory}", remedy=_CERTIFICATES)
        tls.read()
        _check_pair(tls.directory)
        Guard(tls).policy()
    except InvalidRequest as exc:
        raise BadSetting("tls_dir", exc.message, remedy=exc.remedy) from exc


def _check_pair(directory: Path) -> None:
    """Raises `InvalidRequest`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(directory / CA_FILE)
    except ssl.SSLError as exc:
        raise InvalidRequest(f"{directory / CA_FILE}: no certificate in it", remedy=_CERTIFICATES) from exc
    try:
        context.load_cert_chain(directory / CERTIFICATE_FILE, directory / KEY_FILE, password="")
    except ssl.SSLError as exc:
        raise InvalidRequest(_what_is_wrong(directory, exc), remedy=_CERTIFICATES) from exc


def _what_is_wrong(directory: Path, error: ssl.SSLError) -> str:
    certificate, key = directory / CERTIFICATE_FILE, directory / KEY_FILE
    if error.reason == "KEY_VALUES_MISMATCH" or error.reason == "KEY_TYPE_MISMATCH":
        return f"{key} is not the key of {certificate}"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(certificate)
    except ssl.SSLError:
        return f"{certificate}: no certificate in it"
    if b"ENCRYPTED" in key.read_bytes():
        return f"{key} is encrypted, and there is nobody to ask for its password"
    return f"{key}: no key of {certificate} in it"


def bad_criu(config: Config, error: CriuError) -> BadSetting | CriuError:
    """What to raise if criu could not be asked: the setting, if it names that criu."""
    if config.criu is None:
        return error
    return BadSetting(
        "criu", f"{config.criu} is of no use: {error}", remedy="leave it out: phauld finds criu by itself"
    )


def cannot_listen(setting: str, address: str, error: OSError) -> InvalidRequest:
    """What to raise if HOST:PORT cannot be listened on."""
    is_name = (error.errno or 0) < 0  # getaddrinfo's
    why = "there is no such name" if is_name else os.strerror(error.errno or 0)  # not asyncio's words
    flag = f"--{setting.replace('_', '-')}"
    host_flag = "--listen" if setting == "data_port" else flag
    if is_name:
        remedy = f"{host_flag} wants an address of this machine, or a name that stands for one"
        return InvalidRequest(f"cannot listen on {address}: {why}", remedy=remedy)
    if error.errno == errno.EADDRNOTAVAIL:
        remedy = f"ip address shows those of this machine; {host_flag} 0.0.0.0:PORT is all of them"
        return InvalidRequest(f"cannot listen on {address}: it is no address of this machine", remedy=remedy)
    if error.errno in _LASTING_LISTEN:
        return BadSetting(
            setting, f"cannot listen on {address}: {why}", remedy="a port above 1023, or start it as root"
        )
    remedy = f"ss -tlnp tells who does, perhaps another phauld: then choose another {flag}"
    return InvalidRequest(f"cannot listen on {address}: {why}", remedy=remedy)


def why_not(address: tuple[str, int]) -> OSError | None:
    """Why nobody can listen there now; `None`: one can."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
            sock.listen(1)
    except OSError as exc:
        return exc
    return None
