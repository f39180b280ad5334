"""This engine against llama.cpp and Hugging Face transformers, and against the machine's floors, in one run.

    python -m benchmarks.peers measure --out performance.json
    python -m benchmarks.peers report performance.json

Random weights of one size for all, the same threads. This engine runs in float32 and in int8, llama.cpp in F32, Q8_0
and Q4_K_M, transformers in float32; each is divided by the peer of its own precision. Decoding is the median of single
steps of a full batch, after every sequence has read its context. Peers that cannot be had are left out with a line that
says why.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import llama_cpp, servers
from model import AFTConfig, LanguageModel, RWKV4Config, State
from model.backends.base import Runner
from model.backends.choose import make_runner
from model.backends.native.program import NativeRunner
from model.config import ModelConfig
from model.families import family_of

SHAPES: dict[str, ModelConfig] = {
    "6M": AFTConfig(variant="conv", vocab_size=4096, d_model=256, n_layer=6, n_head=16, d_ff=1168),
    "110M": AFTConfig(variant="conv", vocab_size=32_000, d_model=768, n_layer=12, n_head=12, d_ff=3456),
    "169M": RWKV4Config(vocab_size=50_277, d_model=768, n_layer=12, tie_embeddings=False),
}
BATCH_SIZES, CONTEXTS, CHUNK = (1, 8, 32, 64), (128, 1024, 8192), 256
LONGEST = 100_000
SERVER_CLIENTS = (1, 8, 32)
STEPS, ROUNDS = 48, 6
Result = dict[str, Any]

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def measure(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("performance.json"),
    shape: Annotated[list[str] | None, typer.Option(help="6M, 110M, 169M (RWKV-4); all if left out.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of everything; all cores if left out.")] = None,
    peers: Annotated[bool, typer.Option(help="Measure the peers, too.")] = True,
) -> None:
    """Everything, which takes some hour."""
    if threads:
        torch.set_num_threads(threads)
    found: Result = {"threads": torch.get_num_threads(), "floors": floors(), "results": [], "servers": []}
    for name in shape or SHAPES:
        for result in measured(name, peers):
            print(json.dumps(result), flush=True)
            found["results"].append({"shape": name, **result})
            out.write_text(json.dumps(found, indent=1))
        for result in of_servers(name, peers):
            print(json.dumps(result), flush=True)
            found["servers"].append({"shape": name, **result})
            out.write_text(json.dumps(found, indent=1))


def measured(name: str, peers: bool) -> Iterator[Result]:
    yield from ours(name, None)
    yield from ours(name, "int8")
    if not peers:
        return
    for peer in (of_llama_cpp, of_transformers):
        try:
            yield from peer(name)
        except llama_cpp.UnavailableError as error:
            print(error)


def floors() -> dict[str, float]:
    """What the machine gives: bytes per second of a large copy and a large matrix-vector product, and FLOP/s."""
    source, matrix = torch.randn(2**26), torch.randn(8192, 8192)
    target, vector, square = torch.empty_like(source), torch.randn(8192), torch.randn(2048, 2048)
    found = {
        "copy_bytes_per_second": 2 * source.nbytes / median(lambda: target.copy_(source)),
        "matvec_bytes_per_second": matrix.nbytes / median(lambda: torch.mv(matrix, vector)),
        "matmul_flops_per_second": 2 * 2048**3 / median(lambda: square @ square),
    }
    print(found)
    return found


def median(call: Callable[[], object], n: int = 15) -> float:
    """Seconds of one call."""
    call()
    seconds = []
    for _ in range(n):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


@torch.inference_mode()
def ours(name: str, quantize: str | None) -> Iterator[Result]:
    model, states, runner = set_up(name, max(BATCH_SIZES), quantize)
    # An embedding that is not the head as well is looked up, and multiplies nothing.
    n_multiplied = model.num_parameters - (model.embedding.weight.numel() if model.head is not None else 0)
    reached = read_up_to(model, runner, (*CONTEXTS, LONGEST) if quantize is None else CONTEXTS[:2])
    for batch_size in BATCH_SIZES:
        tokens = list(range(batch_size))
        seconds: dict[int, list[float]] = {context: [] for context in reached}
        for _ in range(ROUNDS):  # the contexts take turns, or a busy moment would be taken for a context's cost
            for context, (state, _) in reached.items():
                states.copy_(state)
                seconds[context].append(median(lambda: runner.step_(tokens), STEPS // ROUNDS))  # noqa: B023
        for context, (state, prefill) in reached.items():
            yield {
                "engine": f"this engine, {quantize or 'float32'}",
                "context": context,
                "batch": batch_size,
                "decode": batch_size / statistics.median(seconds[context]),
                "prefill": prefill,
                "bytes_per_sequence": state.nbytes,
                "weight_bytes": runner.weight_bytes,
                "parameters": n_multiplied,
            }


@app.command()
@torch.inference_mode()
def flat(
    shape: Annotated[str, typer.Option(help="6M, 110M, 169M.")] = "110M",
    rounds: Annotated[int, typer.Option(help="Positions take turns.")] = 40,
) -> None:
    """Time of a token of one sequence at position 100,000, as a ratio to that at position 100."""
    model, states, runner = set_up(shape, 1)
    (early, _), (late, _) = read_up_to(model, runner, (100, LONGEST)).values()

    def seconds(state: State) -> float:
        states.copy_(state)
        return median(lambda: runner.step_([1]))

    ratios = [seconds(late) / seconds(early) for _ in range(rounds)]
    print(f"{shape}: {statistics.median(ratios):.3f}")


def set_up(name: str, n_sequences: int, quantize: str | None = None) -> tuple[LanguageModel, State, NativeRunner]:
    """A model of random weights, and states that its runner steps."""
    torch.manual_seed(0)
    model = family_of(SHAPES[name])(SHAPES[name]).eval().requires_grad_(False)
    states = model.init_state(n_sequences)
    runner = make_runner(model, states, CHUNK, quantize=quantize)
    assert isinstance(runner, NativeRunner), "what is measured is the compiled kernels"
    return model, states, runner


def read_up_to(model: LanguageModel, runner: Runner, contexts: Sequence[int]) -> dict[int, tuple[State, float]]:
    """By context: the state after so many tokens, and the tokens per second of reading those since the last one."""
    ids = torch.randint(model.config.vocab_size, (CHUNK,)).tolist()
    found, state, n_read = {}, None, 0
    for context in contexts:
        started, first = time.perf_counter(), n_read
        while n_read < context:
            part = ids[: min(CHUNK, context - n_read)]
            _, state = runner.read(part, state)
            n_read += len(part)
        assert state is not None
        found[context] = state, (context - first) / (time.perf_counter() - started)
    return found


def of_llama_cpp(name: str) -> Iterator[Result]:
    if name not in llama_cpp.SHAPES:
        raise llama_cpp.UnavailableError("llama.cpp runs no RWKV-4.")
    shape = llama_cpp.SHAPES[name]
    cases = ((128, BATCH_SIZES), (1024, (1, 8, 32)), (8192, (1, 8)))
    for precision, (context, batch_sizes) in itertools.product(llama_cpp.PRECISIONS, cases):
        path = llama_cpp.model_file(name, precision)
        found = llama_cpp.measure(path, context, batch_sizes, STEPS, torch.get_num_threads())
        for batch_size, speed in found.items():
            yield {
                "engine": f"llama.cpp, {precision}",
                "context": context,
                "batch": batch_size,
                "decode": speed.decode,
                "prefill": speed.prefill,
                "bytes_per_sequence": 2 * 2 * shape.n_layer * shape.d_model * context,  # keys and values of 16 bits
            }


@torch.inference_mode()
def of_transformers(name: str) -> Iterator[Result]:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, RwkvConfig, RwkvForCausalLM
    except ImportError as error:
        raise llama_cpp.UnavailableError("GPT-2 and RWKV-4 need the package transformers.") from error
    shape = SHAPES[name]
    sizes: dict[str, Any] = {"vocab_size": shape.vocab_size, "tie_word_embeddings": shape.tie_embeddings}
    rwkv = RwkvForCausalLM(RwkvConfig(**sizes, hidden_size=shape.d_model, num_hidden_layers=shape.n_layer))
    models: list[tuple[str, Any, str, tuple[int, ...]]] = [("transformers, RWKV-4", rwkv, "state", (128,))]
    if isinstance(shape, AFTConfig):
        n_head = shape.d_model // 64
        gpt2 = GPT2LMHeadModel(
            GPT2Config(**sizes, n_embd=shape.d_model, n_layer=shape.n_layer, n_head=n_head, n_positions=2048)
        )
        models.insert(0, ("transformers, GPT-2", gpt2, "past_key_values", (128, 1024)))
    for label, model, cache, contexts in models:
        model.train(False)
        for context in contexts:
            for batch_size in (1, 8, 32):
                ids = torch.randint(shape.vocab_size, (batch_size, context))
                started = time.perf_counter()
                held = getattr(model.base_model(ids, use_cache=True), cache)
                prefill = batch_size * context / (time.perf_counter() - started)
                seconds = []
                for _ in range(STEPS if context == 128 else STEPS // 2):
                    started = time.perf_counter()
                    output = model(ids[:, :1], **{cache: held}, use_cache=True)
                    held = getattr(output, cache)
                    seconds.append(time.perf_counter() - started)
                yield {
                    "engine": label,
                    "context": context,
                    "batch": batch_size,
                    "decode": batch_size / statistics.median(seconds),
                    "prefill": prefill,
                }


def of_servers(name: str, peers: bool) -> Iterator[Result]:
    """`aft serve`, and llama-server, whose contexts share room for 16,384 tokens."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = servers.write_checkpoint(SHAPES[name], Path(folder))
        for precision in ("float32", "int8"):
            command = [*servers.AFT, "--model", checkpoint, "--threads", f"{threads}", "--quantize", precision]
            with servers.serving(command) as server:
                found = servers.measure(server, CONTEXTS, SERVER_CLIENTS)
                yield {"engine": f"this server, {precision}", **found}
    if not peers or name not in llama_cpp.SHAPES:
        return
    for precision in llama_cpp.PRECISIONS:
        try:
            program, model = llama_cpp.build() / "llama-server", llama_cpp.model_file(name, precision)
        except llama_cpp.UnavailableError as error:
            print(error)
            return
        given = {"-m": model, "-t": threads, "-tb": threads, "-c": 16_384, "-np": 32}
        arguments = [f"{part}" for option in given.items() for part in option]
        with servers.serving([program, "--kv-unified", *arguments], ready="/health") as server:
            found = servers.measure(server, CONTEXTS, SERVER_CLIENTS, cache_prompt=False)
            yield {"engine": f"llama-server, {precision}", **found}


