"""What of a directory may be replaced by `--sync`."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from phauld.sync_records import State, SyncRecords


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SyncRecords:
    monkeypatch.setattr("phauld.sync_records.shutil.which", lambda _name: "/usr/bin/rsync")
    (tmp_path / "root").mkdir()
    return SyncRecords(tmp_path / "synced", (tmp_path / "root",))


def codes(records: SyncRecords, directory: Path, *, overwrite: bool = False) -> list[str]:
    return [each.code for each in records.check_destination((str(directory),), overwrite=overwrite)]


def test_what_may_be_replaced(there: SyncRecords, tmp_path: Path) -> None:
    data = tmp_path / "root" / "data"
    assert codes(there, data) == []
    data.mkdir()
    assert codes(there, data) == []
    (data / "file").touch()
    assert codes(there, data) == ["sync-not-empty"]
    assert codes(there, data, overwrite=True) == []
    there.put(str(data), State.PARTIAL, "m", "a")
    assert codes(there, data) == []
    there.put(str(data), State.ARRIVED, "m", "a")
    assert codes(there, data) == ["sync-not-empty"]
    time.sleep(0.2)  # times of files are coarse
    there.put(str(data), State.LEFT, "m", "b")
    assert codes(there, data) == []
    time.sleep(0.2)
    (data / "file").write_text("changed")
    assert codes(there, data) == ["sync-not-empty"]


def test_only_below_the_roots(there: SyncRecords, tmp_path: Path) -> None:
    assert codes(there, tmp_path / "other") == ["sync-not-allowed"]
    assert codes(SyncRecords(tmp_path / "synced", ()), tmp_path / "root") == ["sync-not-allowed"]
    (tmp_path / "root" / "link").symlink_to("/etc")
    assert codes(there, tmp_path / "root" / "link", overwrite=True) == ["sync-not-allowed"]
    assert codes(there, tmp_path / "root" / "link" / "below", overwrite=True) == ["sync-not-allowed"]


def test_a_directory_in_use_is_not_touched(there: SyncRecords, tmp_path: Path) -> None:
    data = tmp_path / "root" / "data"
    data.mkdir()
    descriptor = os.open(data, os.O_RDONLY)
    try:
        assert codes(there, data, overwrite=True) == ["sync-in-use"]
    finally:
        os.close(descriptor)


def test_an_older_copy_is_not_sent(there: SyncRecords, tmp_path: Path) -> None:
    data = tmp_path / "root" / "data"
    assert [each.code for each in there.check_source((str(data),), overwrite=False)] == ["sync-missing"]
    data.mkdir()
    assert list(there.check_source((str(data),), overwrite=False)) == []
    there.put(str(data), State.LEFT, "m", "b")
    assert [each.code for each in there.check_source((str(data),), overwrite=False)] == ["sync-stale"]
    assert list(there.check_source((str(data),), overwrite=True)) == []


def test_one_migration_at_a_time(there: SyncRecords) -> None:
    assert there.claim("/root/data", "one")
    assert there.claim("/root/data", "one")
    assert not there.claim("/root/data", "two")
    assert not there.claim("/root", "two")
    assert not there.claim("/root/data/below", "two")
    assert there.claim("/root/data2", "two")
    there.release("one")
    assert there.claim("/root/data", "two")
