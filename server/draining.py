"""An orderly end: after SIGTERM or SIGINT new requests get 503, running ones may end, then the process does."""

from __future__ import annotations

import asyncio
from types import FrameType

import uvicorn

from server.engine import AsyncEngine

FLUSH_SECONDS = 0.2  # for the last events of streams that were ended to reach the network


class DrainingServer(uvicorn.Server):
    """uvicorn, which would close its sockets at the first signal and wait for its streams without limit."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, drain_timeout: float) -> None:
        super().__init__(config)
        self.engine, self.drain_timeout = engine, drain_timeout
        self._draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None  # the loop itself would let it be collected

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; a second one ends the process as uvicorn does."""
        if self._draining or not self.started:
            super().handle_exit(sig, frame)
        else:
            assert self._loop is not None, "started"
            self._draining = True
            self._loop.call_soon_threadsafe(self._begin_to_drain)  # a signal handler must not touch the loop otherwise

    def _begin_to_drain(self) -> None:
        self._task = asyncio.create_task(self._drain_then_exit())

    async def _drain_then_exit(self) -> None:
        await drain(self.engine, self.drain_timeout)
        self.should_exit = True


async def drain(engine: AsyncEngine, timeout: float) -> None:
    """Take no more requests; those that run get `timeout` seconds, and then end with an error event."""
    await engine.drain(timeout)
    if engine.num_requests:
        await asyncio.to_thread(engine.stop)
        await asyncio.sleep(FLUSH_SECONDS)
