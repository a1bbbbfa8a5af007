"""Files into pieces, pieces into messages, messages into the same files again; and nothing else anywhere."""

import os
import random
import zlib
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaul.v1 import remote_pb2
from phaul_client import pieces
from phaul_client.errors import ImageCorrupt, InvalidRequest
from phaul_client.pieces import MESSAGE_BYTES, MESSAGE_PIECES, PIECE_BYTES, carried_pieces, image_pieces, messages
from phauld.destination.images import ImageWriter

NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}\.img", fullmatch=True).filter(
    lambda name: not name.startswith(("pages-", "pagemap-"))
)
#: at, just below and just above the borders of a piece, and small ones
SIZES = st.integers(0, 3000) | st.sampled_from([PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES])


def piece(name: str = "core-1.img", data: bytes = b"core", **fields: object) -> remote_pb2.FilePiece:
    values = {"size_bytes": len(data), "crc32": zlib.crc32(data), "data": data, **fields}
    target = {} if "carried_path" in values else {"image_name": name}
    return remote_pb2.FilePiece(**target, **values)  # type: ignore[arg-type]


def write_all(writer: ImageWriter, stream: Iterable[remote_pb2.FilePiece]) -> ImageWriter:
    with writer:
        for each in stream:
            writer.write(each)
    return writer


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES, SIZES, max_size=12), st.integers(0, 1000))
def test_any_files_arrive_as_they_are(files: dict[str, int], seed: int) -> None:
    noise = random.Random(seed)
    with TemporaryDirectory() as root:
        source, destination = Path(root, "from"), Path(root, "to")
        source.mkdir()
        destination.mkdir()
        for name, size in files.items():
            (source / name).write_bytes(noise.randbytes(size))
        writer = ImageWriter(destination, ())
        with writer:
            for message in messages("move", image_pieces(source, 3)):
                assert message.ByteSize() < 4 << 20  # gRPC's default limit
                for each in message.pieces:
                    assert each.index == 3
                    writer.write(remote_pb2.FilePiece.FromString(each.SerializeToString()))
        assert contents(destination) == contents(source)
        assert writer.image_names == set(files)
        assert (writer.files, writer.bytes) == (len(files), sum(files.values()))


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SIZES)
def test_a_carried_file_arrives_in_two_calls(before: int, more: int, stale: int) -> None:
    """The first brings what there is, the second what was appended since; an older copy leaves nothing behind."""
    with TemporaryDirectory() as root:
        log, there = Path(root, "a.log"), Path(root, "b.log")
        log.write_bytes(b"x" * before)
        there.write_bytes(b"o" * stale)

        def arrive(stream: Iterable[remote_pb2.FilePiece], images: Path | None = None) -> int:
            pieces_there = []
            for each in stream:
                each.carried_path = str(there)
                pieces_there.append(each)
            return write_all(ImageWriter(images, (there,)), pieces_there).bytes

        sent = arrive(carried_pieces(log))
        assert there.read_bytes()[:before] == b"x" * before
        with log.open("ab") as file:
            file.write(b"y" * more)
        assert arrive(carried_pieces(log, sent), Path(root)) == more
        assert there.read_bytes() == log.read_bytes()


def test_a_carried_file_that_shrank_is_as_short_there(tmp_path: Path) -> None:
    log, there = tmp_path / "a.log", tmp_path / "b.log"
    log.write_bytes(b"0123456789")
    there.write_bytes(b"0123456789")
    os.truncate(log, 4)
    stream = list(carried_pieces(log, 10))
    for each in stream:
        each.carried_path = str(there)
    write_all(ImageWriter(tmp_path, (there,)), stream)
    assert there.read_bytes() == b"0123"


def test_what_the_tree_writes_meanwhile_to_the_very_same_file_stays(tmp_path: Path) -> None:
    """Between two daemons of one machine, and on a shared file system, both ends have one log."""
    log = tmp_path / "a.log"
    log.write_bytes(b"before")
    stream = list(carried_pieces(log))
    with log.open("ab") as file:
        file.write(b", while it was sent")
    write_all(ImageWriter(None, (log,)), stream)
    assert log.read_bytes() == b"before, while it was sent"


