"""A link that takes its time: forwards connections to a port, and what goes through them, late."""

from __future__ import annotations

import argparse
import asyncio
import contextlib


def main() -> None:
    """Forward until the process ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int, help="to listen at")
    parser.add_argument("target", type=int, help="port to forward to")
    parser.add_argument("round_trip_ms", type=float, help="of a connection's start, and of a request and its answer")
    args = parser.parse_args()
    asyncio.run(_serve(args.port, args.target, args.round_trip_ms / 1e3))


async def _serve(port: int, target: int, round_trip_s: float) -> None:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(round_trip_s)
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(
            _forward(reader, other_writer, round_trip_s / 2), _forward(other_reader, writer, round_trip_s / 2)
        )

    server = await asyncio.start_server(connect, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, late_s: float) -> None:
    """Forward one direction; what comes in meanwhile is not later for it."""
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    async def receive() -> None:
        while True:
            data = await reader.read(1 << 16)
            queue.put_nowait((loop.time() + late_s, data))
            if not data:
                return

    async def send() -> None:
        while True:
            when, data = await queue.get()
            await asyncio.sleep(max(0.0, when - loop.time()))
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    with contextlib.suppress(ConnectionError):
        await asyncio.gather(receive(), send())


if __name__ == "__main__":
    main()
