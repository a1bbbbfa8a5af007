"""Every parser of what comes from the other node, on bytes of all kinds: it takes them, or raises what it says.

Any other exception, an endless loop or memory without bound is a failure; hypothesis then prints the smallest example.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from phaul.v1 import remote_pb2, types_pb2
from phaul_client import page_frames, relay_frames, stream
from phaul_client.errors import ImageCorrupt, InvalidRequest, PhaulError, RemoteProtocolError
from phaul_client.preflight.convert import node_facts_of, requirements_of, wishes_of
from phaul_criu import inventory, logs, pagemaps, stats
from phauld import convert
from phauld.access import Policy, parse_policy
from phauld.destination.images import ImageWriter
from phauld.lazy_pages import page_source
from phauld.options import parse_options, restore_options
from tests.fuzz.engine import Fuzzer
from tests.fuzz.made import messages, nearly, numbers, texts


def test_preamble(fuzzer: Fuzzer) -> None:
    whole = st.builds(
        lambda kind, token: stream.Preamble(kind, token).encode(),
        st.sampled_from(list(stream.StreamKind)),
        st.binary(min_size=32, max_size=32),
    )

    def check(data: bytes) -> None:
        with contextlib.suppress(RemoteProtocolError):
            assert stream.decode_preamble(data).encode() == data

    fuzzer.run("preamble of the data port", nearly(whole), check, 2000)


def page_heads() -> st.SearchStrategy[bytes]:
    made = st.builds(
        page_frames.Head,
        kind=st.sampled_from(list(page_frames.Kind)),
        codec=st.sampled_from(list(page_frames.Codec)),
        wire_bytes=numbers(0, 2**32 - 1),
        raw_bytes=numbers(0, 2**32 - 1),
        sequence=numbers(0, 2**64 - 1),
        digest=numbers(0, 2**64 - 1),
    )
    return made.map(page_frames.Head.encode)


def test_page_frames(fuzzer: Fuzzer) -> None:
    def check(data: bytes) -> None:
        with contextlib.suppress(RemoteProtocolError, ImageCorrupt):
            head = page_frames.decode_head(data)
            assert head.encode() == data
            assert max(head.wire_bytes, head.raw_bytes) <= page_frames.MAX_FRAME_BYTES
        page_frames.decode_failure(data)

    fuzzer.run("frames of the page stream", nearly(page_heads()), check, 2000)


def relay_bytes() -> st.SearchStrategy[bytes]:
    question = st.builds(
        relay_frames.Question,
        sequence=numbers(0, 2**64 - 1),
        message=st.builds(
            relay_frames.CriuMessage,
            command=numbers(0, 2**32 - 1),
            pages=numbers(0, 2**64 - 1),
            address=numbers(0, 2**64 - 1),
            image=numbers(0, 2**64 - 1),
        ).map(relay_frames.CriuMessage.encode),
        skip_bytes=numbers(0, 2**32 - 1),
    )
    answer = st.builds(
        relay_frames.AnswerHead,
        sequence=numbers(0, 2**64 - 1),
        offset_bytes=numbers(0, 2**32 - 1),
        length_bytes=numbers(0, 2**32 - 1),
        size_bytes=numbers(0, 2**32 - 1),
    )
    return st.lists(st.one_of(question, answer).map(lambda frame: frame.encode()), max_size=4).map(b"".join)


def test_relay_frames(fuzzer: Fuzzer) -> None:
    """What the reader wants next is always bounded, so that a length cannot make it wait for gigabytes."""

    def check(data: bytes) -> None:
        reader, rest = relay_frames.FrameReader(), data
        with contextlib.suppress(RemoteProtocolError):
            while rest:
                missing = reader.missing_bytes
                assert 0 <= missing <= relay_frames.HEAD_BYTES + relay_frames.CRIU_BYTES
                reader.receive_data(rest[: missing or 1])
                rest = rest[missing or 1 :]
                while (event := reader.next_event()) is not None:
                    if isinstance(event, relay_frames.Question):
                        relay_frames.decode_criu(event.message)
                    else:
                        assert event.size_bytes <= relay_frames.MAX_ANSWER_BYTES
        with contextlib.suppress(RemoteProtocolError):
            assert relay_frames.answer_bytes(data[:32]) <= relay_frames.MAX_ANSWER_BYTES

    fuzzer.run("frames of the post-copy relay", nearly(relay_bytes()), check, 1000)


def test_relay_answers(fuzzer: Fuzzer) -> None:
    """A node that answers what it likes: only the piece that is due is taken, and the rest is an error."""
    heads = st.lists(
        st.builds(
            relay_frames.AnswerHead,
            sequence=st.integers(0, 4),
            offset_bytes=st.sampled_from([0, 32, 4096, 2**32 - 1]),
            length_bytes=numbers(1, 2**32 - 1),
            size_bytes=st.sampled_from([0, 1, 32, 4096, 2**32 - 1]),
            flags=st.sampled_from([relay_frames.Flag.NONE, relay_frames.Flag.LAST]),
        ),
        max_size=8,
    )

    def check(found: list[relay_frames.AnswerHead]) -> None:
        questions = relay_frames.Questions()
        for _ in range(3):
            questions.ask(bytes(32))
        with contextlib.suppress(RemoteProtocolError):
            for head in found:
                questions.expect(head)
                questions.delivered(head.size_bytes)
                if relay_frames.Flag.LAST in head.flags:
                    questions.completed()
        assert len(questions.again()) == questions.open <= 3

    fuzzer.run("answers of the post-copy relay", heads, check, 1000)


def pagemap() -> st.SearchStrategy[bytes]:
    from phaul_criu.rpc import pagemap_pb2

    def image(entries: list[tuple[int, int, int]]) -> bytes:
        parts = [pagemap_pb2.pagemap_head(pages_id=1).SerializeToString()]
        parts += [
            pagemap_pb2.pagemap_entry(vaddr=start, compat_nr_pages=pages % 2**32, flags=flags).SerializeToString()
            for start, pages, flags in entries
        ]
        return bytes(8) + b"".join(len(part).to_bytes(4, "little") + part for part in parts)

    entry = st.tuples(numbers(0, 2**63), numbers(0, 2**31), numbers(0, 7))
    return st.lists(entry, max_size=5).map(image)


def test_pagemaps(fuzzer: Fuzzer) -> None:
    """In post-copy they come as small images, by PutImages."""

    def check(data: bytes) -> None:
        with contextlib.suppress(ValueError):
            assert pagemaps.lazy_pages(data) >= 0

    fuzzer.run("pagemap images", nearly(pagemap()), check, 2000)


def test_page_source(fuzzer: Fuzzer, tmp_path: Path) -> None:
    """A process of its own reads them once more; whatever it raises ends it, and is not to be an endless loop."""
    (tmp_path / "pages-1.img").write_bytes(bytes(4096))

    def check(data: bytes) -> None:
        (tmp_path / "pagemap-1.img").write_bytes(data)
        with contextlib.suppress(Exception):
            found = page_source.Round(str(tmp_path), 1, None)
            with contextlib.suppress(LookupError):
                found.find(0x1000, 0x3000)
            os.close(found.file)

    fuzzer.run("pagemap images, by the page source", nearly(pagemap()), check, 500)


def test_images_of_criu(fuzzer: Fuzzer) -> None:
    def check(data: bytes) -> None:
        with contextlib.suppress(ValueError):
            inventory.lock_table_name(data)
        with contextlib.suppress(ValueError):
            stats.parse_dump_stats(data)
        with contextlib.suppress(ValueError):
            inventory.lock_table_name((0x58313116).to_bytes(4, "little") + len(data).to_bytes(4, "little") + data)
        text = data.decode(errors="replace")
        logs.first_cause(text)
        logs.tail(text)

    fuzzer.run("inventory, statistics and logs of criu", nearly(st.binary(max_size=60)), check, 1500)


def pieces() -> st.SearchStrategy[list[remote_pb2.FilePiece]]:
    def fix(piece: Any, is_right: bool) -> Any:
        if is_right:
            piece.crc32 = zlib.crc32(piece.data)
        return piece

    names = st.sampled_from(["core-1.img", "pages-1.img", "../x.img", "fs-1.img"])
    targets: st.SearchStrategy[dict[str, str]] = st.one_of(
        st.fixed_dictionaries({"image_name": st.one_of(names, texts())}),
        st.fixed_dictionaries({"carried_path": st.one_of(st.sampled_from(["LOG", "/etc/passwd"]), texts())}),
        st.just({}),
    )
    one = st.builds(
        lambda target, data, size, offset, mode, right, pages: fix(
            remote_pb2.FilePiece(**target, data=data, size_bytes=size, offset_bytes=offset, mode=mode, pages=pages),
            right,
        ),
        targets,
        st.one_of(st.binary(max_size=8), st.just(b"x" * 4096)),
        st.one_of(st.integers(0, 16), numbers(0, 2**64 - 1)),
        st.one_of(st.integers(0, 16), numbers(0, 2**64 - 1)),
        numbers(0, 2**32 - 1),
        st.booleans(),
        st.one_of(st.just([]), st.lists(st.one_of(st.integers(0, 3), numbers(0, 2**32 - 1)), max_size=4)),
    )
    return st.lists(one, max_size=5)


def test_file_pieces(fuzzer: Fuzzer, tmp_path: Path) -> None:
    """Whatever comes, only images in their directory and the announced file are there afterwards, none half written."""
    images, log = tmp_path / "images", tmp_path / "log" / "it.log"
    images.mkdir()
    log.parent.mkdir()

    def check(found: list[remote_pb2.FilePiece]) -> None:
        with contextlib.suppress(PhaulError, OSError), ImageWriter(images, (log,)) as writer:
            for piece in found:
                if piece.carried_path == "LOG":
                    piece.carried_path = str(log)
                writer.write(piece)
        for path in images.iterdir():
            assert path.suffix == ".img", path
            assert not path.name.startswith((".", "pages-", "pagemap-")), path
            path.unlink()
        assert {path.name for path in tmp_path.iterdir()} == {"images", "log"}
        assert {path.name for path in log.parent.iterdir()} <= {"it.log"}
        log.unlink(missing_ok=True)

    fuzzer.run("pieces of files", pieces(), check, 1500)


def test_messages(fuzzer: Fuzzer) -> None:
    """The conversions that every request goes through, before anything is done."""
    options, tree, info, workload = (
        each.DESCRIPTOR for each in (types_pb2.Options, types_pb2.TreeFacts, types_pb2.NodeInfo, types_pb2.WorkloadSpec)
    )
    made = st.tuples(messages(options), messages(tree), messages(info), messages(workload))

    def check(found: Any) -> None:
        with contextlib.suppress(InvalidRequest):
            parsed = parse_options(found[0])
            restore_options(parsed)
        wishes_of(found[0])
        with contextlib.suppress(InvalidRequest):
            requirements_of(found[1])
        node_facts_of(found[2])
        with contextlib.suppress(InvalidRequest):
            convert.workload_message(convert.workload_spec(found[3]))

    fuzzer.run("options, facts of trees and nodes, workloads", made, check, 400)


def policies() -> st.SearchStrategy[str]:
    word = st.sampled_from(["receive_from", "send_to", "administer", "addresses", "odd"])
    value = st.sampled_from(["true", "false", "1", '"x"', '["10.0.0.1"]', "[1]", "[[]]", "{}", "1979-05-27", "nan"])
    line = st.one_of(
        st.builds("{} = {}".format, word, value),
        st.builds("[peers.{}]".format, st.one_of(st.sampled_from(["a", "b", '"a b"', '"a.b"']), texts())),
        st.builds("revoked = {}".format, st.one_of(value, st.just(f'["{"ab" * 32}"]'))),
        st.sampled_from(["[peers]", "peers = []", "[[peers]]", "[peers.a.b]"]),
        texts(),
    )
    return st.lists(line, max_size=6).map("\n".join)


def test_policy_file(fuzzer: Fuzzer) -> None:
    """It is parsed as a whole, or refused as a whole; and then it allows nothing to a peer that it does not name."""

    def check(text: str) -> None:
        with contextlib.suppress(InvalidRequest):
            policy: Policy = parse_policy(text)
            for method in ("/phaul.v1.Node/StopWorkload", "/phaul.v1.Remote/Commit"):
                assert policy.refusal(method, ["phaul://node/stranger"], "")
            with pytest.raises(InvalidRequest):
                policy.destination("stranger.example")

    fuzzer.run("policy file", policies(), check, 1500)


def test_recorded_failures(fuzzer: Fuzzer) -> None:
    """What a peer told is written down as JSON, and read back by the next phauld."""
    from google.protobuf import json_format

    def check(failure: Any) -> None:
        recorded = json.loads(json.dumps(json_format.MessageToDict(failure)))
        again = convert.error(recorded)
        assert again.message == failure.message
        assert again.remedy == failure.remedy

    fuzzer.run("failures in the journal", messages(types_pb2.Failure.DESCRIPTOR), check, 500)


def test_journal(fuzzer: Fuzzer) -> None:
    """A file that was damaged is refused, or read; nothing else."""
    from phauld import journal_file

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal.sqlite"
        connection, _ = journal_file.open_file(path)
        connection.execute(
            "INSERT INTO incoming (migration_id, phase, source_node_id, created_at, updated_at, detail)"
            " VALUES ('m', 'OPEN', 's', 1, 1, '{}')"
        )
        connection.close()
        whole = path.read_bytes()

        def check(change: tuple[int, bytes]) -> None:
            for each in Path(directory).iterdir():
                each.unlink()
            place, data = change
            path.write_bytes(whole[:place] + data + whole[place + len(data) :])
            with contextlib.suppress(PhaulError, sqlite3.Error):
                opened, _ = journal_file.open_file(path)
                opened.close()

        changes = st.tuples(st.integers(0, len(whole)), st.binary(min_size=1, max_size=64))
        fuzzer.run("a damaged journal", changes, check, 150)
