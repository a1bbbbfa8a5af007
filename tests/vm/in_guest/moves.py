"""Moves a workload between the guests, as an orchestrator would, and tells what it saw as lines of JSON.

    moves.py STEPS

STEPS is a JSON array; each step is one of
    {"run": NAME, "argv": […], "on": "a"}                       "spec": further fields of its WorkloadSpec
    {"ask": NAME, "on": "a", "port": N, "question": TEXT}       of writer.py
    {"move": NAME, "from": "a", "to": "b", "options": {…}}      options as in phaul.v1.Options
                                                                "switch": true: to post-copy, in its first round
                                                                that has sent so much that it is under way
    {"start": NAME, "id": ID, "from": "a", "to": "b", "options": {…}}     as move, but not waited for
    {"until": ID, "from": "a", "phases": ["HELD", …]}           its record, when it is in one of them
    {"resolve": ID, "from": "a", "resolution": "RESUME", "reason": TEXT}
    {"gate": "b", "port": N, "holds": STEP}                     waits until gate.py there holds a criu at the step
    {"stop": NAME, "on": "b"}
    {"sleep": SECONDS}
and each is answered with one line. One process for many steps: an emulated Python takes seconds to start.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, TypeAlias

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

from phaul.v1 import migrations_pb2, migrations_pb2_grpc, node_pb2, node_pb2_grpc, types_pb2

Answer: TypeAlias = dict[str, Any]
Channels: TypeAlias = Mapping[str, grpc.aio.Channel]

PORT = 7707
SOCKET = "unix:/run/phaul/phauld.sock"
ANSWER_SECONDS = 120.0
SWITCH_BYTES = 1 << 20
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}


def as_dict(message: Message) -> Answer:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


async def ask(step: Answer) -> Answer:
    """A datagram is lost now and then: ask again."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        await loop.sock_connect(client, (socket.gethostbyname(step["on"]), step["port"]))
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                try:
                    client.send(step["question"].encode())
                    async with asyncio.timeout(20 if step["question"] == "check" else 1):
                        answer: Answer = json.loads(await loop.sock_recv(client, 4096))
                        return answer
                except (ConnectionRefusedError, TimeoutError):
                    await asyncio.sleep(0.2)


async def run(channels: Channels, step: Answer) -> Answer:
    spec = types_pb2.WorkloadSpec(
        name=step["run"],
        argv=step["argv"],
        env=ENVIRONMENT,
        working_directory="/",
        own_time_namespace=True,
        **step.get("spec", {}),
    )
    stub: node_pb2_grpc.NodeAsyncStub = node_pb2_grpc.NodeStub(channels[step["on"]])
    return as_dict((await stub.RunWorkload(node_pb2.RunWorkloadRequest(spec=spec))).workload)


async def move(channels: Channels, step: Answer) -> Answer:
    stub: migrations_pb2_grpc.MigrationsAsyncStub = migrations_pb2_grpc.MigrationsStub(channels[step["from"]])
    options = json_format.ParseDict(step.get("options", {}), types_pb2.Options())
    request = migrations_pb2.StartMigrationRequest(workload=step["move"], destination=step["to"], options=options)
    started = (await stub.StartMigration(request)).migration
    last = started
    async for answer in stub.WatchMigration(migrations_pb2.WatchMigrationRequest(migration_id=started.migration_id)):
        last = answer.migration
        if step.get("switch") and last.bytes_sent > SWITCH_BYTES:
            step["switch"] = False
            wish = migrations_pb2.UpdateMigrationRequest(migration_id=last.migration_id, switch_to_post_copy=True)
            await stub.UpdateMigration(wish)
    return as_dict(last)


async def start(channels: Channels, step: Answer) -> Answer:
    stub: migrations_pb2_grpc.MigrationsAsyncStub = migrations_pb2_grpc.MigrationsStub(channels[step["from"]])
    options = json_format.ParseDict(step.get("options", {}), types_pb2.Options())
    request = migrations_pb2.StartMigrationRequest(
        workload=step["start"], migration_id=step["id"], destination=step["to"], options=options
    )
    return as_dict((await stub.StartMigration(request)).migration)


async def until(channels: Channels, step: Answer) -> Answer:
    stub: migrations_pb2_grpc.MigrationsAsyncStub = migrations_pb2_grpc.MigrationsStub(channels[step["from"]])
    phases = {f"MIGRATION_PHASE_{each}" for each in step["phases"]}
    async with asyncio.timeout(ANSWER_SECONDS):
        while True:
            answer = await stub.GetMigration(migrations_pb2.GetMigrationRequest(migration_id=step["until"]))
            if types_pb2.MigrationPhase.Name(answer.migration.phase) in phases:
                return as_dict(answer.migration)
            await asyncio.sleep(0.2)


async def resolve(channels: Channels, step: Answer) -> Answer:
    stub: migrations_pb2_grpc.MigrationsAsyncStub = migrations_pb2_grpc.MigrationsStub(channels[step["from"]])
    request = migrations_pb2.ResolveRequest(
        migration_id=step["resolve"],
        resolution=migrations_pb2.Resolution.Value(f"RESOLUTION_{step['resolution']}"),
        reason=step["reason"],
    )
    return as_dict((await stub.Resolve(request)).migration)


async def gate(step: Answer) -> None:
    async with asyncio.timeout(ANSWER_SECONDS):
        while True:
            reader, writer = await asyncio.open_connection(step["gate"], step["port"])
            held = json.loads(await reader.read())
            writer.close()
            if step["holds"] in held:
                return
            await asyncio.sleep(0.1)


async def stop(channels: Channels, step: Answer) -> Answer:
    stub: node_pb2_grpc.NodeAsyncStub = node_pb2_grpc.NodeStub(channels[step["on"]])
    answer = as_dict((await stub.StopWorkload(node_pb2.StopWorkloadRequest(name=step["stop"]))).workload)
    await stub.RemoveWorkload(node_pb2.RemoveWorkloadRequest(name=step["stop"]))
    return answer


async def take(channels: Channels, step: Answer) -> Answer | None:
    if "ask" in step:
        return await ask(step)
    if "run" in step:
        return await run(channels, step)
    if "move" in step:
        return await move(channels, step)
    if "start" in step:
        return await start(channels, step)
    if "until" in step:
        return await until(channels, step)
    if "resolve" in step:
        return await resolve(channels, step)
    if "gate" in step:
        await gate(step)
        return None
    if "stop" in step:
        return await stop(channels, step)
    await asyncio.sleep(step["sleep"])
    return None


async def main() -> None:
    addresses = {name: f"{name}:{PORT}" for name in ("a", "b")} | {socket.gethostname(): SOCKET}  # here also with TLS
    channels = {name: grpc.aio.insecure_channel(address) for name, address in addresses.items()}
    for step in json.loads(sys.argv[1]):
        started = time.monotonic()
        answer = await take(channels, step)
        print(json.dumps({"answer": answer, "seconds": round(time.monotonic() - started, 3)}), flush=True)
        if "move" in step and answer is not None and answer["phase"] != "MIGRATION_PHASE_DONE":
            sys.exit(f"{step['move']} did not move: {answer.get('error')}")  # nobody would answer there


asyncio.run(main())
