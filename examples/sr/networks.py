"""The three networks of the examples: how each is read, what of it is adapted, and how it goes to other programs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spandrel import ImageModelDescriptor, ModelLoader
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.SPAN import SPAN
from spandrel.architectures.SwinIR import SwinIR
from torch import nn

from sr.data import InputError
from sr.models import SPAN_TARGETS, SPAN_WEIGHTS, load_span, read_state, save_span, save_weights

WEIGHTS = SPAN_WEIGHTS.parent


@dataclass(frozen=True)
class Network:
    """A kind of network: its shipped weights, how to read and write it, and the layers that examples adapt.

    `load(path)` gives the network and its scale; what `save(model, path)` writes, spandrel loads. `targets` select
    layers in every variant of its kind.
    """

    name: str
    kind: type[nn.Module]
    weights: Path
    load: Callable[[Path], tuple[nn.Module, int]]
    save: Callable[[nn.Module, Path], None]
    targets: tuple[str, ...]

    @property
    def stem(self) -> str:
        """What the files of a run are called."""
        return self.name.lower()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what PyTorch has to say to spandrel's SwinIR, which calls `meshgrid` the old way."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)
        yield


def new_swinir(channels: int = 36, depths: tuple[int, ...] = (4, 4), scale: int = 4) -> SwinIR:
    """A SwinIR (Liang et al. 2021) for light-weight super-resolution, with random weights: RGB in [0, 1] in and out.

    The masks in its state dict are for inputs of 16x16 pixels, which keeps the file small; others it computes.
    """
    with quiet():
        return SwinIR(
            img_size=16, embed_dim=channels, depths=depths, num_heads=[2] * len(depths), window_size=8, mlp_ratio=2.0,
            upscale=scale, upsampler="pixelshuffledirect", drop_path_rate=0.0,
        )  # fmt: skip


def new_rrdb(channels: int = 16, blocks: int = 1) -> ESRGAN:
    """An RRDBNet x4 (Wang et al. 2018, ESRGAN) with random weights: RGB in [0, 1] in and out."""
    return ESRGAN(num_filters=channels, num_blocks=blocks, scale=4)


def load_swinir(path: Path) -> tuple[SwinIR, int]:
    """A SwinIR of any variant and its scale; without stochastic depth, which is not for an adapter's few parameters.

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
    channels = descriptor.input_channels, descriptor.output_channels
    if channels != (3, 3):
        raise InputError(f"base {path}: a {name} from {channels[0]} to {channels[1]} channels, not of RGB")
    return descriptor.model, descriptor.scale


def describe(path: Path) -> ImageModelDescriptor[nn.Module]:
    """What spandrel makes of a checkpoint: the network, its scale, its kind.

    Raises:
        InputError: no such file, or not known to spandrel.
    """
    state = read_state(path)
    try:
        with quiet():
            return ModelLoader().load_from_state_dict(state)
    except Exception as error:  # spandrel's detection raises whatever a strange state dict makes of its arithmetic
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"base {path}: not a checkpoint that spandrel knows ({reason})") from None


def save_swinir(model: SwinIR, path: Path) -> None:
    """Write a SwinIR so that `spandrel.ModelLoader` loads it."""
    state = dict(model.state_dict())
    if model.start_unshuffle > 1:  # the loader knows this variant by the place of its first convolution
        for kind in ("weight", "bias"):
            state[f"conv_first.1.{kind}"] = state.pop(f"conv_first.{kind}")
    save_weights(state, path, {"architecture": "SwinIR"})


def save_rrdb(model: ESRGAN, path: Path) -> None:
    """Write an RRDBNet under the keys of the first ESRGAN, those that `spandrel.ModelLoader` gives it."""
    save_weights(model.state_dict(), path, {"architecture": "RRDBNet"})


NETWORKS = {
    "span": Network(
        "SPAN", SPAN, SPAN_WEIGHTS, load_span, save_span,
        targets=tuple(SPAN_TARGETS),
    ),
    "swinir": Network(
        "SwinIR", SwinIR, WEIGHTS / "swinir_x4_c36.safetensors", load_swinir, save_swinir,
        targets=("re:.*(conv|upsample).*", "qkv", "proj", "fc1", "fc2"),
    ),
    "rrdb": Network(
        "RRDB", ESRGAN, WEIGHTS / "rrdb_x4_c16.safetensors", load_rrdb, save_rrdb,
        targets=("RDB?.conv*", r"re:model\.\d+", "re:model.*sub.[0-9]+"),
    ),
}  # fmt: skip


def network_of(path: Path) -> Network:
    """Which of the three a checkpoint is.

    Raises:
        InputError: no such file, or none of the three.
    """
    if "conv_cat.weight" in read_state(path):  # spandrel knows a SPAN in train form only, not a collapsed one
        return NETWORKS["span"]
    descriptor = describe(path)
    for network in NETWORKS.values():
        if isinstance(descriptor.model, network.kind):
            return network
    raise InputError(f"base {path}: a {descriptor.architecture.name}, not SPAN, SwinIR or RRDBNet")


def load_any(path: Path) -> tuple[nn.Module, int]:
    """A network of any of the three kinds, and its scale.

    Raises:
        InputError: no such file, or none of the three.
    """
    return network_of(path).load(path)
