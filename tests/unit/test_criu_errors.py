"""The error tree is the one that its docstring draws."""

from __future__ import annotations

import inspect
import re

from phaul_criu import errors
from phaul_criu.errors import CriuDied, CriuError, DumpFailed


def test_the_docstring_names_every_class_and_no_other() -> None:
    drawn = set(re.findall(r"(?:├──|└──) (\w+)|^(\w+)\(op", inspect.getdoc(errors) or "", re.MULTILINE))
    names = {first or second for first, second in drawn}
    assert names == {
        name for name, item in vars(errors).items() if inspect.isclass(item) and item.__module__ == errors.__name__
    }


def test_every_error_is_a_criu_error() -> None:
    classes = [item for item in vars(errors).values() if inspect.isclass(item)]
    assert all(issubclass(item, CriuError) for item in classes)


def test_the_text_says_operation_message_and_cause() -> None:
    assert str(DumpFailed("dump", "failed", cause="Can't lookup mount")) == "criu dump: failed: Can't lookup mount"
    assert (
        str(CriuDied("restore", "criu was killed by signal 9", signal=9)) == "criu restore: criu was killed by signal 9"
    )
