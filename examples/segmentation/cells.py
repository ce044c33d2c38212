"""Images of cells as two microscopes take them, drawn from a seed, with the mask of the nuclei.

A nucleus is a lumpy ellipse with a texture of its own. Three things look like one and are not: nuclei out of focus,
bright specks and fibres. The tissue is the same under both microscopes; what differs is how they record it: the target
one has less contrast on a brighter ground, bent intensities, uneven light, more noise, and lines that its scan adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.filters import gaussian
from torch import Tensor

Array = NDArray[np.float64]
Range = tuple[float, float]  # each image draws uniformly from it


@dataclass(frozen=True, kw_only=True)
class Microscope:
    """How tissue of brightness 0 to 1 becomes an image: blurred, shaded, bent, scaled, noisy, and kept in 8 bits."""

    blur: Range = (0.5, 0.9)  # pixels
    shading: Range = (0.0, 0.1)  # how much darker the far end of the image is
    gamma: Range = (0.9, 1.1)
    gain: Range = (0.8, 0.95)
    offset: Range = (0.02, 0.06)
    noise: Range = (0.015, 0.03)  # standard deviation where it is white; half as much where it is black
    lines: Range = (0.0, 0.005)  # standard deviation of what each row of the scan adds

    def record(self, tissue: Array, rng: np.random.Generator) -> Array:
        """The image of a tissue, of the same size."""
        blur, shading, gamma, gain, offset, noise, lines = (
            rng.uniform(*limits)
            for limits in (self.blur, self.shading, self.gamma, self.gain, self.offset, self.noise, self.lines)
        )
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[-1 : 1 : tissue.shape[0] * 1j, -1 : 1 : tissue.shape[1] * 1j]
        light = 1 - shading * (0.5 + 0.5 * (np.cos(angle) * x + np.sin(angle) * y))
        seen = offset + gain * (light * smooth(tissue, blur).clip(0, 1)) ** gamma
        grain = rng.normal(size=seen.shape) * noise * np.sqrt(0.25 + 0.75 * seen.clip(0, 1))
        grain += rng.normal(size=(len(seen), 1)) * lines
        return np.round((seen + grain).clip(0, 1) * 255) / 255


SOURCE = Microscope()
TARGET = Microscope(
    shading=(0.1, 0.3), gamma=(1.1, 1.3), gain=(0.5, 0.6), offset=(0.15, 0.25), noise=(0.02, 0.04), lines=(0.02, 0.04)
)


def smooth(plane: Array, deviation: float) -> Array:
    """A plane under a Gaussian, mirrored at its edges."""
    return gaussian(plane, deviation, mode="reflect")


def blob(size: int, centre: Array, radius: float, rng: np.random.Generator) -> Array:
    """How far inside a lumpy ellipse each pixel is: 1 at its centre, 0 at its edge, negative outside."""
    y, x = np.mgrid[:size, :size] - centre[:, None, None]
    angle, distance = np.arctan2(y, x), np.hypot(y, x)
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.5)
    edge = radius / np.sqrt((np.cos(angle - turn) / stretch) ** 2 + (np.sin(angle - turn) * stretch) ** 2)
    for wave in (2, 3, 5):
        edge = edge * (1 + rng.uniform(0, 0.18 / wave) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi)))
    return 1 - distance / edge


def texture(size: int, fine: float, rng: np.random.Generator) -> Array:
    """Smooth noise of mean 0 and deviation 1; `fine` is its grain in pixels."""
    grain = smooth(rng.normal(size=(size, size)), fine)
    return (grain - grain.mean()) / grain.std()


def places(size: int, count: int, apart: float, rng: np.random.Generator) -> list[Array]:
    """Up to `count` points at least `apart` from each other."""
    found: list[Array] = []
    for _ in range(20 * count):
        point = rng.uniform(0, size, 2)
        if len(found) < count and all(np.hypot(*(point - other)) > apart for other in found):
            found.append(point)
    return found


def draw_tissue(size: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """(brightness, mask of the nuclei in focus), each `(size, size)`."""
    tissue = 0.16 + 0.05 * texture(size, 8.0, rng) + 0.035 * texture(size, 1.5, rng)
    for _ in range(rng.integers(2, 5)):  # fibres: bright where a smooth field crosses zero
        field = texture(size, 12.0, rng) + 0.25 * texture(size, 5.0, rng)
        tissue = tissue + rng.uniform(0.08, 0.22) * np.exp(-((field / 0.10) ** 2))
    area = (size / 96) ** 2
    cells = places(size, int(rng.integers(10, 17) * area), 15.0, rng)
    mask = np.zeros_like(tissue)
    for number, centre in enumerate(cells):
        inside = blob(size, centre, rng.uniform(5.0, 8.5), rng)
        brightness = rng.uniform(0.36, 0.75) + 0.10 * texture(size, 1.8, rng)
        if number % 4 == 3:  # out of focus: as bright, without edge or texture, and no nucleus to be found
            haze = smooth((inside > 0).astype(float), 3.0)
            tissue = tissue + 0.75 * brightness.mean() * haze
        else:
            cover = 0.5 + 0.5 * np.tanh(12 * inside)
            tissue = tissue * (1 - cover) + brightness * cover
            mask = np.maximum(mask, inside > 0)
    for y, x in rng.uniform(0, size, (int(rng.integers(6, 16) * area), 2)):  # specks
        spread = rng.uniform(0.6, 1.3)
        rows, columns = np.mgrid[:size, :size]
        tissue = tissue + rng.uniform(0.3, 0.7) * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * spread**2))
    return tissue.clip(0, 1), mask


@dataclass(frozen=True)
class Cells:
    """Images `(n, 1, size, size)` in [0, 1] and the masks of their nuclei, 0 or 1, alike."""

    images: Tensor
    masks: Tensor


def draw(microscope: Microscope, count: int, *, seed: int, size: int = 96) -> Cells:
    """`count` images by one microscope. Equal seeds show the same tissue under any microscope."""
    images, masks = [], []
    for index in range(count):
        tissue, mask = draw_tissue(size, np.random.default_rng((seed, index, 0)))
        images.append(microscope.record(tissue, np.random.default_rng((seed, index, 1))))
        masks.append(mask)
    return Cells(*(torch.from_numpy(np.stack(planes)[:, None]).float() for planes in (images, masks)))
