"""Two nodes with daemons, and whether all modes are to be tried."""

import pytest

from tests.node.conftest import daemons, nodes

__all__ = ["daemons", "nodes"]


@pytest.fixture(scope="session")
def every(pytestconfig: pytest.Config) -> bool:
    """Whether `--all` was given."""
    return bool(pytestconfig.getoption("--all"))
