"""The API's own rules: buf's lint, no breaking change, comments as contract, and a reference that is current."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from phaul_client import commit
from phauld import session

ROOT: Final = Path(__file__).resolve().parents[2]
LOCK: Final = ROOT / "proto" / "descriptor.binpb"
NAMES: Final = [f"phaul/v1/{name}.proto" for name in ("migrations", "node", "remote", "types")]
LABELS: Final = ["Precondition", "Postcondition", "On error", "Idempotency"]
BUF_CANNOT_BE_HAD: Final = 3  # exit status of scripts/proto-check
MESSAGE, ENUM, SERVICE = 4, 5, 6  # field numbers in descriptor.proto, which source locations are made of

Files = dict[str, FileDescriptorProto]


def compile_protos(proto_dir: Path, output: Path) -> Files:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={proto_dir}", "--include_source_info"]
    subprocess.run([*command, f"--descriptor_set_out={output}", *NAMES], check=True, timeout=60)
    return phaul_files(FileDescriptorSet.FromString(output.read_bytes()))


def phaul_files(descriptors: FileDescriptorSet) -> Files:
    return {file.name: file for file in descriptors.file if file.name.startswith("phaul/")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The four files with their comments."""
    return compile_protos(ROOT / "proto", tmp_path_factory.mktemp("descriptors") / "api.binpb")


