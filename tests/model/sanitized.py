"""Runs the native kernels, compiled with AddressSanitizer and UndefinedBehaviorSanitizer, over odd sizes and states.

A program, which test_sanitizers starts. The sanitizers report on its standard error; after PLANTED they report of a
library with two faults, so that the test knows that it would see others.

    LD_PRELOAD=libasan.so python -m tests.model.sanitized
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from model.backends.native import compiler
from model.backends.native.calls import Norm
from model.backends.native.matrices import FORMATS, HugePages
from model.backends.native.program import NativeRunner
from model.state import State
from tests.conftest import VARIANTS, Variant, random_model, tiny_config

PLANTED = "with faults:"
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined,float-cast-overflow", "-fsanitize-recover=all"]
WIDTHS = [[], ["-mno-avx512f"], ["-march=x86-64"]] if platform.machine() == "x86_64" else [[]]  # AVX-512, AVX2, SSE
FAULTS = {
    "c < width; c++) out[c] = (x[c] - mean)": "c <= width; c++) out[c] = (x[c] - mean)",  # a feature too many
    "float mean =": "volatile int most = 2147483647; most += 1; float mean =",
}
# Features, heads, features of the feed-forward layer, tokens of the vocabulary: around what vectors and panels hold.
SIZES = [
    (1, 1, 1, 2),
    (2, 2, 3, 5),
    (6, 3, 7, 17),
    (15, 5, 31, 33),
    (17, 1, 16, 31),
    (33, 11, 65, 63),
    (130, 2, 129, 9),
]
BATCHES, CHUNKS, THREADS, WINDOWS = (1, 2, 33), (1, 7, 33), (1, 2, 3, 5), (1, 2, 5, 16)
HOSTILE = (math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-42, -1.0)


def kernels(*flags: str) -> compiler.Library:
    with mock.patch.multiple(compiler, FLAGS=[*compiler.FLAGS, *SANITIZED, *flags], COMPILE_SECONDS=600):
        compiler.library.cache_clear()
        found = compiler.library()
    assert found is not None
    return found


def run(library: compiler.Library, variant: Variant, number: int, size: tuple[int, int, int, int]) -> None:
    """One model: which format, window and threads it has goes by its number."""
    width, n_head, d_ff, vocab_size = size
    fields: dict[str, Any] = {"d_model": width, "n_head": n_head, "d_ff": d_ff, "vocab_size": vocab_size}
    if variant != "rwkv4":
        fields |= {
            "position_embeddings": number % 2 == 0,
            "max_positions": 99,
            "window": WINDOWS[number % len(WINDOWS)],
        }
    model = random_model(tiny_config(variant, tie_embeddings=number % 3 == 0, **fields))
    torch.set_num_threads(THREADS[number % len(THREADS)])
    states = model.init_state(max(BATCHES))
    runner = NativeRunner(model, states, max(CHUNKS), library, FORMATS[[*FORMATS][number % len(FORMATS)]])
    for batch in BATCHES:
        runner.step_([i % vocab_size for i in range(batch)])
    state: State | None = None
    for chunk in CHUNKS:
        _, state = runner.read([i % vocab_size for i in range(chunk)], state, chunk)
    for tensor, value in zip(states.tensors(), itertools.cycle(HOSTILE[number % len(HOSTILE) :]), strict=False):
        fill(tensor, value)
    runner.step_([0] * max(BATCHES))
    runner.read([0] * max(CHUNKS), states.select(slice(1, 2)).clone())


def fill(tensor: Tensor, value: float) -> None:
    if tensor.is_floating_point():  # positions are not a client's to choose
        tensor.fill_(value)


@torch.inference_mode()
def main() -> None:
    del os.environ["LD_PRELOAD"]  # the compiler needs no sanitizer
    own = mock.patch.object(HugePages, "copy", lambda _, tensor: tensor.contiguous().clone())
    with own, tempfile.TemporaryDirectory() as folder:  # each matrix in memory of its own, whose ends are watched
        for flags in WIDTHS:
            library = kernels(*flags)
            for number, (size, variant) in enumerate(itertools.product(SIZES, VARIANTS)):
                run(library, variant, number, size)
        print(PLANTED, file=sys.stderr, flush=True)
        run_faulty(Path(folder))


def run_faulty(folder: Path) -> None:
    for name in ("common.h", "run.c", "pointwise.c"):
        shutil.copy(compiler.SOURCES / name, folder)
    source = folder / "pointwise.c"
    text = source.read_text() + "\ni64 panel_width(void) { return 8; }\n"
    for good, bad in FAULTS.items():
        assert text.count(good) == 1
        text = text.replace(good, bad)
    source.write_text(text)
    with mock.patch.object(compiler, "SOURCES", folder):
        library = kernels()
    row = torch.ones(1, 16)
    library.tasks([Norm(row, row[0], row[0], 1e-5, torch.empty(1, 16))]).run(1, 1)


if __name__ == "__main__":
    main()
