"""What the routes of an application share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from server.api.chat_template import ChatTemplate
from server.api.config import APIConfig
from server.engine import AsyncEngine
from server.errors import ModelNotFoundError
from server.metrics import Metrics
from server.sessions import Sessions

# huggingface_hub and text-generation send these whatever the model is called, and @huggingface/inference this address.
PLACEHOLDER_NAMES = frozenset({"", "dummy", "tgi"})
ADDRESSES = ("http://", "https://")


@dataclass(frozen=True)
class Context:
    engine: AsyncEngine
    config: APIConfig
    metrics: Metrics
    chat_template: ChatTemplate
    sessions: Sessions
    started_at: int  # seconds since 1970

    @property
    def model_names(self) -> tuple[str, ...]:
        """What bodies may ask for."""
        return (self.config.model_name,)

    def model_named(self, name: str | None) -> str:
        """The name of the model that is meant. Raises ModelNotFoundError for a name that nothing here has."""
        if name is None or name in PLACEHOLDER_NAMES or name.startswith(ADDRESSES):
            return self.config.model_name
        if name not in self.model_names:
            raise ModelNotFoundError(
                f"There is no model {name[:100]!r} here, only {', '.join(map(repr, self.model_names))}."
            )
        return name


async def _of(request: Request) -> Context:  # FastAPI runs what is not async in a thread
    context: Context = request.app.state.context
    return context


def owner_of(request: Request) -> str:
    """Whose sessions a request may see: one name for each API key, and one for everyone where there are no keys."""
    owner: str = getattr(request.state, "owner", "")
    return owner


def prefix_salt(request: Request, context: Context, given: str | None) -> str:
    """Whose cached prefixes a request may go on from: those of its owner, or of all who give the same salt.

    given: the body's cache_salt. No key can see by a hit, or by its own times, what another has asked.
    """
    if given:
        return f"given {given}"
    owner = "" if context.config.share_prefix_cache else owner_of(request)
    return f"of {owner}" if owner else ""


ContextOf = Annotated[Context, Depends(_of)]
