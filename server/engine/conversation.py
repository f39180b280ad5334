"""What a text leaves behind, so that another request goes on from it."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.snapshot import Snapshot


@dataclass(frozen=True)
class Conversation:
    """snapshot: after the tokens that were read; unread_ids: tokens that were chosen since, and are to be read next."""

    snapshot: Snapshot
    unread_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.snapshot.state.position[0]) + len(self.unread_ids)
