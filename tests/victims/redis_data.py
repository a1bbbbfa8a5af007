"""The data of a redis in the demo, the tests and the benchmarks: fill it, sum it up, look for the writer's writes.

redis_data.py ADDRESS PORT load --keys N [--mib N]     fill database 0
redis_data.py ADDRESS PORT digest                      {"keys", "digest"} of database 0
redis_data.py ADDRESS PORT lost --acknowledged N       {"lost"}: acknowledged writes that are not there
"""

import argparse
import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import redis

MIB = 1 << 20
BATCH = 1000
LARGE_BATCH = 8
WRITER_DATABASE = 1
Item = TypeVar("Item")


def load(client: redis.Redis, keys: int, mib: int) -> None:
    """`keys` small values, and `mib` values of 1 MiB that do not compress."""
    noise = random.Random(keys)
    for names in _batches([f"key:{number}" for number in range(keys)], BATCH):
        client.mset({name: noise.randbytes(16).hex() for name in names})
    for number in range(mib):
        client.set(f"block:{number}", noise.randbytes(MIB))


def digest(client: redis.Redis) -> dict[str, object]:
    """How many keys there are, and a hash of all keys and values."""
    total = hashlib.blake2b(digest_size=16)
    names = sorted(set(client.scan_iter(count=BATCH)))
    large = [name for name in names if name.startswith(b"block:")]
    small = [name for name in names if not name.startswith(b"block:")]
    for batch in itertools.chain(_batches(small, BATCH), _batches(large, LARGE_BATCH)):
        for name, value in zip(batch, client.mget(batch), strict=True):
            assert isinstance(value, bytes)
            total.update(b"%d %s %d " % (len(name), name, len(value)))
            total.update(value)
    return {"keys": client.dbsize(), "digest": total.hexdigest()}


def lost(client: redis.Redis, acknowledged: int) -> int:
    """How many of the writer's first so many writes are not there."""
    missing = 0
    for batch in _batches(range(acknowledged), BATCH):
        values = client.mget([str(number) for number in batch])
        missing += sum(value != b"%d" % number for number, value in zip(batch, values, strict=True))
    return missing


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("action", choices=["load", "digest", "lost"])
    parser.add_argument("--keys", type=int, default=0)
    parser.add_argument("--mib", type=int, default=0)
    parser.add_argument("--acknowledged", type=int, default=0)
    arguments = parser.parse_args()
    database = WRITER_DATABASE if arguments.action == "lost" else 0
    client = redis.Redis(arguments.address, arguments.port, db=database)
    match arguments.action:
        case "load":
            load(client, arguments.keys, arguments.mib)
        case "digest":
            print(json.dumps(digest(client)))
        case "lost":
            print(json.dumps({"lost": lost(client, arguments.acknowledged)}))


if __name__ == "__main__":
    main()
