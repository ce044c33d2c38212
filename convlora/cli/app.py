"""The commands, put together."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

import convlora
from convlora.cli.console import Commands
from convlora.cli.look import diff, info, layers, verify
from convlora.cli.make import combine, convert, extract, merge, resize

app = typer.Typer(
    name="convlora",
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"convlora {convlora.__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Low-rank adapters of convolutional networks as files.

    Results go to stdout; warnings, errors and progress to stderr. Exit codes: 0 done, 1 not possible (one line says
    why, nothing is written), 2 wrong usage. No file is overwritten without --force, and none is half written.
    """


for command in (info, merge, extract, resize, combine, convert, diff, layers, verify):
    app.command()(command)


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # × where the locale has none
    app(prog_name="convlora")
