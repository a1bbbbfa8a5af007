"""The daemon that runs on every node. `Server`, the seed's receiving half, works without one."""

TYPE_CHECKING = False  # that of `typing` costs its import, in every small process: see bare.py

if TYPE_CHECKING:
    from phauld.destination.receiver import Server

__all__ = ["Server"]


def __getattr__(name: str) -> object:
    if name != "Server":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from phauld.destination.receiver import Server

    return Server
