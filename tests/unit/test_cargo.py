"""Files that go with a tree: what is sent while it runs, and what is left for the freeze."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest

from phaul.v1 import remote_pb2
from phaul_client.cargo import Cargo


class Taken:
    """A destination that keeps what it gets, in order."""

    def __init__(self) -> None:
        self.got: list[bytes] = []

    async def put_images(self, pieces: Iterable[remote_pb2.FilePiece]) -> remote_pb2.PutImagesResponse:
        data = b"".join(piece.data for piece in pieces)
        self.got.append(data)
        return remote_pb2.PutImagesResponse(files=1, bytes=len(data))


class Root:
    """Baggage that writes down when it is sent."""

    def __init__(self, taken: Taken) -> None:
        self._taken = taken

    async def first(self) -> None:
        self._taken.got.append(b"root")

    async def rest(self) -> None:
        self._taken.got.append(b"changes")


async def test_only_what_came_later_is_left_for_the_freeze(tmp_path: Path) -> None:
    logs = [tmp_path / "web.log", tmp_path / "db.log"]
    for log in logs:
        log.write_bytes(b"one\n")
    taken = Taken()
    cargo = Cargo(cast(Any, taken), logs, baggage=Root(taken))
    await cargo.send()
    assert taken.got == [b"one\n", b"one\n", b"root"]
    with logs[0].open("ab") as log_file:
        log_file.write(b"two\n")
    tails = {piece.carried_path: piece.data for piece in cargo.tails() if piece.data}
    assert tails == {str(logs[0]): b"two\n"}
    await cargo.send_rest()
    assert taken.got[-1] == b"changes"


async def test_a_log_that_was_not_sent_beforehand_goes_as_a_whole(tmp_path: Path) -> None:
    log = tmp_path / "web.log"
    log.write_bytes(b"one\n")
    assert [piece.data for piece in Cargo(cast(Any, Taken()), [log]).tails()] == [b"one\n"]


async def test_a_log_that_is_gone_is_an_error(tmp_path: Path) -> None:
    cargo = Cargo(cast(Any, Taken()), [tmp_path / "web.log"])
    with pytest.raises(FileNotFoundError):
        cargo.tails()


async def test_there_may_be_nothing() -> None:
    taken = Taken()
    cargo = Cargo(cast(Any, taken))
    await cargo.send()
    await cargo.copy()
    await cargo.prepare()
    cargo.freeze()
    assert cargo.tails() == []
    await cargo.send_rest()
    assert await cargo.finish() == []
    await cargo.aclose()
    assert (cargo.report(), taken.got) == ([], [])
