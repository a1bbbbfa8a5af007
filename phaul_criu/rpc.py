"""pycriu's messages, for the modules that need them; the one place that imports pycriu."""

from phaul_criu.errors import CriuMissing

try:
    from pycriu import rpc_pb2 as rpc_pb2
    from pycriu.images import core_pb2 as core_pb2
    from pycriu.images import fdinfo_pb2 as fdinfo_pb2
    from pycriu.images import inventory_pb2 as inventory_pb2
    from pycriu.images import mm_pb2 as mm_pb2
    from pycriu.images import pagemap_pb2 as pagemap_pb2
    from pycriu.images import stats_pb2 as stats_pb2
except ImportError as exc:
    raise CriuMissing(
        "start",
        "criu's Python bindings (pycriu) are missing",
        code="pycriu-missing",
        remedy="run scripts/setup, or install python3-pycriu of the same version as criu",
    ) from exc
