"""The engine in a thread of its own, and the tokens out of it into asyncio."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence

from .engine import Engine, EngineLost, Outputs, Request, Sample

log = logging.getLogger("attngen.serve")
Event = tuple[int, int, str | None]  # choice, token, why it ended


class Cancelled(RuntimeError):
    """The client went away, or what remained was not wanted."""


class Stream:
    """The tokens of some requests, in one queue; choice numbers count through the requests' samples."""

    def __init__(self, worker: Worker, requests: Sequence[Request]) -> None:
        self._worker, self.requests = worker, requests
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._first: dict[Request, int] = {}
        count = 0
        for request in requests:
            request.tag, self._first[request] = self, count
            count += request.n
        self.choices = count
        self._open = set(range(count))
        self.started = time.perf_counter()
        self.last: list[float | None] = [None] * count  # when each choice's last token came

    async def next(self) -> Event:
        """The next token of any choice. Raises what ended the requests too early."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def stop(self, choice: int) -> None:
        """One choice is over."""
        request = next(request for request in self.requests if 0 <= choice - self._first[request] < request.n)
        if choice in self._open:
            self._close(choice)
            self._worker.cancel(request, choice - self._first[request])

    def cancel(self, why: Exception | None = None) -> None:
        """All choices are over, and `next` raises ``why``, else Cancelled, after the tokens that have come."""
        if self._open:
            self._open.clear()
            self._worker.forget(self)
            for request in self.requests:
                self._worker.cancel(request)
            self._events.put_nowait(why or Cancelled("the request was cancelled"))

    # ---- from the worker, in the loop's thread
    def choice_of(self, sample: Sample) -> int:
        return self._first[sample.request] + sample.index

    def token(self, choice: int, token: int, reason: str | None) -> None:
        if choice in self._open:  # else a step was under way when it was stopped
            self._events.put_nowait((choice, token, reason))
            if reason:
                self._close(choice)

    def _close(self, choice: int) -> None:
        self._open.discard(choice)
        if not self._open:
            self._worker.forget(self)


class Worker(threading.Thread):
    """Steps the engine while there is work.

    observe: sees each token's stream, choice and time, in the loop's thread; for metrics.
    """

    def __init__(self, engine: Engine, observe: Callable[[Stream, int, float], None] = lambda *_: None) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine, self._observe = engine, observe
        self.lost: Exception | None = None  # why nothing can be served any more
        self._wake = threading.Condition()
        self._cancels: list[tuple[Request, int | None]] = []
        self._closing = False
        self._live: set[Stream] = set()

    def start_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start, and give tokens to streams of this loop."""
        self._loop = loop
        self.start()

    def submit(self, requests: Sequence[Request]) -> Stream:
        """In the loop's thread. Raises engine.Refused, or EngineLost where nothing can be served any more."""
        if self.lost is not None:
            raise EngineLost(str(self.lost))
        stream = Stream(self, requests)
        self.engine.submit(*requests)
        self._live.add(stream)
        with self._wake:
            self._wake.notify()
        return stream

    def cancel(self, request: Request, index: int | None = None) -> None:
        with self._wake:
            self._cancels.append((request, index))
            self._wake.notify()

    def forget(self, stream: Stream) -> None:
        self._live.discard(stream)

    def close(self) -> None:
        """Stop after the step under way; open streams end with an error."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        error: Exception = EngineLost("the server is shutting down")
        try:
            while self._wait():
                outputs = self.engine.step()
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs, time.perf_counter())
        except Exception as lost:
            log.exception("the engine is lost")
            error = lost if isinstance(lost, EngineLost) else EngineLost(f"the engine failed ({lost!r}): start the server again")
        self.lost = error
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end, error)

    def _wait(self) -> bool:
        """Until there is work; cancels first. False: no more."""
        with self._wake:
            while not (self._cancels or self.engine.has_work or self._closing):
                self._wake.wait()
            cancels, self._cancels = self._cancels, []
        for request, index in cancels:
            self.engine.cancel(request, index)
        return not self._closing

    # ---- in the loop's thread
    def _deliver(self, steps: Sequence[Outputs], now: float) -> None:
        for outputs in steps:
            reasons = dict(outputs.finished)
            for sample, token in zip(outputs.samples, outputs.tokens.tolist()):
                stream: Stream = sample.request.tag
                choice = stream.choice_of(sample)
                self._observe(stream, choice, now)
                stream.token(choice, token, reasons.get(sample))
            for request, error in outputs.failed:
                request.tag.cancel(error)

    def _end(self, error: Exception) -> None:
        for stream in list(self._live):
            stream.cancel(error)