@app.command()
def report(
    found: Annotated[Path, typer.Argument(help="What `measure` wrote.")],
    plot: Annotated[Path | None, typer.Option(help="Picture to draw, too.")] = None,
) -> None:
    """Tables in Markdown, what each says before it, and a picture of decoding speed against context."""
    data = json.loads(found.read_text())
    for name in SHAPES:
        rows = [result for result in data["results"] if result["shape"] == name]
        if rows:
            print(f"\n**{name}**: decoding: tokens/s of all sequences, and as a ratio to the peer of that precision")
            print(f"\n{conclusion(rows, 'decode')}\n\n{table(rows, 'decode')}")
            print(
                f"\n**{name}**: reading a prompt: tokens/s; of this engine between the context above and this one, "
                "of the others over all of it"
            )
            alone = [row for row in rows if row["batch"] == 1]
            print(f"\n{conclusion(alone, 'prefill')}\n\n{table(alone, 'prefill')}")
            own = [row for row in rows if "weight_bytes" in row]
            print(f"\n**{name}**: of the floors\n\n{floor_conclusion(own, data['floors'])}\n")
            print(floor_table(own, data["floors"]))
        if served := [result for result in data["servers"] if result["shape"] == name]:
            print(f"\n**{name}**: over HTTP, and as a ratio to the peer of that precision")
            print(f"\n{server_conclusion(served)}\n\n{server_table(served)}")
    if plot:
        draw(data["results"], plot)


