"""Places in the queue, taken before any work is done for the requests that will fill them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self


class Admission:
    """Places for requests that are still being made. Leaving it gives back those that no request has taken.

    owner: whose they are; arrived_at: time.monotonic() at which they were asked for, from which the times of their
    requests count.
    """

    def __init__(self, n_places: int, owner: str, arrived_at: float, give_back: Callable[[str, int], None]) -> None:
        self.owner, self.arrived_at, self._n_left, self._give_back = owner, arrived_at, n_places, give_back

    def take(self) -> None:
        """A request has come into being, and from now on has a place of its own."""
        assert self._n_left, "more requests than places"
        self._n_left -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        n_left, self._n_left = self._n_left, 0
        self._give_back(self.owner, n_left)
