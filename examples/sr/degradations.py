"""What happens to a photo before super-resolution sees it: five degradations, each a function of photo, seed and scale.

| name | blur | reduction | noise (of 255) | JPEG quality |
|---|---|---|---|---|
| clean | none | bicubic | none | none |
| camera | Gaussian, 0.8 … 2 px | bicubic | normal, 2 … 10 | 50 … 90 |
| night | Gaussian, 0.8 … 2 px | bicubic | normal, 15 … 30 | 30 … 70 |
| jpeg | none | bicubic | none | 10 … 40 |
| real | twice, and ringing | three times | twice | twice, 30 … 95 |

The first four are to be measured by, `real` is to be trained with: see `Real` for its ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from sr.data import Image, to_image, to_tensor
from sr.operations import blur, gaussian_kernel, gaussian_noise, jpeg, resize, shot_noise, sinc_kernel

Name = Literal["camera", "night", "jpeg", "real", "clean"]
Range = tuple[float, float]


def clean(high: Image, scale: int = 4) -> Image:
    """The reduced photo, rounded to uint8: the input of super-resolution papers."""
    return to_image(resize(to_tensor(high), high.shape[0] // scale, high.shape[1] // scale))


def enlarge(low: Image, scale: int = 4) -> Image:
    """The bicubic enlargement that a network has to beat."""
    return to_image(resize(to_tensor(low), low.shape[0] * scale, low.shape[1] * scale))


def draw_quality(rng: np.random.Generator, quality: tuple[int, int]) -> int:
    """A whole number, both ends included."""
    return int(rng.integers(quality[0], quality[1] + 1))


@dataclass(frozen=True)
class Camera:
    """A small lens, a small sensor and a strong compression, each drawn from a range.

    Half the blurs are round. Widths in pixels of the high resolution, noise as standard deviation
    of 255 levels, uniform over the range; quality is a whole number, both ends included.
    """

    width: Range = (0.8, 2.0)
    noise: Range = (2.0, 10.0)
    quality: tuple[int, int] = (50, 90)

    def __call__(self, high: Image, seed: int, scale: int = 4) -> Image:
        """The low-resolution photo; the same seed gives the same one."""
        rng = np.random.default_rng(seed)
        is_round = rng.random() < 0.5
        sigma_x = sigma_y = rng.uniform(*self.width)
        theta = 0.0
        if not is_round:
            sigma_y, theta = rng.uniform(*self.width), rng.uniform(0, np.pi)
        noise = rng.uniform(*self.noise)
        quality = draw_quality(rng, self.quality)
        blurred = blur(to_tensor(high), gaussian_kernel(sigma_x, sigma_y, theta))
        low = resize(blurred, high.shape[0] // scale, high.shape[1] // scale)
        return jpeg(to_image(gaussian_noise(low, noise, rng)), quality)


@dataclass(frozen=True)
class Compressed:
    """The clean low resolution, strongly compressed: a picture as messengers and old web pages have it."""

    quality: tuple[int, int] = (10, 40)

    def __call__(self, high: Image, seed: int, scale: int = 4) -> Image:
        """The low-resolution photo; the same seed gives the same one."""
        return jpeg(clean(high, scale), draw_quality(np.random.default_rng(seed), self.quality))


@dataclass(frozen=True)
class Order:
    """One round of blur, resizing and noise: the probability that it blurs, and what is drawn from which range.

    `width` in pixels of the image as it then is, `factor` against the size that `Real` says, `noise` as standard
    deviation of 255 levels, `shot` as `operations.shot_noise` has it. `enlarges` and `reduces` are probabilities; the
    rest keeps that size.
    """

    blurs: float
    width: Range
    enlarges: float
    reduces: float
    factor: Range
    noise: Range
    shot: Range

    def __call__(self, image: Tensor, height: int, width: int, rng: np.random.Generator) -> Tensor:
        """The image degraded, then of about `height` x `width` times the factor."""
        if rng.random() < self.blurs:
            image = blur(image, draw_kernel(self.width, rng))
        factor = self.draw_factor(rng)
        sides = (max(LEAST, round(side * factor)) for side in (height, width))
        image = resize(image, *sides, mode=draw_mode(rng))
        grey = rng.random() < 0.4
        if rng.random() < 0.5:
            image = gaussian_noise(image, rng.uniform(*self.noise), rng, grey=grey)
        else:
            image = shot_noise(image, rng.uniform(*self.shot), rng, grey=grey)
        return image.clamp(0, 1)

    def draw_factor(self, rng: np.random.Generator) -> float:
        """Above, below or exactly 1."""
        kind = rng.random()
        if kind < self.enlarges:
            return rng.uniform(1, self.factor[1])
        return rng.uniform(self.factor[0], 1) if kind < self.enlarges + self.reduces else 1.0


LEAST = 12  # pixels; a kernel of 21 reflects at most 10


def draw_mode(rng: np.random.Generator) -> str:
    """A way to resize."""
    return "bicubic" if rng.random() < 0.5 else "bilinear"


def draw_kernel(width: Range, rng: np.random.Generator) -> np.ndarray:
    """Mostly a Gaussian, half of them round; with 0.15 a generalised one of power 0.5 … 4, with 0.1 a sinc, π/3 … π."""
    kind, is_round = rng.random(), rng.random() < 0.5
    if kind < 0.1:
        return sinc_kernel(rng.uniform(np.pi / 3, np.pi))
    sigma_x = sigma_y = rng.uniform(*width)
    theta, power = 0.0, 1.0
    if not is_round:
        sigma_y, theta = rng.uniform(*width), rng.uniform(0, np.pi)
    if kind < 0.25:
        power = rng.uniform(0.5, 4.0)
    return gaussian_kernel(sigma_x, sigma_y, theta, power=power)


@dataclass(frozen=True)
class Real:
    """A photo that has been through two cameras or programs: second-order degradation, in the manner of Real-ESRGAN.

    First order (factor against the high resolution), JPEG, second order (factor against the low resolution); then, one
    before the other with equal chance, resizing to the low resolution with a ringing filter at probability 0.8, and
    JPEG. Ranges are those of Wang et al. 2021, *Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure
    Synthetic Data* (arXiv 2107.10833), kernels and ways to resize a choice of theirs. A wide range of harm: for
    training, not to be measured by.
    """

    first: Order = Order(1.0, (0.2, 3.0), 0.2, 0.7, (0.15, 1.5), (1.0, 30.0), (0.05, 3.0))
    second: Order = Order(0.8, (0.2, 1.5), 0.3, 0.4, (0.3, 1.2), (1.0, 25.0), (0.05, 2.5))
    quality: tuple[int, int] = (30, 95)
    ringing: float = 0.8

    def __call__(self, high: Image, seed: int, scale: int = 4) -> Image:
        """The low-resolution photo; the same seed gives the same one."""
        rng = np.random.default_rng(seed)
        height, width = high.shape[0] // scale, high.shape[1] // scale
        once = self.first(to_tensor(high), *high.shape[:2], rng)
        once = to_tensor(jpeg(to_image(once), draw_quality(rng, self.quality)))
        twice = self.second(once, height, width, rng)
        last = draw_quality(rng, self.quality)
        if rng.random() < 0.5:
            return jpeg(to_image(self.finish(twice, height, width, rng)), last)
        return to_image(self.finish(to_tensor(jpeg(to_image(twice), last)), height, width, rng))

    def finish(self, image: Tensor, height: int, width: int, rng: np.random.Generator) -> Tensor:
        """The image at the low resolution, mostly with ringing."""
        low = resize(image, height, width, mode=draw_mode(rng))
        rings = rng.random() < self.ringing
        return blur(low, sinc_kernel(rng.uniform(np.pi / 3, np.pi))) if rings else low


DEGRADATIONS: dict[Name, Callable[[Image, int, int], Image]] = {
    "camera": Camera(),
    "night": Camera(noise=(15.0, 30.0), quality=(30, 70)),
    "jpeg": Compressed(),
    "real": Real(),
    "clean": lambda high, seed, scale: clean(high, scale),
}
