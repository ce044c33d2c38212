"""What happens to a photo before super-resolution sees it: blur, bicubic reduction, noise, JPEG."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image as PilImage
from torch import Tensor

from sr.data import Image, to_image, to_tensor


def resize(tensor: Tensor, height: int, width: int) -> Tensor:
    """Bicubic resizing `(1, 3, h, w)` with antialiasing (a = -0.5, as MATLAB's and Pillow's)."""
    return F.interpolate(tensor, size=(height, width), mode="bicubic", antialias=True)


def clean(high: Image, scale: int = 4) -> Image:
    """The reduced photo, rounded to uint8: the input of super-resolution papers."""
    return to_image(resize(to_tensor(high), high.shape[0] // scale, high.shape[1] // scale))


def enlarge(low: Image, scale: int = 4) -> Image:
    """The bicubic enlargement that a network has to beat."""
    return to_image(resize(to_tensor(low), low.shape[0] * scale, low.shape[1] * scale))


def gaussian_kernel(sigma_x: float, sigma_y: float, theta: float, size: int = 21) -> NDArray[np.float64]:
    """A Gaussian `(size, size)` of sum 1, widths in pixels, its first axis turned by `theta` radians."""
    offsets = np.arange(size) - size // 2
    y, x = np.meshgrid(offsets, offsets, indexing="ij")
    along = np.cos(theta) * x + np.sin(theta) * y
    across = -np.sin(theta) * x + np.cos(theta) * y
    kernel = np.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2))
    return kernel / kernel.sum()


def blur(tensor: Tensor, kernel: NDArray[np.float64]) -> Tensor:
    """Each channel of `(1, c, h, w)` correlated with one kernel, reflected at the edges."""
    weight = torch.from_numpy(kernel).to(tensor)[None, None].repeat(tensor.shape[1], 1, 1, 1)
    padded = F.pad(tensor, [kernel.shape[0] // 2] * 4, mode="reflect")
    return F.conv2d(padded, weight, groups=tensor.shape[1])


def jpeg(image: Image, quality: int) -> Image:
    """The image after JPEG of this quality, colours at half resolution (4:2:0)."""
    buffer = io.BytesIO()
    PilImage.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=2)
    return np.asarray(PilImage.open(buffer).convert("RGB"))


@dataclass(frozen=True)
class Camera:
    """A small lens, a small sensor and a strong compression, each drawn from a range.

    Half the blurs are round. Widths in pixels of the high resolution, noise as standard deviation
    of 255 levels, uniform over the range; quality is a whole number, both ends included.
    """

    width: tuple[float, float] = (0.8, 2.0)
    noise: tuple[float, float] = (2.0, 10.0)
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
        quality = int(rng.integers(self.quality[0], self.quality[1] + 1))
        height, width = high.shape[0] // scale, high.shape[1] // scale
        blurred = blur(to_tensor(high), gaussian_kernel(sigma_x, sigma_y, theta))
        grain = torch.from_numpy(rng.normal(0, noise / 255, size=(height, width, 3)))
        low = resize(blurred, height, width) + grain.permute(2, 0, 1).float()
        return jpeg(to_image(low), quality)


DEGRADATIONS: dict[str, Callable[[Image, int, int], Image]] = {
    "camera": Camera(),
    "night": Camera(noise=(15.0, 30.0), quality=(30, 70)),
    "clean": lambda high, seed, scale: clean(high, scale),
}