def test_only_images_travel_and_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "core-1.img").write_bytes(b"core")
    (tmp_path / "dump.log").write_bytes(b"log")
    (tmp_path / "stats-dump").write_bytes(b"stats")
    (tmp_path / "parent").symlink_to("../0")
    (tmp_path / "secret.img").symlink_to("/etc/shadow")
    assert [each.image_name for each in image_pieces(tmp_path, 1)] == ["core-1.img"]


def test_small_files_share_a_message_and_none_is_too_large() -> None:
    many = [piece(f"a-{number}.img", bytes(1000)) for number in range(MESSAGE_PIECES + 1)]
    large = [piece(f"b-{number}.img", bytes(PIECE_BYTES)) for number in range(3)]
    made = list(messages("move", [*many, *large]))
    assert [len(message.pieces) for message in made] == [MESSAGE_PIECES, 2, 1, 1]
    assert all(message.ByteSize() <= MESSAGE_BYTES + (64 << 10) for message in made)
    assert [each.image_name for message in made for each in message.pieces] == [
        each.image_name for each in (*many, *large)
    ]
    assert [message.migration_id for message in made] == ["move", "", "", ""]


def test_many_empty_files_do_not_make_an_endless_message() -> None:
    """An empty file has no data but costs a name and numbers."""
    made = list(messages("move", (piece(f"{'n' * 200}-{number}.img", b"") for number in range(30_000))))
    assert max(message.ByteSize() for message in made) < 4 << 20


def test_no_file_makes_no_message() -> None:
    assert list(messages("move", [])) == []


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def test_a_wrong_checksum_is_refused(images: Path) -> None:
    with pytest.raises(ImageCorrupt, match=r"core-1\.img: the checksum"):
        write_all(ImageWriter(images, ()), [piece(crc32=1)])
    assert contents(images) == {}


@pytest.mark.parametrize(
    ("offset", "says"), [(4, "expected the piece at 3, got 4"), (2, "expected the piece at 3, got 2"), (0, "got 0")]
)
def test_gaps_and_overlaps_are_refused(images: Path, offset: int, says: str) -> None:
    stream = [piece(data=b"abc", size_bytes=9), piece(data=b"def", size_bytes=9, offset_bytes=offset)]
    with pytest.raises(ImageCorrupt, match=says):
        write_all(ImageWriter(images, ()), stream)
    assert contents(images) == {}


def test_a_first_piece_that_is_not_the_beginning_is_refused(images: Path) -> None:
    with pytest.raises(ImageCorrupt, match="expected the piece at 0, got 3"):
        write_all(ImageWriter(images, ()), [piece(data=b"abc", size_bytes=9, offset_bytes=3)])


def test_a_piece_beyond_the_end_is_refused(images: Path) -> None:
    with pytest.raises(ImageCorrupt, match="beyond the end"):
        write_all(ImageWriter(images, ()), [piece(data=b"abc", size_bytes=2)])


def test_a_file_may_not_change_its_size_on_the_way(images: Path) -> None:
    stream = [piece(data=b"abc", size_bytes=9), piece(data=b"def", size_bytes=6, offset_bytes=3)]
    with pytest.raises(ImageCorrupt, match="size"):
        write_all(ImageWriter(images, ()), stream)
    assert contents(images) == {}


def test_a_file_that_begins_inside_another_is_refused(images: Path) -> None:
    with pytest.raises(ImageCorrupt, match=r"core-1\.img: the next file began inside it"):
        write_all(ImageWriter(images, ()), [piece(size_bytes=9), piece("core-2.img")])
    assert contents(images) == {}


def test_a_stream_that_ends_inside_a_file_leaves_nothing_of_it(images: Path) -> None:
    with pytest.raises(ImageCorrupt, match="ended inside it"):
        write_all(ImageWriter(images, ()), [piece("a.img"), piece("b.img", size_bytes=9)])
    assert contents(images) == {"a.img": b"core"}


