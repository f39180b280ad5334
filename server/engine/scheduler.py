"""Which requests advance in a step, and by how many tokens. Knows numbers only: no tensors, no clock of its own."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Collection, Iterator

from server.engine.request import Request

PRIORITY_SECONDS = 10.0  # a request waits at most this much longer for each step of priority: none starves


class Scheduler:
    """Queue and admission. A request is admitted with a slot for each of its texts, so it never has to give one back.

    A prompt is read in chunks that end at multiples of `chunk_size`, whatever else goes on, so the arithmetic of a
    request does not depend on the load. Requests that read prompts take turns, one chunk each.
    """

    def __init__(self, *, n_slots: int, chunk_size: int) -> None:
        self.n_slots, self.chunk_size, self.n_free_slots = n_slots, chunk_size, n_slots
        self._waiting: list[tuple[float, int, Request]] = []
        self._arrivals = itertools.count()
        self._reading: deque[Request] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_reading(self) -> int:
        return len(self._reading)

    def add(self, request: Request, now: float) -> None:
        rank = now + PRIORITY_SECONDS * request.priority
        heapq.heappush(self._waiting, (rank, next(self._arrivals), request))

    def admit(self) -> Iterator[Request]:
        """Requests that start now. The first in the queue waits until its slots are free, and all others behind it."""
        while self._waiting and self._waiting[0][2].params.n_generated <= self.n_free_slots:
            request = heapq.heappop(self._waiting)[2]
            self.n_free_slots -= request.params.n_generated
            self._reading.append(request)
            yield request

    def chunks(self, n_decoding: int) -> Iterator[tuple[Request, int]]:
        """(request, end) for each prompt to be read up to token `end` in this step.

        A step is of so many tokens that a chunk is read while a full batch decodes, and of more prompts beside fewer.
        """
        budget = self.n_slots + self.chunk_size - n_decoding
        for _ in range(len(self._reading)):
            request = self._reading[0]
            start = request.num_computed_tokens
            end = min(request.num_prompt_tokens, (start // self.chunk_size + 1) * self.chunk_size)
            if end - start > budget:
                return
            budget -= end - start
            self._reading.rotate(-1)
            yield request, end

    def finish_reading(self, request: Request) -> None:
        """The prompt is read; its slots stay taken."""
        self._reading.remove(request)

    def free_slots(self, n_slots: int) -> None:
        self.n_free_slots += n_slots
        assert self.n_free_slots <= self.n_slots

    def requests(self) -> Iterator[Request]:
        """All that wait or read."""
        yield from (entry[2] for entry in self._waiting)
        yield from self._reading

    def remove(self, requests: Collection[Request]) -> None:
        """Take out those that wait or read; frees the slots of those that had some."""
        self._waiting = [entry for entry in self._waiting if entry[2] not in requests]
        heapq.heapify(self._waiting)
        for request in [request for request in self._reading if request in requests]:
            self._reading.remove(request)
            self.free_slots(request.params.n_generated)
