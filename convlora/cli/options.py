"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Form = Literal["convlora", "locon", "dense"]

Base = Annotated[Path, typer.Argument(metavar="BASE", help="Checkpoint: .safetensors, or .pth and its like.")]
File = Annotated[Path, typer.Argument(metavar="FILE", help="Adapter of any format.")]
Adapters = Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Adapters of any format.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Where to write.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Report as JSON.")]
Rank = Annotated[int | None, typer.Option("--rank", metavar="N", help="At most this rank in every layer.")]
Energy = Annotated[
    float | None,
    typer.Option("--energy", metavar="SHARE", help="The lowest ranks that keep this share of the squared norm."),
]
Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name of the adapter on a model.")]
BaseOption = Annotated[
    Path | None,
    typer.Option("--base", metavar="CHECKPOINT", help="The base, for files that do not say enough about its layers."),
]
Prefix = Annotated[
    str,
    typer.Option(
        "--prefix",
        metavar="TEXT",
        help="What the names of one side, the adapter's or the base's, begin with and those of the other do not;"
        " by default it is found.",
    ),
]
Part = Annotated[
    str | None,
    typer.Option(
        "--part", metavar="TEXT", help="Of a FILE of several networks, the names that begin so: lora_unet, unet …"
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", metavar="X", help="`lora_alpha` of the training, where a FILE states none."),
]
Network = Annotated[
    str | None,
    typer.Option(
        "--network", metavar="KEY", help="Which of several networks in the checkpoint: params, generator_ema …"
    ),
]
