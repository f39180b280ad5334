"""GET /ui: a playground in one page, without anything from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

PAGE = Path(__file__).parent / "ui.html"
# The page runs only its own script and talks only to this server.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"

router = APIRouter(tags=["operations"])


@router.get("/ui", response_class=HTMLResponse)
def playground() -> HTMLResponse:
    """A page to write prompts and read texts."""
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})
