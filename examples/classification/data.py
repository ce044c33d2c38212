"""Three data sets of 16×16 pixels from what scikit-learn and matplotlib ship; nothing is downloaded.

| name | classes | images | held out |
|---|---|---|---|
| letters | A to Z, printed | 18 fonts of matplotlib, ink on paper | the four STIX fonts |
| digits | 0 to 9, by hand | scikit-learn's digits, bright on black | the second half |
| greek | α to ω, printed | 12 fonts, faint, noisy and unevenly lit | the four STIX fonts |

The digits come writer by writer (13 people), so that two halves without shuffling hardly share a hand. No STIX glyph
is ever trained on, neither by the base nor by a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from torch import Tensor

SIDE = 16  # of what the network sees
DRAWN = 48  # of a glyph as it is drawn, before it is turned, moved and reduced
DEJAVU = [
    f"DejaVu{family}{style}"
    for family, slanted in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")
]
COMPUTER_MODERN = ["cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"]
STIX = ["STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "STIXGeneralItalic"]
LATIN = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
GREEK = [chr(code) for code in range(ord("α"), ord("ω") + 1) if chr(code) != "ς"]
DIGITS = [str(digit) for digit in range(10)]
TEST_DRAWS = 8  # of each held-out glyph, each turned, moved and disturbed in its own way
TEST_SEED = 10**6  # training never draws with it


@dataclass(frozen=True)
class Labelled:
    """Images `(n, 1, SIDE, SIDE)` in [0, 1] and their classes `(n,)`."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Task:
    """What there is to learn: originals to draw training batches from, and held-out images as they are."""

    name: str
    classes: Sequence[str]
    originals: Labelled
    test: Labelled
    disturb: Callable[[Tensor, torch.Generator], Tensor]

    def batch(self, size: int, generator: torch.Generator) -> Labelled:
        """Random originals, each turned, moved and disturbed anew."""
        chosen = torch.randint(len(self.originals.labels), (size,), generator=generator)
        return self.draw(Labelled(self.originals.images[chosen], self.originals.labels[chosen]), generator)

    def draw(self, originals: Labelled, generator: torch.Generator) -> Labelled:
        """Each original once, turned, moved and disturbed."""
        return Labelled(self.disturb(warp(originals.images, generator), generator), originals.labels)


def letters_task() -> Task:
    """The base's: capital letters, dark on white."""
    return printed("letters", LATIN, DEJAVU + COMPUTER_MODERN, STIX, ink_on_paper)


def greek_task(*, searching: bool = False) -> Task:
    """Small Greek letters, faint, noisy, under uneven light.

    `searching`: judged by the serif fonts of those that are otherwise learned from, so that rates can be chosen
    without the test set.
    """
    if searching:
        return printed("greek", GREEK, DEJAVU[:8], DEJAVU[8:], badly_lit)
    return printed("greek", GREEK, DEJAVU, STIX, badly_lit)


def digits_task(*, searching: bool = False) -> Task:
    """Handwritten digits as scikit-learn has them: bright on black, 8×8 pixels, here enlarged.

    `searching`: judged by the last of those that are otherwise learned from.
    """
    loaded = load_digits()
    images = torch.from_numpy(loaded.images).float()[:, None] / 16
    labels = torch.from_numpy(loaded.target).long()
    half = len(labels) // 2
    learn, judge = (slice(700), slice(700, half)) if searching else (slice(half), slice(half, None))
    test = Labelled(enlarge(images[judge], SIDE), labels[judge])
    return Task("digits", DIGITS, Labelled(enlarge(images[learn], DRAWN), labels[learn]), test, as_they_are)


def printed(
    name: str,
    classes: Sequence[str],
    fonts: Sequence[str],
    held_out: Sequence[str],
    disturb: Callable[[Tensor, torch.Generator], Tensor],
) -> Task:
    """A task of printed characters: some fonts to learn from, others to be judged by."""
    task = Task(name, classes, glyphs(fonts, classes), glyphs(held_out, classes), disturb)
    generator = torch.Generator().manual_seed(TEST_SEED)
    draws = [task.draw(task.test, generator) for _ in range(TEST_DRAWS)]
    test = Labelled(torch.cat([draw.images for draw in draws]), torch.cat([draw.labels for draw in draws]))
    return Task(name, classes, task.originals, test, disturb)


def glyphs(fonts: Sequence[str], classes: Sequence[str]) -> Labelled:
    """Every class in every font, ink 1 on 0, centred, `(n, 1, DRAWN, DRAWN)`."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = [ImageFont.truetype(str(folder / f"{font}.ttf"), 2 * DRAWN) for font in fonts]
    images = [glyph(face, character) for face in faces for character in classes]
    return Labelled(torch.stack(images), torch.arange(len(classes)).repeat(len(fonts)))


def glyph(face: ImageFont.FreeTypeFont, character: str) -> Tensor:
    """One character, its longer side three quarters of the picture."""
    left, top, right, bottom = face.getbbox(character)
    drawn = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(drawn).text((-left, -top), character, fill=255, font=face)
    factor = 0.75 * DRAWN / max(drawn.size)
    drawn = drawn.resize([max(1, round(side * factor)) for side in drawn.size], Image.Resampling.BOX)
    picture = Image.new("L", (DRAWN, DRAWN))
    picture.paste(drawn, [(DRAWN - side) // 2 for side in drawn.size])
    return torch.from_numpy(np.array(picture))[None].float() / 255


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by up to 10°, sheared, scaled and moved a little, then reduced to `SIDE`."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, shear = uniform(-math.pi / 18, math.pi / 18), uniform(-0.15, 0.15)
    wide, high = uniform(0.9, 1.15), uniform(0.9, 1.15)
    rows = (
        torch.stack([wide * angle.cos(), wide * (shear - angle.sin()), uniform(-0.1, 0.1)], 1),
        torch.stack([high * angle.sin(), high * angle.cos(), uniform(-0.1, 0.1)], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, 2 * SIDE, 2 * SIDE], align_corners=False)
    return F.avg_pool2d(F.grid_sample(images, grid, align_corners=False), 2)


def enlarge(images: Tensor, side: int) -> Tensor:
    """Between pixels by straight lines."""
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def ink_on_paper(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Black on white."""
    return 1 - ink


def as_they_are(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Nothing happens."""
    return ink


def badly_lit(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast of 0.2 to 0.5, a paper that darkens to one side, noise of 0.08."""
    count = len(ink)
    contrast, light, tilt_x, tilt_y = torch.rand(4, count, 1, 1, 1, generator=generator)
    line = torch.linspace(-0.5, 0.5, SIDE)
    slope = 0.3 * ((2 * tilt_x - 1) * line + (2 * tilt_y - 1) * line[:, None])
    paper = 0.4 + 0.3 * light + slope
    noise = 0.08 * torch.randn(ink.shape, generator=generator)
    return (paper - (0.2 + 0.3 * contrast) * ink + noise).clamp(0, 1)
