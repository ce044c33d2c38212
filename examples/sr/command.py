"""The command line that span.py, swinir.py and rrdb.py share: one set of options, with defaults for each network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from promises import is_default_run

from sr import degradations
from sr.networks import Network
from sr.report import one_line_errors

NET, ADAPTER, TRAINING, OUTPUT = "Network and photos", "Adapter", "Training", "Machine and output"
FREE = {"seed", "device", "threads", "out"}  # options that change no promise
GAIN = 0.3  # dB over the base, what a run with default options promises


def option(panel: str, text: str, **more: Any) -> Any:
    """A command-line option with its help text, in a panel of --help."""
    return typer.Option(help=text, rich_help_panel=panel, **more)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user can choose. An instance is a script's defaults, or what one run was told."""

    base: Annotated[Path, option(NET, "Checkpoint of the network, any that spandrel loads (SPAN: or collapsed).")]
    photos: Annotated[Path | None, option(NET, "Folder to train on, else five photos of dependencies.")] = None
    held_out: Annotated[
        Path | None,
        option(NET, "Folder to judge by, else every fourth of --photos or three of dependencies."),
    ] = None
    degradation: Annotated[degradations.Name, option(NET, "What photos suffer; clean is bicubic reduction alone.")] = (
        "camera"
    )
    draws: Annotated[int, option(NET, "Degradations of each training photo.", min=1)] = 8
    targets: Annotated[list[str], option(ADAPTER, "Layers to adapt, a name pattern; may be repeated.")]
    rank: Annotated[int, option(ADAPTER, "Rank of each update.", min=1)] = 1
    alpha: Annotated[float | None, option(ADAPTER, "Update scale times rank, else rank.")] = None
    factors: Annotated[Literal["convlora", "locon"], option(ADAPTER, "Factorization.")] = "convlora"
    bias: Annotated[bool, option(ADAPTER, "Adapt the biases, too.")] = False
    steps: Annotated[int, option(TRAINING, "Steps at most.", min=1)] = 300
    minutes: Annotated[float, option(TRAINING, "Minutes at most; the schedule then shrinks to fit.", min=0.01)] = 3.0
    lr: Annotated[float, option(TRAINING, "Highest rate; 2e-3 for convlora of rank 2, 1e-2 for locon.", min=0)] = 5e-3
    warmup: Annotated[int, option(TRAINING, "Steps up to the highest rate.", min=0)] = 20
    batch: Annotated[int, option(TRAINING, "Patches in a step.", min=1)] = 8
    patch: Annotated[int, option(TRAINING, "Side of a low-resolution patch, pixels.", min=8)] = 48
    seed: Annotated[int, option(TRAINING, "Of adapter, patches and degradations.", min=0)] = 0
    device: Annotated[Literal["auto", "cpu", "cuda"], option(OUTPUT, "Where to compute.")] = "auto"
    threads: Annotated[int | None, option(OUTPUT, "CPU threads, else all.", min=1)] = None
    out: Annotated[Path, option(OUTPUT, "Folder for what the run writes.")]

    def as_json(self) -> dict[str, object]:
        """The options, of paths the last part."""
        return {name: value.name if isinstance(value, Path) else value for name, value in asdict(self).items()}


HELP = """Adapt a super-resolution network, {name}, to degraded photos with ConvLoRA.

Without options it takes the weights in examples/weights and photographs that come with
scikit-image and scikit-learn, and some three minutes on two CPU cores. It writes the adapter, the
merged network for spandrel (chaiNNer, ComfyUI), a picture, a training curve and results.json.
"""


def make_app(adapt: Callable[[Network, Options, float | None], None], network: Network, **defaults: Any) -> typer.Typer:
    """A command that calls `adapt(network, options, promised)`; `defaults` are those of options that differ.

    `promised` is the gain in dB that a run with default options must reach, else None.
    """
    usual = Options(**dict(base=network.weights, targets=[*network.targets], out=Path("runs", network.stem)) | defaults)

    @one_line_errors
    def main(context: typer.Context, **given: Any) -> None:
        adapt(network, Options(**given), GAIN if is_default_run(context, FREE) else None)

    # typer reads the options from the signature: here the fields of `Options`.
    hints = get_type_hints(Options, include_extras=True)
    main.__signature__ = inspect.Signature(
        [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        + [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(usual, field.name),
                annotation=hints[field.name],
            )
            for field in fields(Options)
        ]
    )
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.command(help=HELP.format(name=network.name))(main)
    return app
