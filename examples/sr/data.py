"""Photos as arrays: those that come with dependencies, those of a folder, and patches of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image as PilImage
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import IterableDataset

Image = NDArray[np.uint8]  # an RGB photo (h, w, 3), 0 … 255
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


class InputError(ValueError):
    """Something that the user gave cannot be used; the message is one line and says what and why."""


@dataclass(frozen=True)
class Photo:
    """A photo and what to call it."""

    name: str
    pixels: Image


@dataclass(frozen=True)
class Pair:
    """One photo twice: `low` `(h, w, 3)` and `high` `(h·scale, w·scale, 3)`."""

    name: str
    low: Image
    high: Image


def bundled_photos() -> tuple[list[Photo], list[Photo]]:
    """(training, held-out) colour photographs in the wheels of scikit-image and scikit-learn.

    Held out: a person, an animal and a flower. Both views of the motorcycle train, for they show
    one scene. Left out is what no camera in a hand took: retina, Hubble's deep field, tissue under
    a microscope.
    """
    from skimage import data
    from sklearn.datasets import load_sample_image

    left, right, _ = data.stereo_motorcycle()
    training = {
        "coffee": data.coffee(),
        "rocket": data.rocket(),
        "motorcycle-left": left,
        "motorcycle-right": right,
        "china": load_sample_image("china.jpg"),
    }
    held_out = {
        "astronaut": data.astronaut(),
        "chelsea": data.chelsea(),
        "flower": load_sample_image("flower.jpg"),
    }
    return [Photo(*item) for item in training.items()], [Photo(*item) for item in held_out.items()]


def read_image(path: Path) -> Image:
    """An image file as RGB uint8.

    Raises:
        InputError: the file is no image or is damaged.
    """
    try:
        with PilImage.open(path) as file:
            return np.asarray(file.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"photo {path}: cannot be read ({error})") from None


def image_files(folder: Path) -> list[Path]:
    """The image files directly in `folder`; by number where the names are numbers, else by name.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"photos {folder}: no such folder")
    files = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    if not files:
        raise InputError(f"photos {folder}: no image in it (of {', '.join(sorted(SUFFIXES))})")
    return sorted(files, key=lambda path: (not path.stem.isdigit(), _number(path), path.name))


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdigit() else 0


def read_folder(folder: Path) -> list[Photo]:
    """All photos directly in a folder."""
    return [Photo(path.stem, read_image(path)) for path in image_files(folder)]


def choose_photos(photos: Path | None, held_out: Path | None) -> tuple[list[Photo], list[Photo]]:
    """(training, held-out) photos of two folders; of one, every fourth is held out; of none, `bundled_photos`.

    Raises:
        InputError: one photo cannot both train and judge.
    """
    training = bundled_photos()[0] if photos is None else read_folder(photos)
    if held_out is not None:
        return training, read_folder(held_out)
    if photos is None:
        return training, bundled_photos()[1]
    if len(training) < 2:
        raise InputError(f"photos {photos}: one photo only; give others by --held-out")
    return [photo for index, photo in enumerate(training) if index % 4 != 1], training[1::4]


def crop_photos(photos: Sequence[Photo], scale: int, least: int) -> list[Photo]:
    """The photos cropped (top left) to sides that are multiples of `scale`.

    Raises:
        InputError: a photo has a side below `least` pixels.
    """
    small = [p for p in photos if min(p.pixels.shape[:2]) < least]
    if small:
        height, width = small[0].pixels.shape[:2]
        raise InputError(
            f"photos: {len(small)} of {len(photos)} are smaller than {least}x{least} pixels, "
            f"first {small[0].name!r} ({width}x{height}); use larger ones or a smaller --patch"
        )
    return [Photo(photo.name, crop_to_multiple(photo.pixels, scale)) for photo in photos]


def crop_to_multiple(image: Image, scale: int) -> Image:
    """The top-left part whose sides are multiples of `scale`."""
    height, width = (side - side % scale for side in image.shape[:2])
    return image[:height, :width]


def degraded_pairs(
    photos: Sequence[Photo],
    degrade: Callable[[Image, int, int], Image],
    *,
    scale: int,
    draws: int = 1,
    seed: int = 0,
    least: int = 64,
) -> list[Pair]:
    """Each photo, cropped, with `draws` different degradations, of which `degrade(high, seed, scale)` gives one."""
    return [
        Pair(photo.name, degrade(photo.pixels, seed + index * draws + draw, scale), photo.pixels)
        for index, photo in enumerate(crop_photos(photos, scale, least))
        for draw in range(draws)
    ]


def to_tensor(image: Image) -> Tensor:
    """uint8 `(h, w, 3)` to float `(1, 3, h, w)` in [0, 1]."""
    return _planes(image)[None].float() / 255.0


def to_image(tensor: Tensor) -> Image:
    """float `(1, 3, h, w)` to uint8 `(h, w, 3)`: clamped to [0, 1] and rounded."""
    pixels = tensor.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return rearrange(pixels, "1 c h w -> h w c").cpu().numpy()


def _planes(image: Image) -> Tensor:
    """uint8 `(h, w, 3)` to uint8 `(3, h, w)`, in memory of its own."""
    return torch.from_numpy(np.array(rearrange(image, "h w c -> c h w"), order="C"))


class Patches(IterableDataset[tuple[Tensor, Tensor]]):
    """Random aligned patches from pairs, turned and mirrored, each position equally likely.

    Iterating yields batches `(low (n, 3, p, p), high (n, 3, p·scale, p·scale))`, floats in [0, 1],
    without end; the same seed gives the same batches.
    """

    def __init__(self, pairs: Sequence[Pair], *, patch: int, batch: int, seed: int) -> None:
        self.pairs = [(_planes(pair.low), _planes(pair.high)) for pair in pairs]
        self.patch, self.batch, self.seed = patch, batch, seed
        self.scale = pairs[0].high.shape[0] // pairs[0].low.shape[0]
        sides = np.array([pair.low.shape[:2] for pair in pairs]) - patch + 1.0
        self.chances = sides.prod(1) / sides.prod(1).sum()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng(self.seed)
        while True:
            chosen = rng.choice(len(self.pairs), size=self.batch, p=self.chances)
            samples = [self._sample(*self.pairs[index], rng) for index in chosen]
            low, high = (torch.stack(planes) for planes in zip(*samples, strict=True))
            yield low.float() / 255.0, high.float() / 255.0

    def _sample(self, low: Tensor, high: Tensor, rng: np.random.Generator) -> list[Tensor]:
        size, scale = self.patch, self.scale
        top, left = (int(rng.integers(side - size + 1)) for side in low.shape[1:])
        mirror, turns = bool(rng.integers(2)), int(rng.integers(4))
        crops = (
            low[:, top : top + size, left : left + size],
            high[:, top * scale : (top + size) * scale, left * scale : (left + size) * scale],
        )
        return [torch.rot90(crop.flip(2) if mirror else crop, turns, (1, 2)) for crop in crops]
