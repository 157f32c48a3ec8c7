"""An address in front of servers: connections that are open stay with the server they reached."""

import asyncio
import contextlib


class Forwarder:
    """Passes each new connection on to the server behind `port`."""

    def __init__(self, port):
        self.port = port
        self.address = 0
        self._open = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error):
        self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader, writer):
        task = asyncio.current_task()
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                there, back = await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(_pass(reader, back))
                        group.create_task(_pass(there, writer))
                finally:
                    back.close()
            finally:
                writer.close()


async def _pass(source, sink):
    with contextlib.suppress(OSError):
        while data := await source.read(65_536):
            sink.write(data)
            await sink.drain()
    sink.close()
