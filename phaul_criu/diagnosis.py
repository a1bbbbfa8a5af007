"""Finds the reason of a failure in criu's answer and in its log file, and puts it into the error."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import Final, TypeVar

from phaul_criu import logs
from phaul_criu.errors import CriuError
from phaul_criu.requests import CriuResponse, DirectoryOptions

_Error = TypeVar("_Error", bound=CriuError)

#: A log at the debugging level of a big tree is a few MB.
_LARGEST_LOG_BYTES: Final = 16 << 20


def forget_log(options: DirectoryOptions) -> None:
    """Remove an earlier log of the same name, lest a criu that fails before it opens its log is blamed for it."""
    with suppress(OSError):  # there is none, or criu will say what is wrong with the directory
        os.unlink(options.log_file, dir_fd=options.log_dir_fd)


def failure(kind: type[_Error], op: str, response: CriuResponse, options: DirectoryOptions) -> _Error:
    """The error that an answer without success stands for."""
    number = response.cr_errno or None
    error = kind(op, "failed", errno=number)
    add_log(error, options)
    if not error.cause and response.cr_errmsg:
        _put(error, logs.explain(response.cr_errmsg))
    if not error.cause and number is not None:
        error.cause = "bad options" if number == errno.EBADRQC else os.strerror(number)
    return error


def add_log(error: CriuError, options: DirectoryOptions) -> None:
    """Complete an error that says no cause yet with what criu's log says."""
    text = read_log(options)
    if text and not error.cause:
        error.log_tail = logs.tail(text)
        if (cause := logs.first_cause(text)) is not None:
            _put(error, cause)


def read_log(options: DirectoryOptions) -> str:
    """The text of criu's log; empty if there is none."""
    try:
        fd = os.open(options.log_file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=options.log_dir_fd)
    except OSError:
        return ""
    with open(fd, "rb") as file:
        return file.read(_LARGEST_LOG_BYTES).decode(errors="replace")


def _put(error: CriuError, cause: logs.Cause) -> None:
    error.cause, error.code, error.remedy = cause.message, cause.code, cause.remedy