def comments(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    return {tuple(location.path): location.leading_comments.strip() for location in file.source_code_info.location}


def elements(file: FileDescriptorProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Everything that needs a comment: its name and its path in the descriptor."""
    for number, service in enumerate(file.service):
        yield service.name, (SERVICE, number)
        for index, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (SERVICE, number, 2, index)
    for number, message in enumerate(file.message_type):
        yield message.name, (MESSAGE, number)
        for index, field in enumerate(message.field):
            yield f"{message.name}.{field.name}", (MESSAGE, number, 2, index)
    for number, enum in enumerate(file.enum_type):
        yield enum.name, (ENUM, number)
        for index, value in enumerate(enum.value):
            yield value.name, (ENUM, number, 2, index)


def proto_check(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/proto-check of a checkout; skips where buf cannot be had."""
    if shutil.which("npm") is None:
        pytest.skip("npm is missing, so there is no buf: apt-get install npm")
    done = subprocess.run(
        [checkout / "scripts" / "proto-check", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
        env={**os.environ, "PYTHON": sys.executable},
    )
    if done.returncode == BUF_CANNOT_BE_HAD:
        pytest.skip(f"buf cannot be had here: {done.stdout.strip()}")
    return done


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the API and its scripts to break."""
    for part in ("proto/buf.yaml", "proto/descriptor.binpb", "scripts/proto-check", "scripts/api-docs", "docs/api.md"):
        (tmp_path / part).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy2(ROOT / part, tmp_path / part)
    (tmp_path / "proto" / "phaul" / "v1").mkdir(parents=True)
    for name in NAMES:
        shutil.copy2(ROOT / "proto" / name, tmp_path / "proto" / name)
    return tmp_path


def edit(checkout: Path, name: str, old: str, new: str) -> None:
    path = checkout / "proto" / "phaul" / "v1" / f"{name}.proto"
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))


def test_buf_finds_nothing() -> None:
    done = proto_check(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "old", "new", "finding"),
    [
        ("node", "bool follow = 2;", "bool follow = 5;", "field"),
        ("types", "  ERROR_REASON_CANCELLED = 27;", "  ERROR_REASON_STOPPED = 27;", "ERROR_REASON_CANCELLED"),
        ("remote", "  rpc RenewLease(RenewLeaseRequest) returns (RenewLeaseResponse);", "", "RenewLease"),
        ("migrations", "uint32 page_size", "string page_size", "type"),
    ],
)
def test_a_breaking_change_is_found(copy: Path, name: str, old: str, new: str, finding: str) -> None:
    edit(copy, name, old, new)
    done = proto_check(copy)
    assert done.returncode == 1, done.stdout
    assert "this breaks older peers or callers" in done.stdout
    assert finding in done.stdout


def test_a_breaking_change_is_accepted_only_on_purpose(copy: Path) -> None:
    before = (copy / "proto" / "descriptor.binpb").read_bytes()
    edit(copy, "node", "bool follow = 2;", "bool follow = 5;")
    assert proto_check(copy, "--accept").returncode == 1
    assert (copy / "proto" / "descriptor.binpb").read_bytes() == before
    assert proto_check(copy, "--accept", "--breaking").returncode == 0
    assert proto_check(copy).returncode == 0
    assert (copy / "proto" / "descriptor.binpb").read_bytes() != before


def test_an_uncommented_field_is_found(copy: Path) -> None:
    edit(copy, "node", "  // Go on with what is written later.\n", "")
    done = proto_check(copy)
    assert done.returncode != 0
    assert '"follow" should have a non-empty comment' in done.stdout


def test_lock_is_current(files: Files) -> None:
    """Additions too are in the lock, so that the next change cannot break them unseen."""
    locked = phaul_files(FileDescriptorSet.FromString(LOCK.read_bytes()))
    for file in files.values():
        bare = FileDescriptorProto.FromString(file.SerializeToString())
        bare.ClearField("source_code_info")
        assert bare == locked.get(file.name), f"{file.name} has changed: run scripts/proto-check --accept"


def test_reference_is_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "api-docs", "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_reference_that_is_not_current_is_found(copy: Path) -> None:
    edit(copy, "node", "Go on with what is written later.", "Go on.")
    done = subprocess.run(
        [sys.executable, copy / "scripts" / "api-docs", "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "not current" in done.stderr


def test_reference_links_lead_somewhere() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    headings = {line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("#")}
    targets = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert targets
    assert targets <= headings


def test_everything_has_a_comment(files: Files) -> None:
    bare = [
        name for file in files.values() for name, path in elements(file) if not comments(file).get(path, "").rstrip(".")
    ]
    assert bare == []


def test_methods_are_contracts(files: Files) -> None:
    """Every RPC says what must hold before, what holds after, what an error guarantees, and what a repetition does."""
    seen = 0
    for file in files.values():
        for name, path in elements(file):
            if path[0] == SERVICE and len(path) == 4:
                seen += 1
                labels = re.findall(rf"^ ?({'|'.join(LABELS)}): \S", comments(file)[path], re.MULTILINE)
                assert labels == LABELS, name
    assert seen


def test_error_reasons_name_the_codes_that_are_sent(files: Files) -> None:
    from phaul_client.errors import PhaulError
    from phaul_client.status import to_status

    file = files["phaul/v1/types.proto"]
    said, sent = {}, {}
    for name, path in elements(file):
        if name.startswith("ERROR_REASON_") and not name.endswith("UNSPECIFIED"):
            code = re.match(r"\[([A-Z_]+)\] ", comments(file)[path])
            said[name] = code and code[1]
            sent[name] = to_status(PhaulError("", reason=name.removeprefix("ERROR_REASON_"))).code.name
    assert said == sent


def test_phases_are_those_of_the_tables(files: Files) -> None:
    """A phase of a state table goes over the wire by its name."""
    enums = {enum.name: {value.name for value in enum.value} for enum in files["phaul/v1/types.proto"].enum_type}
    source = {f"MIGRATION_PHASE_{phase.name}" for phase in commit.Phase}
    destination = {f"SESSION_PHASE_{phase.name}" for phase in session.Phase}
    only_told = {f"MIGRATION_PHASE_{name}" for name in ("UNSPECIFIED", "REFUSED", "CANCELLED", "FAILED")}
    assert enums["MigrationPhase"] == source | only_told
    assert enums["SessionPhase"] | {"SESSION_PHASE_ABSENT"} == destination | {"SESSION_PHASE_UNSPECIFIED"}


def test_every_request_of_remote_names_its_migration(files: Files) -> None:
    file = files["phaul/v1/remote.proto"]
    messages = {f".phaul.v1.{message.name}": message for message in file.message_type}
    for method in file.service[0].method:
        first = messages[method.input_type].field[0]
        assert (first.name, first.number, first.type) == ("migration_id", 1, first.TYPE_STRING), method.name


def test_numbers_carry_their_unit(files: Files) -> None:
    """No integer is called `size` or `timeout`: bytes and rates say so, times are Duration or Timestamp."""
    unit_free = re.compile(r"(size|length|limit|offset|timeout|duration|time|rate|bandwidth|memory)$")
    for file in files.values():
        for message in file.message_type:
            for field in message.field:
                if not field.type_name and field.type in {field.TYPE_UINT32, field.TYPE_UINT64, field.TYPE_INT32}:
                    counts = field.name in {"page_size", "outgoing_limit", "incoming_limit"}
                    assert counts or not unit_free.search(field.name), f"{message.name}.{field.name}"
