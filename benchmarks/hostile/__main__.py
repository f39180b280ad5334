"""The command, and its table."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.hostile.attacker import ATTACKS, LeakError, UnansweredError, WeaknessError
from benchmarks.hostile.soak import Report, soak


def main(
    seconds: Annotated[float, typer.Option(min=1, help="Once the ordinary clients know what to expect.")] = 1800,
    workers: Annotated[int, typer.Option(min=1, help="Attacks at a time; 1 tells exactly which did what.")] = 4,
    only: Annotated[str, typer.Option(help="Attacks whose names match this regular expression.")] = "",
    without: Annotated[str, typer.Option(help="No attacks whose names match this.")] = "$^",
    options: Annotated[str, typer.Option(help="More options of `aft serve`.")] = "",
    out: Annotated[Path | None, typer.Option(help="A JSON file for all of it.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Of all attacks, if they take less time.")] = None,
    calm: Annotated[float, typer.Option(min=0, help="Seconds before the first attack, for comparison.")] = 20,
    seed: int = 0,
) -> None:
    """Ends with status 1 if a target is missed."""
    names = [name for name in ATTACKS if re.search(only, name) and not re.search(without, name)]
    if not names:
        raise typer.BadParameter("only and without leave no attack.")
    report = soak(
        seconds,
        workers,
        names,
        options.split(),
        rounds=rounds,
        calm=calm,
        seed=seed,
        say=lambda line: print(line, flush=True),
    )
    print_table(report)
    if out:
        out.write_text(json.dumps(report.as_json()) + "\n")
    sys.exit(0 if all(met for _, _, met in report.targets()) else 1)


def print_table(report: Report) -> None:
    print(f"\n{'attack':28} {'times':>5} {'longest':>8} {'gap beside':>10} {'memory':>10}  outcomes")
    gaps, health = report.seen.gaps, [latency for _, latency in report.seen.health]
    for name in sorted({one.name for one in report.attempts}):
        those = [one for one in report.attempts if one.name == name]
        # A gap lies beside an attack if any part of it does.
        beside = [gap for end, gap in gaps if any(one.begun < end and end - gap < one.ended for one in those)]
        sizes = [size for at, size in report.memory if any(one.begun < at < one.ended + 0.5 for one in those)]
        outcomes = Counter(one.outcome if one.kind == "met" else one.kind for one in those)
        told = ", ".join(f"{outcome} ({n})" for outcome, n in outcomes.most_common(4))
        longest = max(one.ended - one.begun for one in those)
        measured = f"{max(beside, default=0.0):8.3f} s {max(sizes, default=0) / 2**20:6.0f} MiB"
        print(f"{name:28} {len(those):5} {longest:6.1f} s {measured}  {told}")
    firsts = sorted(report.seen.first_tokens) or [0.0]
    print(f"\nordinary clients: {dict(report.seen.counts)}")
    print(f"first token: median {statistics.median(firsts):.3f} s, longest {firsts[-1]:.3f} s")
    print(f"/health: {len(health)} times, longest {max(health, default=0.0):.3f} s")
    for kind in (LeakError, UnansweredError, WeaknessError):
        for line in report.of(kind.__name__):
            print(f"{kind.__name__}: {line}")
    for line in [*report.deaths, *report.seen.differences[:10], *report.seen.failures[:10]]:
        print(line)
    print()
    for what, found, met in report.targets():
        print(f"{'met   ' if met else 'MISSED'} {what}: {found}")


if __name__ == "__main__":
    typer.run(main)
