"""Imports go down only: model and grammars <- engine <- stores <- sessions <- server.api <- command lines.

An import counts wherever it stands, in a function as well, and so does what comes with it, however far down. What is
imported for types only does not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HTTP = {"fastapi", "starlette", "uvicorn", "pydantic"}
COMMANDS = {"server.commands", "server.__main__"}
# By the beginning of a module's name: what it may not import, itself or through others.
FORBIDDEN = {
    "model": {"server", "llguidance", "typer", *HTTP},
    # Families and backends stand on one floor: neither knows the other.
    "model.families": {"model.backends"},
    "model.recurrences": {"model.backends", "model.families"},
    "model.backends": {"model.families"},
    "model.ops": {"model.families", "model.backends", "model.recurrences"},
    "server.settings": {"typer", "torch", "model", "server.options"},
    "server.grammars": {"torch", "model", "server.engine", *HTTP},
    "server.limited_processes": {"torch", "model", "server.api", "server.engine", *HTTP},
    "server.api.template_renderer": {"torch", "model", "server.engine", "server.limited_processes", *HTTP},
    "server.engine": {"server.api", "server.sessions", "server.stores", "server.metrics", "typer", "rich", *HTTP},
    "server.stores": {"server.api", "server.sessions", "server.metrics", *HTTP},
    "server.sessions": {"server.api", "server.metrics", *HTTP},
    "server.api": {"typer", "uvicorn", *COMMANDS},
    "server.deploy": COMMANDS,
}
# What a module may not name itself, whoever else does.
FORBIDDEN_DIRECTLY = {
    "server.engine.scheduler": {"torch"},
    "server.stores": {"torch"},
    "server.sessions": {"torch"},
}


def is_in(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def path_of(name: str) -> Path | None:
    """Of a module of ours."""
    path = ROOT / name.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@cache
def modules() -> dict[str, Path]:
    paths = [path for folder in ("model", "server") for path in (ROOT / folder).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            if isinstance(child.test, ast.UnaryOp):  # not TYPE_CHECKING
                yield from (inner for part in child.body for inner in ast.walk(part))
            continue
        yield child
        yield from statements(child)


@cache
def imported(path: Path) -> frozenset[str]:
    """The modules that a file names, those that a string in import_module names included."""
    names: set[str] = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            of = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {node.module, *(name for name in of if path_of(name) or not path_of(node.module))}
    return frozenset(names)


def reached(start: str) -> dict[str, list[str]]:
    """All modules that importing one brings, each with the way to it. A package comes with what is in it."""
    ways, to_do = {start: [start]}, [start]
    while to_do:
        name = to_do.pop()
        path = path_of(name)
        parents = {name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)}
        for other in (imported(path) if path else set()) | (parents if path else set()):
            if other not in ways:
                ways[other] = [*ways[name], other]
                to_do.append(other)
    return ways


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_go_down_only(place: str) -> None:
    found = [name for name in modules() if is_in(name, {place})]
    assert found
    for name in found:
        for other, way in reached(name).items():
            assert not is_in(other, FORBIDDEN[place]), " imports ".join(way)


@pytest.mark.parametrize("place", FORBIDDEN_DIRECTLY)
def test_some_modules_do_not_name_some_others(place: str) -> None:
    for name, path in modules().items():
        if is_in(name, {place}):
            assert not [other for other in imported(path) if is_in(other, FORBIDDEN_DIRECTLY[place])], name


def test_pydantic_and_fastapi_live_under_the_api() -> None:
    """And where the application is put together."""
    around = {ROOT / "server" / name for name in ("api", "deploy", "assemble.py")}
    for path in (ROOT / "server").rglob("*.py"):
        if not around & {path, *path.parents}:
            assert not {name.split(".")[0] for name in imported(path)} & {"pydantic", "fastapi", "starlette"}, path


def test_lazy_and_indirect_imports_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "lazy.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def later():\n    from server.commands import main\n    import uvicorn\n"
    )
    assert imported(file) == {"typing", "typing.TYPE_CHECKING", "server.commands", "server.commands.main", "uvicorn"}
    ways = reached("server.commands.serve")
    assert ways["model.families.aft"][0] == "server.commands.serve"
    assert "server.deploy.replicas" in ways, "which is imported in a function"
