"""Periodic timers that had expired when they were dumped go on."""

from __future__ import annotations

import pytest

from phaul_criu.chains import framed, messages
from phaul_criu.rpc import fdinfo_pb2
from phaul_criu.timers import rearm

MAGICS = b"\x54\x56\x43\x19magc"
TIMERFD = fdinfo_pb2.fd_types.Value("TIMERFD")
TIMER = {
    "id": 1,
    "flags": 0,
    "clockid": 1,
    "settime_flags": 0,
    "ticks": 1,
    "vsec": 0,
    "vnsec": 0,
    "isec": 0,
    "insec": 0,
}


def files(*timers: dict[str, int]) -> bytes:
    entries = [fdinfo_pb2.file_entry(type=fdinfo_pb2.fd_types.Value("PIPE"), id=7)]
    for timer in timers:
        entry = fdinfo_pb2.file_entry(type=TIMERFD, id=1)
        for name, value in {**TIMER, **timer}.items():
            setattr(entry.tfd, name, value)
        entry.tfd.fown.SetInParent()
        for name in ("uid", "euid", "signum", "pid_type", "pid"):
            setattr(entry.tfd.fown, name, 0)
        entries.append(entry)
    return MAGICS + b"".join(framed(entry.SerializeToString()) for entry in entries)


def test_one_that_has_expired_expires_again_at_once() -> None:
    before = files({"insec": 50_000_000}, {"vnsec": 3, "insec": 50_000_000}, {"isec": 2})
    after = rearm(before)
    assert after is not None
    assert after[:8] == MAGICS
    pipe, *timers = (fdinfo_pb2.file_entry.FromString(content) for content in messages(after))
    assert pipe.id == 7
    assert [(each.tfd.vnsec, each.tfd.isec, each.tfd.insec, each.tfd.ticks) for each in timers] == [
        (1, 0, 50_000_000, 1),
        (3, 0, 50_000_000, 1),
        (1, 2, 0, 1),
    ]


def test_others_stay_as_they_are() -> None:
    assert rearm(files({"vsec": 1, "insec": 5}, {"ticks": 1})) is None  # still to come; once, and it has come
    assert rearm(files()) is None


@pytest.mark.parametrize("damaged", [files({"insec": 1})[:-3], MAGICS + framed(b"\xff\xff\xff")])
def test_what_is_no_such_image_is_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut|damaged"):
        rearm(damaged)
