from __future__ import annotations

from typing import Any

from benchmarks import llama_cpp, peers
from benchmarks.peers import COLOURS, conclusion, peer_of, table

ENGINES = [f"llama.cpp, {precision}" for precision in llama_cpp.PRECISIONS]


def row(engine: str, context: int, batch: int, decode: float) -> dict[str, Any]:
    return {"engine": engine, "context": context, "batch": batch, "decode": decode}


ROWS = [
    row("this engine, float32", 128, 1, 30.0),
    row("this engine, float32", 128, 8, 50.0),
    row("this engine, float32", 1024, 1, 30.0),
    row("this engine, int8", 128, 1, 60.0),
    row("llama.cpp, F32", 128, 1, 20.0),
    row("llama.cpp, F32", 128, 8, 20.0),
    row("llama.cpp, F32", 1024, 1, 10.0),
    row("llama.cpp, Q8_0", 128, 1, 40.0),
    row("llama.cpp, Q4_K_M", 128, 1, 70.0),
]


def test_an_engine_is_divided_by_the_peer_of_its_precision() -> None:
    assert "| 128 | 1 | 30 (1.50) | 60 (1.50) | 20 (1.00) | 40 (1.00) | 70 (1.75) |" in table(ROWS, "decode")
    assert peer_of("this server, int8", ["llama-server, F32"]) is None
    assert peer_of("this engine, float32", ["transformers, RWKV-4"]) == "transformers, RWKV-4"


def test_a_conclusion_names_both_precisions() -> None:
    assert conclusion(ROWS, "decode") == (
        "This engine in float32 is 1.5 to 2.5 times as fast as llama.cpp in F32 after 128 tokens, 3.0 after 1,024. "
        "This engine in int8 is 1.5 times as fast as llama.cpp in Q8_0 after 128 tokens."
    )
    rows = [each for each in ROWS if each["engine"] != "llama.cpp, Q8_0"]
    assert conclusion(rows, "decode").endswith("This engine in int8 has no peer here.")


def test_every_engine_has_a_colour_of_its_own() -> None:
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert COLOURS.keys() >= {*ENGINES, *(f"this engine, {name}" for name in ("float32", "int8"))}
    assert all(peers.said(engine) for engine in COLOURS)
