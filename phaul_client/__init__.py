"""The source side of a migration as a library: rounds, policy and commit protocol.

    from phaul_client import Client, Config

    await Client(local, remote, Config(pid, memfd, wdir)).migrate()

`local` and `remote` are the caller's own `Local` and `Remote`; `phauld.Server` is the other end. The names are loaded
when they are first used, for the command line starts without them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from phaul_client.client import Client
    from phaul_client.config import Config
    from phaul_client.local import Local
    from phaul_client.remote import Remote

__all__ = ["Client", "Config", "Local", "Remote"]

_MODULES: Final = {"Client": "client", "Config": "config", "Local": "local", "Remote": "remote"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