def peer_of(engine: str, engines: Collection[str]) -> str | None:
    """Which of the engines it is divided by: one whose weights have as many bits."""
    kind, _, precision = engine.partition(", ")
    theirs = "llama-server" if kind.endswith("server") else "llama.cpp"
    if precision in ("int8", "Q8_0", "Q4_K_M"):
        wanted = [f"{theirs}, Q8_0"]
    else:  # transformers' name a model, which is in float32
        wanted = [f"{theirs}, F32", "transformers, RWKV-4"]
    return next((peer for peer in wanted if peer in engines), None)


Speeds = dict[tuple[str, int, int], float]


def speeds_of(rows: list[Result], figure: str) -> tuple[list[str], Speeds]:
    """The engines, and the figure by engine, context and batch."""
    found = {(row["engine"], row["context"], row["batch"]): row[figure] for row in rows}
    return list(dict.fromkeys(row["engine"] for row in rows)), found


def conclusion(rows: list[Result], figure: str) -> str:
    engines, speeds = speeds_of(rows, figure)
    sentences = []
    for engine in engines:
        peer = peer_of(engine, engines)
        ratios: dict[int, list[float]] = {}
        for (of, context, batch), speed in speeds.items():
            if of == engine and peer and (theirs := speeds.get((peer, context, batch))):
                ratios.setdefault(context, []).append(speed / theirs)
        if ratios and peer and engine.startswith("this "):
            (first, found), *others = sorted(ratios.items())
            rest = "".join(f", {span(more)} after {context:,}" for context, more in others)
            sentences.append(
                f"{said(engine)} is {span(found)} times as fast as {said(peer)} after {first:,} tokens{rest}."
            )
        elif engine.startswith("this "):
            sentences.append(f"{said(engine)} has no peer here.")
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def said(engine: str) -> str:
    return engine.replace(", ", "' " if "transformers" in engine else " in ")


