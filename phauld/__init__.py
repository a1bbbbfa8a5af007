"""The daemon that runs on every node. `Server`, the seed's receiving half, works without one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phauld.receiver import Server

__all__ = ["Server"]


def __getattr__(name: str) -> Any:
    if name != "Server":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from phauld.receiver import Server

    return Server
