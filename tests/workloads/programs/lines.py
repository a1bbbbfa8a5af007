"""A server of lines for asyncio: adds up the numbers that it is sent, each once and in order.  lines.py PORT"""

import asyncio
import sys

state = [0, 0]  # the last number, and the sum


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        number = int(line)
        if number == state[0] + 1:  # else it is asked again
            state[:] = [number, (state[1] * 31 + number) % 1000003]
        writer.write(b"%d %d\n" % (state[0], state[1]))
        await writer.drain()


async def main() -> None:
    server = await asyncio.start_server(serve, "0.0.0.0", int(sys.argv[1]))
    await server.serve_forever()


asyncio.run(main())
