"""Which requests advance in a step, and by how many tokens. Knows numbers only: no tensors, no clock of its own."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from server.engine.request import Request

PRIORITY_SECONDS = 10.0  # a request waits at most this much longer for each step of priority: none starves


@dataclass(order=True)
class _Place:
    """Where a request stands among those of its owner, until each of its texts has had a slot.

    n_wanted: slots that it waits for; is_read: whether its prompt is, so that a slot is for its next text.
    """

    rank: float
    arrival: int
    request: Request = field(compare=False)
    added_at: float = field(compare=False)
    n_wanted: int = field(compare=False)
    is_read: bool = field(default=False, compare=False)


class Scheduler:
    """Queue and slots. A text gets its slot when it starts and keeps it to its end, so none has to give one back.

    A request of n texts waits for one slot at a time, as n requests would: it holds up nobody until n are free, and
    nobody has to stand aside for it. A free slot is given to the owner who uses the fewest, and to who came first among
    those; an owner's own requests go by priority and arrival. No owner uses more than max_slots_per_owner.

    A prompt is read in chunks that end at multiples of `chunk_size`, whatever else goes on, so the arithmetic of a
    request does not depend on the load. Requests that read prompts take turns, one chunk each.
    """

    def __init__(self, *, n_slots: int, chunk_size: int) -> None:
        self.n_slots, self.chunk_size, self.n_free_slots = n_slots, chunk_size, n_slots
        self.max_slots_per_owner = n_slots
        self._queues: dict[str, list[_Place]] = {}  # heaps, by owner
        self._n_used: Counter[str] = Counter()  # slots, by owner
        self._arrivals = itertools.count()
        self._reading: deque[_Place] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return sum(not place.is_read for place in self._queued())

    @property
    def num_reading(self) -> int:
        return len(self._reading)

    @property
    def is_empty(self) -> bool:
        """Whether nobody reads a prompt or waits for a slot."""
        return not (self._reading or self._queues)

    def add(self, request: Request, now: float) -> None:
        rank = now + PRIORITY_SECONDS * request.priority
        self._queue(_Place(rank, next(self._arrivals), request, now, request.params.n_generated))

    def admit(self) -> Iterator[Request]:
        """Requests that get a slot now, once for each: first one to read the prompt in, then others for more texts."""
        while self.n_free_slots and (owner := self._next_owner()) is not None:
            queue = self._queues[owner]
            place = queue[0]
            place.n_wanted -= 1
            if not (place.is_read and place.n_wanted):
                heapq.heappop(queue)
                if not queue:
                    del self._queues[owner]
            if not place.is_read:
                self._reading.append(place)
            self.n_free_slots -= 1
            self._n_used[owner] += 1
            yield place.request

    def _next_owner(self) -> str | None:
        """Whose first request gets the next slot. Across owners priority has no say."""
        allowed = (owner for owner in self._queues if self._n_used[owner] < self.max_slots_per_owner)
        return min(allowed, key=lambda owner: (self._n_used[owner], self._queues[owner][0].added_at), default=None)

    def chunks(self, n_decoding: int) -> Iterator[tuple[Request, int]]:
        """(request, end) for each prompt to be read up to token `end` in this step.

        A step is of so many tokens that a chunk is read while a full batch decodes, and of more prompts beside fewer.
        """
        budget = self.n_slots + self.chunk_size - n_decoding
        for _ in range(len(self._reading)):
            request = self._reading[0].request
            start = request.num_computed_tokens
            end = min(request.num_prompt_tokens, (start // self.chunk_size + 1) * self.chunk_size)
            if end - start > budget:
                return
            budget -= end - start
            self._reading.rotate(-1)
            yield request, end

    def finish_reading(self, request: Request) -> None:
        """The prompt is read. Its slot is that of the first text; the others wait for theirs where the request was."""
        (place,) = (place for place in self._reading if place.request is request)
        self._reading.remove(place)
        place.is_read = True
        if place.n_wanted:
            self._queue(place)

    def free_slot(self, request: Request) -> None:
        """A text of the request has ended."""
        self.n_free_slots += 1
        self._n_used[request.owner] -= 1
        assert self.n_free_slots <= self.n_slots
        if not self._n_used[request.owner]:
            del self._n_used[request.owner]

    def requests(self) -> Iterator[Request]:
        """All that wait, for their first slot or another one, or read."""
        yield from (place.request for place in self._queued())
        yield from (place.request for place in self._reading)

    def remove(self, requests: Collection[Request]) -> None:
        """Take out those that wait or read; frees the slots of those that read."""
        for owner, queue in list(self._queues.items()):
            queue[:] = [place for place in queue if place.request not in requests]
            heapq.heapify(queue)
            if not queue:
                del self._queues[owner]
        for place in [place for place in self._reading if place.request in requests]:
            self._reading.remove(place)
            self.free_slot(place.request)

    def _queue(self, place: _Place) -> None:
        heapq.heappush(self._queues.setdefault(place.request.owner, []), place)

    def _queued(self) -> Iterator[_Place]:
        for queue in list(self._queues.values()):  # a copy: metrics look from another thread
            yield from list(queue)
