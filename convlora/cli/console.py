"""What the commands say: results on stdout; warnings, errors and progress, one line each, on stderr."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from typer.core import TyperGroup

from convlora.errors import ConvLoRAError, ConvLoRAWarning
from convlora.support.progress import watching_steps


class Commands(TyperGroup):
    """Commands whose `ConvLoRAError` is one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what other libraries warn of, a user of the command cannot change
            warnings.simplefilter("always", ConvLoRAWarning)
            warnings.showwarning = lambda message, *_: _say("warning", str(message), ctx.invoked_subcommand)
            try:
                return super().invoke(ctx)
            except ConvLoRAError as error:
                _say("error", str(error), ctx.invoked_subcommand)
                raise typer.Exit(1) from None


def _say(kind: str, message: str, command: str) -> None:
    """One line, in the words of the command line: `Adapter.resize: …rank=` is `resize: …--rank`."""
    text = re.sub(r"^Adapter(\.\w+)?: ", f"{command}: ", " ".join(message.split()))
    text = re.sub(r"\blayers= of the base\b|\blayers=(?=\W)", "--base", text)
    text = re.sub(r"\bprefix=(?= (reads|says))", "--part", text)
    text = re.sub(r"\b(rank|energy|alpha|network)=(?=[ ,;)]|$)", r"--\1", text)
    typer.echo(printable(f"{kind}: {text}"), err=True)


def emit(report: Mapping[str, Any], text: str, as_json: bool) -> None:
    """A command's result, for programs or for people."""
    typer.echo(json.dumps(report, indent=2, allow_nan=False) if as_json else printable(text))


def printable(text: str) -> str:
    r"""Text of which parts come from a file, without what a terminal would obey: control characters as escapes.

    Example:
        >>> print(printable("conv\x1b[2J.weight"))
        conv\x1b[2J.weight
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """A bar for the computation inside; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        with watching_steps(lambda done, total: bar.update(task, completed=done, total=total)):
            yield
