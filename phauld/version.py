"""Which phaul is installed; to be asked where criu is missing, too."""

from importlib import metadata


def phaul_version() -> str:
    """The version of phaul that is installed."""
    try:
        return metadata.version("phaul")
    except metadata.PackageNotFoundError:
        return "0+unknown"
