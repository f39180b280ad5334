"""Places in the queue, taken before any work is done for the requests that will fill them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self


class Admission:
    """Places for requests that are still being made. Leaving it gives back those that no request has taken.

    arrived_at: time.monotonic() at which they were asked for; the times of their requests count from there.
    """

    def __init__(self, n_places: int, arrived_at: float, give_back: Callable[[int], None]) -> None:
        self.arrived_at, self._n_left, self._give_back = arrived_at, n_places, give_back

    def take(self) -> None:
        """A request has come into being, and from now on has a place of its own."""
        assert self._n_left, "more requests than places"
        self._n_left -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        n_left, self._n_left = self._n_left, 0
        self._give_back(n_left)
