"""What a run promises: whether it holds, and when it is promised at all. Shared by the examples."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import typer
from rich.console import Console

console = Console()


def check_promises(promises: Mapping[str, bool]) -> None:
    """Say that all hold, or which do not, and exit with 1."""
    broken = [promise for promise, holds in promises.items() if not holds]
    if broken:
        typer.echo(f"failed: {'; '.join(broken)}", err=True)
        raise typer.Exit(1)
    console.print(f"[green]{len(promises)} checks hold[/]: {'; '.join(promises)}")


def is_default_run(context: typer.Context, free: Collection[str]) -> bool:
    """Whether no option was given that changes what is learned or judged; `free` are those that do not."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return all(name in free or source is None or source.name == "DEFAULT" for name, source in sources.items())
