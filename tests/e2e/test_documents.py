"""Every block of shell and Python in the documents: run as a reader would, or a line before it says why not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.e2e.conftest import Server

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^>]+) -->\n)?^ *```(?P<language>sh|python)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
SHORT = {"AFT_STEPS": "12"}  # a thousand steps make a better model, and no other test


@dataclass(frozen=True)
class Block:
    document: Path
    language: str
    code: str
    reason: str | None


def blocks(document: Path) -> list[Block]:
    found = BLOCK.finditer(document.read_text(encoding="utf-8"))
    return [Block(document, m["language"], textwrap.dedent(m["code"]), m["reason"]) for m in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, with a folder for runs that is not its own."""
    folder = tmp_path_factory.mktemp("project")
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".venv", ".git"):
            (folder / path.name).symlink_to(path)
    return folder


def run(block: Block, folder: Path, url: str) -> str:
    code = block.code.replace("http://127.0.0.1:8000", url).replace(".venv/bin/", "")
    command = ["bash", "-euo", "pipefail", "-c", code] if block.language == "sh" else [sys.executable, "-c", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **SHORT, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{document.stem}-{i}")
        for document in DOCUMENTS
        for i, block in enumerate(blocks(document))
        if block.reason is None
    ],
)
def test_what_a_document_tells_to_run_runs(block: Block, folder: Path, bundled_url: str) -> None:
    run(block, folder, bundled_url)


def test_a_model_trained_as_told_is_served(folder: Path, bundled_url: str) -> None:
    (training, *_) = blocks(ROOT / "docs" / "training.md")
    if not (folder / "runs" / "mine").exists():
        run(training, folder, bundled_url)
    with Server("--model", str(folder / "runs" / "mine")) as server:
        answer = httpx2.post(
            f"{server.url}/generate", json={"inputs": "The", "parameters": {"max_new_tokens": 3}}, timeout=60
        )
        assert answer.status_code == 200


def test_links_of_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
