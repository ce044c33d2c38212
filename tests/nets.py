"""Small networks for the file formats: layers of every sort that a format holds, at nested paths."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from oracle import randomise
from torch import Tensor, nn

import convlora
from convlora import Adapter


def _planar() -> nn.Module:
    body = OrderedDict(
        conv=nn.Conv2d(8, 6, (1, 5), stride=(1, 2), padding=(0, 2)), act=nn.SiLU(), point=nn.Conv2d(6, 8, 1, bias=False)
    )
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 3, padding=1), body=nn.Sequential(body), flat=nn.Flatten(2), head=nn.Linear(20, 5)
        )
    )


def _square() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 3, padding=1),
            body=nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=2), nn.SiLU(), nn.Conv2d(8, 6, 1)),
            head=nn.Linear(8, 5),
        )
    )


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {  # constructor, input shape
    "1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3, stride=2), nn.SiLU(), nn.Conv1d(8, 4, 1)), (2, 3, 11)),
    "2d": (_planar, (2, 3, 5, 8)),
    "3d": (
        lambda: nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 4, (1, 2, 1))),
        (1, 3, 4, 4, 4),
    ),
    "square": (_square, (2, 3, 6, 8)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network in eval mode, and an input for it."""
    make, shape = NETS[name]
    return make().eval(), torch.randn(shape)


def adapter(base: nn.Module, **options: Any) -> Adapter:
    """An adapter of all layers with trained-looking factors."""
    options = {"targets": "*", "rank": 2, "factors": "locon", **options}
    return convlora.adapter(randomise(convlora.inject(copy.deepcopy(base), **options), std=0.5))


def output(base: nn.Module, loaded: Adapter, x: Tensor) -> Tensor:
    """Of the base with an adapter, live; merging into its bare checkpoint gives the same."""
    with torch.no_grad():
        live: Tensor = convlora.load(copy.deepcopy(base), loaded)(x)
        merged = copy.deepcopy(base)
        merged.load_state_dict(loaded.apply_to(base.state_dict()))
        assert distance(merged(x), live) < 1e-6
    return live


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).detach().norm() / right.detach().norm())
