"""/sessions: conversations kept by name. /generate and the routes under /v1 go on from one by its session_id."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from server.api.bodies import JSONRoute
from server.api.context import ContextOf, owner_of
from server.api.validation import Body, SessionId
from server.stores import Session

FILE = "application/octet-stream"
MAX_FORKS, MAX_LISTED = 256, 1000

SessionOfPath = Annotated[SessionId, Path()]
ERRORS = (401, 404, 413, 422, 429, 503)
FILE_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {FILE: {"schema": {"type": "string", "format": "binary"}}}}
}
FILE_ANSWER: dict[int | str, dict[str, Any]] = {200: {"content": {FILE: {}}}}

router = APIRouter(prefix="/sessions", tags=["sessions"], route_class=JSONRoute)
IMPORT_PATH = "/sessions/import"


class SessionCard(BaseModel):
    """num_tokens: of the whole conversation; times in seconds since 1970."""

    session_id: str
    turns: int
    num_tokens: int
    created_at: float
    used_at: float
    expires_at: float


class SessionList(BaseModel):
    sessions: list[SessionCard]


class SessionPage(SessionList):
    has_more: bool


class ForkRequest(Body):
    n: Annotated[int, Field(ge=1, le=MAX_FORKS, description="Sessions to make")] = 1


@router.post("", status_code=201)
async def create_session(context: ContextOf, request: Request) -> SessionCard:
    """A session without turns."""
    return card(await context.sessions.create(owner_of(request)))


@router.get("")
async def list_sessions(
    context: ContextOf,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100,
    after: Annotated[SessionId | None, Query(description="The last session of the page before")] = None,
) -> SessionPage:
    """The sessions of this API key, last used first."""
    found, has_more = await context.sessions.list(owner_of(request), limit, after)
    return SessionPage(sessions=[card(session) for session in found], has_more=has_more)


@router.post("/import", status_code=201, openapi_extra=FILE_BODY)
async def import_session(context: ContextOf, request: Request) -> SessionCard:
    """A new session from what /export gave, here or on another server of the same model."""
    return card(await context.sessions.import_(await request.body(), owner_of(request)))


@router.get("/{session_id}")
async def get_session(session_id: SessionOfPath, context: ContextOf, request: Request) -> SessionCard:
    return card(await context.sessions.get(session_id, owner_of(request)))


@router.delete("/{session_id}", status_code=204)
async def delete_session(session_id: SessionOfPath, context: ContextOf, request: Request) -> None:
    await context.sessions.delete(session_id, owner_of(request))


@router.post("/{session_id}/fork", status_code=201)
async def fork_session(
    session_id: SessionOfPath, body: ForkRequest, context: ContextOf, request: Request
) -> SessionList:
    """New sessions that go on from where this one is: as many as were asked for, or none."""
    forks = await context.sessions.fork(session_id, owner_of(request), body.n)
    return SessionList(sessions=[card(session) for session in forks])


@router.get("/{session_id}/export", response_class=Response, responses=FILE_ANSWER)
async def export_session(session_id: SessionOfPath, context: ContextOf, request: Request) -> Response:
    """The conversation as one file."""
    return Response(await context.sessions.export(session_id, owner_of(request)), media_type=FILE)


def card(session: Session) -> SessionCard:
    return SessionCard(
        session_id=session.session_id,
        turns=session.turn,
        num_tokens=session.num_tokens,
        created_at=session.created_at,
        used_at=session.used_at,
        expires_at=session.expires_at,
    )
