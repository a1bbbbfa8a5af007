"""What `phaul.v1.Node` refuses before it looks at anything, and how it tells its checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from phaul.v1 import node_pb2, types_pb2
from phaul_client.errors import InvalidRequest
from phaul_criu.features import Finding, Severity
from phauld.node_service import NodeService, _check
from phauld.trees.workloads import Workloads


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (node_pb2.StopWorkloadRequest(name="web", signal=9999), "there is no signal 9999"),
        (node_pb2.StopWorkloadRequest(name="web", signal=-1), "there is no signal -1"),
        (node_pb2.StopWorkloadRequest(name="web", grace=Duration(seconds=-1)), "-1 s is less than nothing"),
    ],
)
async def test_a_stop_that_cannot_be_is_no_defect(
    tmp_path: Path, request_: node_pb2.StopWorkloadRequest, says: str
) -> None:
    nobody: Any = None
    service = NodeService(nobody, Workloads(tmp_path / "records", tmp_path / "log"), nobody, lambda: (0, 0))
    with pytest.raises(InvalidRequest, match=says):
        await service.StopWorkload(request_, nobody)


@pytest.mark.parametrize(("ok", "severity"), [(True, types_pb2.SEVERITY_INFO), (False, types_pb2.SEVERITY_ERROR)])
def test_a_check_that_passed_weighs_nothing(ok: bool, severity: types_pb2.Severity.ValueType) -> None:
    finding = Finding(name="criu", ok=ok, severity=Severity.REQUIRED, detail="4.2")
    assert _check(finding).severity == severity
