"""Can the library be trusted: hostile files, crashes, long random lives, every model, numerics, leaks.

    python -m benchmarks.trust                       # every part at its full count
    python -m benchmarks.trust fuzz --count 2000     # one part, at another count
    python -m benchmarks.trust crash --quick         # a hundredth of the count, writes nothing

Each part writes `results/trust_<part>.json` and `.md`. Exit code 1 if anything failed.
"""

from __future__ import annotations

import importlib
from typing import Annotated

import torch
import typer
from common import RESULTS, Section, console, facts_of_run, write_results

PARTS = {"fuzz": 20_000, "crash": 200, "machine": 5_000, "models": 1_000, "numerics": 20_000, "soak": 10_000}


def failures(section: Section) -> int:
    """How many cases of a section failed: the sum over its rows of `failed`, which rows without failures may lack."""
    return sum(int(row.get("failed", 0)) for row in section.data)


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(PARTS)}; all by default.")] = None,
    count: Annotated[int | None, typer.Option(help="Cases of each part instead of its own count.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of all random choices.")] = 0,
    quick: Annotated[bool, typer.Option(help="A hundredth of the count; writes nothing.")] = False,
) -> None:
    """Run parts of the trust suite; exit code 1 if anything failed."""
    torch.set_num_threads(1)
    chosen = parts or list(PARTS)
    for part in chosen:
        if part not in PARTS:
            raise typer.BadParameter(f"{part!r} is none of {', '.join(PARTS)}")
    failed = 0
    for part in chosen:
        facts = facts_of_run("torch", "safetensors", "convlora")
        cases = count or (max(1, PARTS[part] // 100) if quick else PARTS[part])
        section = importlib.import_module(f"benchmarks.trust.{part}").measure(cases, seed)
        section.show()
        failed += failures(section)
        if not quick:
            command = f"python -m benchmarks.trust {part} --count {cases} --seed {seed}"
            write_results(RESULTS / f"trust_{part}.json", command, {**facts, "seed": seed, "count": cases}, [section])
    console.print(f"{failed} failed" if failed else "nothing failed")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
