"""Imports go down only: model <- server.engine <- server.stores <- server.sessions <- server.api <- command lines."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABOVE_ENGINE = {"server.api", "server.sessions", "server.stores", "server.metrics"}
FORBIDDEN = {
    "model": {"server", "fastapi", "starlette", "uvicorn", "pydantic", "llguidance"},
    "server/engine": {*ABOVE_ENGINE, "fastapi", "starlette", "uvicorn", "pydantic", "typer", "rich"},
    "server/engine/scheduler.py": {"torch"},
    "server/stores": {"server.api", "server.sessions", "server.metrics", "fastapi", "pydantic", "torch"},
    "server/sessions": {"server.api", "server.metrics", "fastapi", "starlette", "uvicorn", "pydantic", "torch"},
    "server/api": {"typer", "uvicorn"},
    "server/deploy": {"server.commands"},
    "server/settings.py": {"typer", "torch", "model", "server.options"},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_go_down_only(place: str) -> None:
    paths = [ROOT / place] if place.endswith(".py") else list((ROOT / place).rglob("*.py"))
    assert paths
    for path in paths:
        for name in imported(path):
            for forbidden in FORBIDDEN[place]:
                assert name != forbidden, f"{path} imports {name}"
                assert not name.startswith(f"{forbidden}."), f"{path} imports {name}"


def test_pydantic_and_fastapi_live_under_the_api() -> None:
    """And where the application is put together."""
    around = {ROOT / "server" / name for name in ("api", "deploy", "assemble.py")}
    for path in (ROOT / "server").rglob("*.py"):
        if not around & {path, *path.parents}:
            assert not {name.split(".")[0] for name in imported(path)} & {"pydantic", "fastapi", "starlette"}, path
