"""Options become criu's messages: every field arrives, nothing else is sent."""

from __future__ import annotations

from dataclasses import fields

import pytest

from phaul_criu import requests
from phaul_criu.requests import (
    CgroupMode,
    DirectoryOptions,
    DumpOptions,
    InheritFd,
    NetworkLock,
    PageServerOptions,
    PreDumpMode,
    RestoreOptions,
)
from phaul_criu.rpc import rpc_pb2

FULL_DUMP = DumpOptions(
    images_dir_fd=3,
    work_dir_fd=4,
    log_file="a.log",
    log_level=4,
    notify=True,
    shell_job=True,
    tcp_established=True,
    tcp_close=True,
    tcp_skip_in_flight=True,
    ext_unix_sk=True,
    file_locks=True,
    link_remap=True,
    evasive_devices=True,
    skip_file_rwx_check=True,
    manage_cgroups_mode=CgroupMode.SOFT,
    network_lock=NetworkLock.IPTABLES,
    kept_fds=(11,),
    external=("mnt[/a]:b", "unix[7]"),
    inherit_fds=(InheritFd(key="pipe:[1]", fd=8),),
    root="/new",
    lsm_profile="apparmor:x",
    collect_timeout_seconds=9,
    auto_dedup=True,
    pid=42,
    parent_img="../1",
    track_mem=True,
    leave_running=True,
    page_server_fd=5,
    lazy_pages_fd=9,
    ghost_limit_bytes=1 << 21,
    pre_dump_mode=PreDumpMode.READ,
    freeze_cgroup="/sys/fs/cgroup/x",
    status_fd=6,
)


def test_a_full_dump_arrives_whole() -> None:
    request = requests.dump_request(FULL_DUMP)
    assert request.type == rpc_pb2.DUMP
    expected = rpc_pb2.criu_opts(
        images_dir_fd=3,
        work_dir_fd=4,
        log_file="a.log",
        log_level=4,
        notify_scripts=True,
        shell_job=True,
        tcp_established=True,
        tcp_close=True,
        tcp_skip_in_flight=True,
        ext_unix_sk=True,
        file_locks=True,
        link_remap=True,
        evasive_devices=True,
        skip_file_rwx_check=True,
        manage_cgroups_mode=rpc_pb2.SOFT,
        network_lock=rpc_pb2.IPTABLES,
        external=["mnt[/a]:b", "unix[7]"],
        inherit_fd=[rpc_pb2.inherit_fd(key="pipe:[1]", fd=8)],
        root="/new",
        lsm_profile="apparmor:x",
        timeout=9,
        auto_dedup=True,
        pid=42,
        parent_img="../1",
        track_mem=True,
        leave_running=True,
        ps=rpc_pb2.criu_page_server_info(fd=5),
        lazy_pages=True,
        ghost_limit=1 << 21,
        pre_dump_mode=rpc_pb2.VM_READ,
        freeze_cgroup="/sys/fs/cgroup/x",
        status_fd=6,
    )
    assert request.opts == expected


def test_the_full_dump_of_this_test_leaves_no_field_at_its_default() -> None:
    plain = DumpOptions(images_dir_fd=3, pid=42)
    same = {field.name for field in fields(plain) if getattr(plain, field.name) == getattr(FULL_DUMP, field.name)}
    assert same == {"images_dir_fd", "pid", "notify"}


def test_defaults_send_what_differs_from_criu_and_nothing_more() -> None:
    request = requests.dump_request(DumpOptions(images_dir_fd=3, pid=42))
    sent = {descriptor.name for descriptor, _value in request.opts.ListFields()}
    assert sent == {
        "images_dir_fd",
        "pid",
        "log_file",
        "log_level",
        "notify_scripts",
        "manage_cgroups_mode",
        "network_lock",
        "pre_dump_mode",
    }
    assert request.opts.network_lock == rpc_pb2.SKIP
    assert request.opts.manage_cgroups_mode == rpc_pb2.IGNORE


def test_the_network_is_locked_only_for_connections_that_are_carried() -> None:
    dump = requests.dump_request(DumpOptions(images_dir_fd=3, pid=1, tcp_established=True))
    assert dump.opts.network_lock == rpc_pb2.NFTABLES
    restore = requests.restore_request(RestoreOptions(images_dir_fd=3, tcp_established=True))
    assert restore.opts.network_lock == rpc_pb2.NFTABLES
    assert requests.restore_request(RestoreOptions(images_dir_fd=3)).opts.network_lock == rpc_pb2.SKIP


def test_pre_dump_is_a_single_one() -> None:
    assert requests.pre_dump_request(FULL_DUMP).type == rpc_pb2.SINGLE_PRE_DUMP


def test_restore_options_arrive() -> None:
    options = RestoreOptions(
        images_dir_fd=3, lazy_pages=True, sibling=True, inherit_fds=(InheritFd(key="extRootNetNS", fd=9),)
    )
    request = requests.restore_request(options)
    assert request.type == rpc_pb2.RESTORE
    assert request.opts.lazy_pages
    assert request.opts.rst_sibling
    assert not request.opts.HasField("pid")
    assert [(item.key, item.fd) for item in request.opts.inherit_fd] == [("extRootNetNS", 9)]
    assert options.passed_fds == (9,)


def test_a_page_server_keeps_its_connection_open() -> None:
    request = requests.page_server_request(PageServerOptions(images_dir_fd=3, parent_img="../1"), 8)
    assert request.type == rpc_pb2.PAGE_SERVER_CHLD
    assert request.keep_open
    assert request.opts.ps.fd == 8
    assert request.opts.parent_img == "../1"


def test_criu_must_be_started_with_the_descriptors_that_are_numbers_there() -> None:
    assert FULL_DUMP.passed_fds == (8, 5, 9, 11)
    assert DumpOptions(images_dir_fd=3, work_dir_fd=4, pid=1, status_fd=6).passed_fds == ()


@pytest.mark.parametrize(("work_dir_fd", "expected"), [(None, 3), (4, 4), (0, 0)])
def test_the_log_lies_in_the_work_directory(work_dir_fd: int | None, expected: int) -> None:
    assert DirectoryOptions(images_dir_fd=3, work_dir_fd=work_dir_fd).log_dir_fd == expected


@pytest.mark.parametrize("success", [True, False])
def test_answers_to_notifications(success: bool) -> None:
    answer = requests.notify_answer(success)
    assert answer.type == rpc_pb2.NOTIFY
    assert answer.notify_success is success
    assert answer.HasField("notify_success")


def test_the_socket_of_lazy_pages_goes_into_a_configuration_file() -> None:
    assert requests.dump_config(FULL_DUMP) == "ps-socket 9\n"
    assert requests.dump_config(DumpOptions(images_dir_fd=3, pid=42)) == ""
    assert requests.dump_request(FULL_DUMP, "/x/criu.conf").opts.config_file == "/x/criu.conf"