@pytest.mark.parametrize(
    "name",
    [
        *("../core-1.img", "/etc/core-1.img", "a/b.img", ".img", ".hidden.img", "core-1.img/..", "core-1.img/"),
        *("core-1", "core-1.imgx", "parent", "stats-dump", "dump.log", "-x.img", "", " a.img", "a\n.img", "a.img\n"),
        *("pages-1.img", "pagemap-1.img", "pagemap-shmem-3.img", "a\0.img", "n" * 300 + ".img", "ä.img"),
    ],
)
def test_names_that_are_no_small_image_are_refused(images: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not the name of a small image"):
        write_all(ImageWriter(images, ()), [piece(name)])
    assert contents(images) == {}


def test_an_image_before_the_first_round_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="before the first round"):
        write_all(ImageWriter(None, ()), [piece()])


def test_a_piece_of_nothing_is_refused(images: Path) -> None:
    with pytest.raises(InvalidRequest, match="without a target"):
        write_all(ImageWriter(images, ()), [remote_pb2.FilePiece(data=b"abc", crc32=zlib.crc32(b"abc"), size_bytes=3)])


@pytest.mark.parametrize("trick", ["{}/../etc/passwd", "{}/app.log/", "{}//app.log", "{}/./app.log", "app.log", ""])
def test_a_carried_path_must_be_the_listed_one_to_the_letter(tmp_path: Path, trick: str) -> None:
    listed = tmp_path / "app.log"
    with pytest.raises(InvalidRequest, match="was not announced"):
        write_all(ImageWriter(None, (listed,)), [piece(carried_path=trick.format(tmp_path))])
    assert contents(tmp_path) == {}


def test_a_link_in_the_way_of_a_carried_file_is_not_followed(tmp_path: Path) -> None:
    victim, listed = tmp_path / "victim", tmp_path / "app.log"
    victim.write_bytes(b"precious")
    listed.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        write_all(ImageWriter(None, (listed,)), [piece(carried_path=str(listed))])
    assert victim.read_bytes() == b"precious"


def test_a_link_in_the_way_of_an_image_is_not_followed(images: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (images / ".core-1.img.part").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        write_all(ImageWriter(images, ()), [piece()])
    assert victim.read_bytes() == b"precious"


def test_a_pipe_in_the_way_of_a_carried_file_does_not_block(tmp_path: Path) -> None:
    listed = tmp_path / "app.log"
    os.mkfifo(listed)
    with pytest.raises((OSError, ImageCorrupt)):
        write_all(ImageWriter(None, (listed,)), [piece(carried_path=str(listed))])


def test_a_failed_open_leaves_no_descriptor(tmp_path: Path) -> None:
    listed = tmp_path / "app.log"
    listed.symlink_to("elsewhere")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(OSError, match="symbolic"):
            write_all(ImageWriter(None, (listed,)), [piece(carried_path=str(listed))])
    assert len(os.listdir("/proc/self/fd")) == before


def test_every_refusal_closes_its_descriptor(images: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for bad in (piece(crc32=1), piece("core-2.img"), piece(data=b"abc", size_bytes=2), piece(offset_bytes=1)):
        with pytest.raises(ImageCorrupt):
            write_all(ImageWriter(images, ()), [piece(size_bytes=9), bad])
    assert len(os.listdir("/proc/self/fd")) == before
    assert contents(images) == {}


@pytest.mark.parametrize(("mode", "there"), [(0o640, 0o640), (0, 0o600), (0o6777, 0o640)])
def test_a_carried_file_gets_its_mode_and_never_a_set_id_bit(tmp_path: Path, mode: int, there: int) -> None:
    listed = tmp_path / "app.log"
    write_all(ImageWriter(None, (listed,)), [piece(carried_path=str(listed), mode=mode)])
    found = listed.stat().st_mode & 0o7777
    assert not found & 0o7000
    if mode < 0o1000:
        assert found == there


def test_an_image_comes_again_whole(images: Path) -> None:
    """A repeated PutImages writes the same files once more."""
    for data in (b"first", b"second time"):
        write_all(ImageWriter(images, ()), [piece(data=data)])
    assert contents(images) == {"core-1.img": b"second time"}


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 16)
    (tmp_path / "core-1.img").write_bytes(bytes(4 << 16))
    stream = image_pieces(tmp_path, 1)
    first = next(stream)
    os.truncate(tmp_path / "core-1.img", 1 << 16)
    images = tmp_path / "images"
    images.mkdir()
    with pytest.raises(ImageCorrupt, match="ended inside it"):
        write_all(ImageWriter(images, ()), [first, *stream])
    assert contents(images) == {}
