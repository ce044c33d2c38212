"""The three networks of the examples: how each is read, what of it is adapted, and how it goes to other programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spandrel import ImageModelDescriptor, ModelLoader
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.SwinIR import SwinIR
from torch import nn

from sr.data import InputError
from sr.models import load_span, read_state, save_weights

WEIGHTS = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class Network:
    """What an example has to know of the network that it adapts.

    `rate` is the highest learning rate, `gain` (dB over the base) what the default run promises, `takes` what --help says
    of checkpoints. `load(path)` gives the network and its scale; what `save(model, path)` writes, spandrel loads.
    """

    name: str
    weights: Path
    takes: str
    load: Callable[[Path], tuple[nn.Module, int]]
    save: Callable[[nn.Module, Path], None]
    targets: tuple[str, ...]
    rate: float
    gain: float
    batch: int = 8
    patch: int = 48
    steps: int = 300
    minutes: float = 3.0

    @property
    def stem(self) -> str:
        """What the files of a run are called."""
        return self.name.lower()


def swinir(channels: int = 32, depths: tuple[int, ...] = (4, 4), scale: int = 4) -> SwinIR:
    """A SwinIR (Liang et al. 2021) for light-weight super-resolution, with random weights: RGB in [0, 1] in and out.

    The masks in its state dict are for inputs of 16x16 pixels, which keeps the file small; others it computes.
    """
    return SwinIR(
        img_size=16, embed_dim=channels, depths=depths, num_heads=[4] * len(depths), window_size=8, mlp_ratio=2.0,
        upscale=scale, upsampler="pixelshuffledirect", drop_path_rate=0.0,
    )  # fmt: skip


def rrdb(channels: int = 32, blocks: int = 1) -> ESRGAN:
    """An RRDBNet x4 (Wang et al. 2018, ESRGAN) with random weights: RGB in [0, 1] in and out."""
    return ESRGAN(num_filters=channels, num_blocks=blocks, scale=4)


def load_swinir(path: Path) -> tuple[SwinIR, int]:
    """A SwinIR of any kind and its scale; without stochastic depth, which is not for an adapter's few parameters.

    Raises:
        InputError: no such file, or not a SwinIR of RGB.
    """
    model, scale = _load(path, SwinIR, "SwinIR")
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model, scale


def load_rrdb(path: Path) -> tuple[ESRGAN, int]:
    """An RRDBNet (ESRGAN, ESRGAN+, BSRGAN, Real-ESRGAN) and its scale.

    Raises:
        InputError: no such file, or not an RRDBNet of RGB.
    """
    return _load(path, ESRGAN, "RRDBNet")


def _load(path: Path, kind: type[nn.Module], name: str) -> tuple[nn.Module, int]:
    descriptor = describe(path)
    if not isinstance(descriptor.model, kind):
        raise InputError(f"base {path}: a {descriptor.architecture.name}, not {name}")
    return descriptor.model, descriptor.scale


def describe(path: Path) -> ImageModelDescriptor[nn.Module]:
    """What spandrel makes of a checkpoint: the network, its scale, what it is.

    Raises:
        InputError: no such file, not known to spandrel, or not from RGB to RGB.
    """
    state = read_state(path)
    try:
        descriptor = ModelLoader().load_from_state_dict(state)
    except Exception as error:  # spandrel's detection raises whatever a strange state dict makes of its arithmetic
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"base {path}: not a checkpoint that spandrel knows ({reason})") from None
    channels = descriptor.input_channels, descriptor.output_channels
    if not isinstance(descriptor, ImageModelDescriptor) or channels != (3, 3):
        raise InputError(f"base {path}: a {descriptor.architecture.name} for {channels[0]} and {channels[1]} channels")
    return descriptor


def load_any(path: Path) -> tuple[nn.Module, int]:
    """A network of any of the three kinds, and its scale.

    Raises:
        InputError: no such file, or none of the three.
    """
    is_span = "conv_cat.weight" in read_state(path)  # spandrel knows a SPAN in train form only
    model, scale = load_span(path) if is_span else _load(path, (SwinIR, ESRGAN), "SPAN, SwinIR or RRDBNet")
    return model, scale


def save_swinir(model: SwinIR, path: Path) -> None:
    """Write a SwinIR so that `spandrel.ModelLoader` loads it."""
    state = dict(model.state_dict())
    if model.start_unshuffle > 1:  # the loader knows this kind by the place of its first convolution
        for kind in ("weight", "bias"):
            state[f"conv_first.1.{kind}"] = state.pop(f"conv_first.{kind}")
    save_weights(state, path, {"architecture": "SwinIR"})


def save_rrdb(model: ESRGAN, path: Path) -> None:
    """Write an RRDBNet under the keys of the first ESRGAN, those that `spandrel.ModelLoader` gives it."""
    save_weights(model.state_dict(), path, {"architecture": "RRDBNet"})
