"""The paper's comparison (tables 4 and 5) at a size that a CPU trains in minutes.

    python -m benchmarks.comparison train --row conv --train train.txt --valid valid.txt --characters
    python -m benchmarks.comparison measure
    python -m benchmarks.comparison report

Every row has the same data, batches, tokens, schedule and, but for 1%, parameters; rows differ in what stands in the
place of attention. Learned position embeddings in all, as in the paper. `train` adds a line to results.jsonl.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.baselines import Baseline, Kind
from model.families.aft import AFTConfig, AFTForCausalLM
from model.language_model import LanguageModel
from model.tokenizer import SentencePieceTokenizer, Tokenizer
from model.training.config import TrainingConfig
from model.training.data import PackedBatches, Source, TokenArray, encode_documents, read_documents
from model.training.evaluate import total_nats
from model.training.progress import smooth
from model.training.trainer import Trainer

FOLDER = Path("runs/comparison")
D_MODEL, N_LAYER, N_HEAD, CONTEXT, BATCH = 128, 4, 4, 256, 16
BASELINES: dict[str, Kind] = {"attention": "attention", "linear attention": "linear"}
ROWS: dict[str, dict[str, Any]] = {
    "attention": {"variant": "simple"},
    "linear attention": {"variant": "simple"},
    "simple": {"variant": "simple"},
    "local-1": {"variant": "local", "window": 1},
    "local-4": {"variant": "local", "window": 4},
    "local-32": {"variant": "local", "window": 32},
    "local-128": {"variant": "local", "window": 128},
    "conv-32-32": {"variant": "conv", "n_head": 32, "window": 32},
    "full": {"variant": "full"},
}
app = typer.Typer(pretty_exceptions_enable=False)


def build(row: str, vocab_size: int, max_positions: int = CONTEXT) -> AFTForCausalLM:
    """The model of a row, its feed-forward layer so wide that it has as many parameters as the Transformer.

    That is at positions up to CONTEXT; with more, embeddings and biases of positions grow.
    """

    def config(d_ff: int, max_positions: int = CONTEXT) -> AFTConfig:
        fields = {"vocab_size": vocab_size, "d_model": D_MODEL, "n_layer": N_LAYER, "d_ff": d_ff, **ROWS[row]}
        return AFTConfig(max_positions=max_positions, position_embeddings=True, **fields)

    def model(of: AFTConfig) -> AFTForCausalLM:
        return Baseline(of, BASELINES[row], N_HEAD) if row in BASELINES else AFTForCausalLM(of)

    with torch.device("meta"):
        wanted = Baseline(config(4 * D_MODEL), "attention", N_HEAD).num_parameters
    return model(config(feed_forward_width(lambda d_ff: model(config(d_ff)), wanted), max_positions))


def feed_forward_width(model: Callable[[int], AFTForCausalLM], n_parameters: int) -> int:
    """The d_ff with which `model(d_ff)` has `n_parameters`, or as near as it gets."""
    with torch.device("meta"):
        one, two = model(1).num_parameters, model(2).num_parameters
    return 1 + round((n_parameters - one) / (two - one))


@app.command()
def train(
    row: Annotated[str, typer.Option(help=", ".join(ROWS))],
    train: Annotated[Path, typer.Option(help="Text to learn from.")],
    valid: Annotated[Path, typer.Option(help="Text to be scored on, in windows of the context.")],
    characters: Annotated[bool, typer.Option(help="A token for each character.")] = False,
    steps: Annotated[int, typer.Option()] = 600,
    learning_rate: Annotated[float, typer.Option()] = 3e-3,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path, typer.Option()] = FOLDER,
) -> None:
    """Train and score one row, or go on where it was stopped."""
    name = f"{train.parent.name}-{row.replace(' ', '-')}-{seed}"
    texts = read_documents(train)
    vocab_size = 258 + len(set("".join(texts))) if characters else 1024
    tokenizer = SentencePieceTokenizer.train(texts, vocab_size)
    config = TrainingConfig(
        data=(Source(train),),
        steps=steps,
        batch_size=BATCH,
        context=CONTEXT,
        learning_rate=learning_rate,
        seed=seed,
        checkpoint_every=200,
    )
    tokens = encode_documents(texts, tokenizer)
    torch.manual_seed(seed)
    model = build(row, vocab_size)
    trainer = Trainer(
        model, PackedBatches([(tokens, 1.0)], batch_size=BATCH, context=CONTEXT, seed=seed), config, out / name
    )
    if (out / name / "training_state.safetensors").exists():
        trainer.resume()
    started, done = time.perf_counter(), trainer.step
    trainer.run()
    speed = (steps - done) * BATCH * CONTEXT / (time.perf_counter() - started)
    held_out = encode_documents(read_documents(valid), tokenizer)
    result = {
        "corpus": train.parent.name if train.stem == "train" else train.stem.removesuffix("_train"),
        "row": row,
        "seed": seed,
        "parameters": model.num_parameters,
        "tokens": steps * BATCH * CONTEXT,
        "bits_per_character": windowed_bits_per_character(model.eval(), tokenizer, held_out),
        "training_tokens_per_second": speed,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": [[record.tokens, round(record.loss, 4)] for record in trainer.history[9::10]],
    }
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    print({key: value for key, value in result.items() if key != "losses"})


@torch.inference_mode()
def windowed_bits_per_character(model: LanguageModel, tokenizer: Tokenizer, tokens: TokenArray) -> float:
    """Of all windows of the context that fit, each read alone: no row sees a position it was not trained on."""
    n_windows = (len(tokens) - 1) // CONTEXT
    nats, n_characters = 0.0, 0
    for start in range(0, n_windows, BATCH):
        rows = [tokens[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(start, min(start + BATCH, n_windows))]
        batch = torch.stack([torch.from_numpy(row).long() for row in rows])
        logits, _ = model(batch[:, :-1])
        nats += float(total_nats(logits, batch[:, 1:]))
        n_characters += sum(len(tokenizer.decode(row[1:].tolist())) for row in rows)
    return nats / math.log(2) / n_characters


@app.command()
def measure(out: Annotated[Path, typer.Option()] = FOLDER) -> None:
    """Speeds of every row, with random weights: in training, and decoding at contexts of 1,024 and 8,192 tokens.

    Best on a machine that does nothing else; training with `train` may share one.
    """
    found = {}
    for row in ROWS:
        model = build(row, vocab_size=1024, max_positions=8192 + 64).eval()
        found[row] = {f"{n}": decode(model, n) for n in (1024, 8192)}
        found[row]["training"] = {"tokens_per_second": training_speed(build(row, vocab_size=1024))}
        print(row, found[row])
    (out / "speeds.json").write_text(json.dumps(found, indent=1))


def training_speed(model: LanguageModel, steps: int = 5) -> float:
    """Tokens per second of the median step, without the optimizer, which is the same for all."""
    ids = torch.randint(model.config.vocab_size, (BATCH, CONTEXT + 1))
    seconds: list[float] = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        total_nats(model(ids[:, :-1])[0], ids[:, 1:]).backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - started)
    return BATCH * CONTEXT / sorted(seconds[1:])[steps // 2]


@torch.inference_mode()
def decode(model: LanguageModel, n_context: int, n_tokens: int = 32) -> dict[str, float]:
    """Tokens per second of one sequence after n_context tokens, and bytes of its state."""
    ids = torch.randint(model.config.vocab_size, (1, n_context))
    state = None
    for start in range(0, n_context, 256):
        _, state = model.hidden(ids[:, start : start + 256], state)
    assert state is not None
    token = torch.zeros(1, dtype=torch.long)
    seconds: list[float] = []
    n_bytes = state.nbytes
    for _ in range(n_tokens):
        started = time.perf_counter()
        _, state = model.step(token, state)
        seconds.append(time.perf_counter() - started)
    return {"tokens_per_second": 1 / sorted(seconds)[n_tokens // 2], "bytes": n_bytes}


@app.command()
def report(
    out: Annotated[Path, typer.Option()] = FOLDER,
    plots: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("docs"),
) -> None:
    """The tables in Markdown, and pictures of loss against tokens and of quality against bytes of state."""
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    speeds = json.loads((out / "speeds.json").read_text())
    for corpus in sorted({result["corpus"] for result in results}):
        print(f"\n{corpus}\n\n{table([r for r in results if r['corpus'] == corpus], speeds)}")
        draw([r for r in results if r["corpus"] == corpus], speeds, plots / f"comparison-{corpus}.png")


def table(results: list[dict[str, Any]], speeds: dict[str, Any]) -> str:
    """One line a row of the comparison, speeds as ratios to attention's (decoding: at 1k)."""
    lines = [
        "| | parameters | bits per character, by seed | training speed | peak MiB "
        "| decoding speed at 1k, 8k | bytes of state at 1k, 8k |",
        "|---|---|---|---|---|---|---|",
    ]
    of_attention = speeds["attention"]
    for row in ROWS:
        found = sorted((r for r in results if r["row"] == row), key=lambda r: r["seed"])
        if found:
            bits = ", ".join(f"{result['bits_per_character']:.4f}" for result in found)
            short, long, training = (speeds[row][case] for case in ("1024", "8192", "training"))
            decoding = [case["tokens_per_second"] / of_attention["1024"]["tokens_per_second"] for case in (short, long)]
            trained = training["tokens_per_second"] / of_attention["training"]["tokens_per_second"]
            lines.append(
                f"| {row} | {found[0]['parameters']:,} | {bits} | {trained:.2f} | {found[0]['peak_mib']:,.0f} "
                f"| {decoding[0]:.2f}, {decoding[1]:.2f} | {short['bytes']:,.0f}, {long['bytes']:,.0f} |"
            )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], speeds: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for result in results:
        if result["seed"] == 0:
            tokens, losses = zip(*result["losses"], strict=True)
            left.plot(tokens, smooth(losses, weight=0.85), label=result["row"], linewidth=1)
            size = speeds[result["row"]]["8192"]["bytes"]
            right.plot(size, result["bits_per_character"], "o")
            right.annotate(result["row"], (size, result["bits_per_character"]), fontsize=8)
    left.set(xlabel="tokens read", ylabel="training loss, nats per token")
    left.legend(fontsize=7)
    right.set(xscale="log", xlabel="bytes of state after 8,192 tokens", ylabel="bits per character, held out")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    app()
