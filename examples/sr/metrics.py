"""PSNR and SSIM on luma, as super-resolution papers report them.

Both take uint8 RGB images `(h, w, 3)`, convert them to BT.601 luma and leave out `shave` pixels
along each edge (the scale factor, usually), where the network lacks context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sr.data import Image


def luma(image: Image) -> NDArray[np.float64]:
    """BT.601 studio-swing luma `(h, w)`, 16 … 235, unrounded (MATLAB's `rgb2ycbcr` before uint8)."""
    return 16.0 + image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255.0


def shaved_luma(image: Image, shave: int) -> NDArray[np.float64]:
    """Luma without the outer `shave` pixels."""
    height, width = image.shape[:2]
    return luma(image[shave : height - shave, shave : width - shave])


def psnr_y(output: Image, truth: Image, shave: int = 4) -> float:
    """Peak signal-to-noise ratio of luma in dB: 10·log10(255² / mean squared error)."""
    pair = shaved_luma(truth, shave), shaved_luma(output, shave)
    return float(peak_signal_noise_ratio(*pair, data_range=255))


def ssim_y(output: Image, truth: Image, shave: int = 4) -> float:
    """Structural similarity of luma (Wang et al. 2004): 11x11 Gaussian window, sigma 1.5.

    The mean runs over the region where the whole window fits.
    """
    return float(
        structural_similarity(
            shaved_luma(truth, shave),
            shaved_luma(output, shave),
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


@dataclass(frozen=True)
class Quality:
    """Mean PSNR-Y in dB and mean SSIM-Y over some images, and the PSNR-Y of each."""

    psnr: float
    ssim: float
    psnrs: list[float]


def quality(outputs: Sequence[Image], truths: Sequence[Image], shave: int = 4) -> Quality:
    """The means over pairs of images."""
    psnrs = [psnr_y(output, truth, shave) for output, truth in zip(outputs, truths, strict=True)]
    ssims = [ssim_y(output, truth, shave) for output, truth in zip(outputs, truths, strict=True)]
    return Quality(sum(psnrs) / len(psnrs), sum(ssims) / len(ssims), psnrs)
