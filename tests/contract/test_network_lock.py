"""The network lock of a dump that nobody undid goes with its images: a real nftables table, in its own namespace."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from phaul_client.tree_lock import unlock_network
from phaul_criu.inventory import lock_table_name
from phaul_criu.rpc import inventory_pb2

IN_NAMESPACE = """
import subprocess, sys
from pathlib import Path
from phaul_client.tree_lock import unlock_network
subprocess.run(["nft", "add", "table", "inet", sys.argv[1]], check=True)
subprocess.run(["nft", "add", "table", "inet", "mine"], check=True)
unlock_network(Path(sys.argv[2]))
unlock_network(Path(sys.argv[2]))
subprocess.run(["nft", "list", "tables"], check=True)
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    entry = inventory_pb2.inventory_entry(img_version=2, dump_criu_run_id="6d1f0f0e-1111")
    (tmp_path / "inventory.img").write_bytes(
        struct.pack("<II", 0x58313116, entry.ByteSize()) + entry.SerializeToString()
    )
    return tmp_path


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("nft") is None, reason="needs root and nft")
def test_the_lock_of_a_dump_goes_and_nothing_else(images: Path) -> None:
    name = lock_table_name((images / "inventory.img").read_bytes())
    assert name is not None
    left = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", IN_NAMESPACE, name, str(images)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert left.stdout.split() == ["table", "inet", "mine"]


@pytest.mark.parametrize("content", [None, b"", b"no inventory at all"])
def test_images_without_an_inventory_are_no_hindrance(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "inventory.img").write_bytes(content)
    unlock_network(tmp_path)
    unlock_network(tmp_path / "not there")