def span(ratios: list[float]) -> str:
    low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
    return low if low == high else f"{low} to {high}"


def table(rows: list[Result], figure: str) -> str:
    engines, speeds = speeds_of(rows, figure)
    lines = ["| context | batch | " + " | ".join(engines) + " |", "|---" * (2 + len(engines)) + "|"]
    for context, batch in sorted({(row["context"], row["batch"]) for row in rows}):
        cells = []
        for engine in engines:
            speed, peer = speeds.get((engine, context, batch)), peer_of(engine, engines)
            theirs = speeds.get((peer, context, batch)) if peer else None
            ratio = f" ({speed / theirs:.2f})" if speed and theirs else ""
            cells.append(f"{speed:,.0f}{ratio}" if speed else "")
        lines.append(f"| {context:,} | {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_floors(row: Result, limits: dict[str, float]) -> tuple[float, float]:
    """Bytes of weights per second of the matrix-vector product's, and FLOP/s of the matrix product's."""
    memory = row["decode"] / row["batch"] * row["weight_bytes"] / limits["matvec_bytes_per_second"]
    return memory, row["decode"] * 2 * row["parameters"] / limits["matmul_flops_per_second"]


def floor_conclusion(rows: list[Result], limits: dict[str, float]) -> str:
    """Of float32."""
    of = [row for row in rows if row["context"] == 1024 and row["engine"].endswith("float32")]
    found = {row["batch"]: of_floors(row, limits) for row in of}
    (memory, _), (_, arithmetic) = found[min(found)], found[max(found)]
    return (
        f"In float32 one text gets {memory:.2f} of what the memory could give, "
        f"{max(found)} texts {arithmetic:.2f} of what the arithmetic could."
    )


def floor_table(rows: list[Result], limits: dict[str, float]) -> str:
    lines = ["| | batch | of the memory's floor | of the arithmetic's floor |", "|---|---|---|---|"]
    for row in rows:
        if row["context"] == 1024:
            memory, arithmetic = of_floors(row, limits)
            lines.append(f"| {row['engine']} | {row['batch']} | {memory:.2f} | {arithmetic:.2f} |")
    return "\n".join(lines)


def server_conclusion(rows: list[Result]) -> str:
    served, sentences = {row["engine"]: row for row in rows}, []
    for engine, row in served.items():
        peer = served.get(peer_of(engine, served) or "")
        if peer and engine.startswith("this "):
            speeds = [f"{row['decode'][n] / peer['decode'][n]:.2f} for {n}" for n in row["decode"]]
            context, seconds = max(row["first_token"].items(), key=lambda item: int(item[0]))
            sentences.append(
                f"{said(engine).capitalize()} writes as many tokens/s as {said(peer['engine'])}, times "
                f"{', '.join(speeds)} clients; the first token after a prompt of {int(context):,} comes in "
                f"{seconds / peer['first_token'][context]:.2f} of its time."
            )
    return " ".join(sentences) or "No peer was measured."


def server_table(rows: list[Result]) -> str:
    served = {row["engine"]: row for row in rows}
    lines = ["| | " + " | ".join(served) + " |", "|---" * (1 + len(rows)) + "|"]

    def line(name: str, figure: Callable[[Result], float], form: str) -> None:
        cells = []
        for engine, row in served.items():
            peer = peer_of(engine, served)
            ratio = f" ({figure(row) / figure(served[peer]):.2f})" if peer else ""
            cells.append(form.format(figure(row)) + ratio)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    line("ready after, s", lambda row: row["startup"], "{:.2f}")
    for context in rows[0]["first_token"]:
        name = f"first token of a prompt of {int(context):,}, ms"
        line(name, lambda row, at=context: 1e3 * row["first_token"][at], "{:,.1f}")  # type: ignore[misc]
    for n in rows[0]["decode"]:
        line(f"{n} clients, tokens/s", lambda row, at=n: row["decode"][at], "{:,.0f}")  # type: ignore[misc]
    line("memory at most, MiB", lambda row: row["peak_bytes"] / 2**20, "{:,.0f}")
    return "\n".join(lines)


COLOURS = {
    "this engine, float32": "tab:blue",
    "this engine, int8": "tab:cyan",
    "llama.cpp, F32": "tab:orange",
    "llama.cpp, Q8_0": "tab:red",
    "llama.cpp, Q4_K_M": "tab:brown",
    "transformers, GPT-2": "tab:green",
    "transformers, RWKV-4": "tab:purple",
}


def draw(results: list[Result], path: Path) -> None:
    """Decoded tokens per second of 8 sequences against their context, one panel for each shape, a colour an engine."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = [name for name in SHAPES if any(row["shape"] == name for row in results)]
    figure, panels = plt.subplots(
        1, len(names), figsize=(4.5 * len(names), 4.4), squeeze=False, sharex=True, layout="constrained"
    )
    drawn: dict[str, Any] = {}
    for panel, name in zip(panels[0], names, strict=True):
        rows = [row for row in results if row["shape"] == name and row["batch"] == 8]
        for engine, colour in COLOURS.items():
            if points := sorted((row["context"], row["decode"]) for row in rows if row["engine"] == engine):
                (drawn[engine],) = panel.plot(*zip(*points, strict=True), marker="o", color=colour)
        panel.set(title=f"{name}, 8 sequences", xlabel="context, tokens", xscale="log", yscale="log")
        contexts = sorted({row["context"] for row in results})
        panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("decoded tokens/s")
    in_order = [engine for engine in COLOURS if engine in drawn]
    figure.legend([drawn[engine] for engine in in_order], in_order, loc="outside lower center", ncols=len(in_order))
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    app()
