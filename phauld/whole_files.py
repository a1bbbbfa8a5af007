"""JSON files that are written whole or not at all, and are durable then: what shims and phauld tell each other.

With the standard library alone: see `bare.py`.
"""

import json
import os
import time

RETRY_SECONDS = 0.2


def write_json(directory: str, name: str, content: dict[str, object]) -> None:
    """Write a file whole or not at all, and make it durable."""
    temporary = os.path.join(directory, f".{name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, os.path.join(directory, name))
    except OSError:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def insist(directory: str, name: str, content: dict[str, object]) -> None:
    """Write a file that phauld decides by: while the disk is full, again and again."""
    while True:
        try:
            return write_json(directory, name, content)
        except OSError:
            time.sleep(RETRY_SECONDS)
