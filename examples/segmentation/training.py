"""Random crops, a training loop, and how good masks are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

BATCH, CROP = 8, 64


def random_crops(planes: Sequence[Tensor], steps: int, seed: int) -> Iterator[list[Tensor]]:
    """`steps` batches of squares of images, or of images and masks: equal squares, flipped at random.

    Turned they are not: the lines of a scan have a direction.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int, count: int) -> list[int]:
        return torch.randint(below, (count,), generator=generator).tolist()

    room = planes[0].shape[-1] - CROP + 1
    for _ in range(steps):
        chosen, (top, left), flips = draw(len(planes[0]), BATCH), draw(room, 2), draw(2, 2)
        axes = [axis for axis, flip in zip((2, 3), flips, strict=True) if flip]
        yield [plane[chosen, :, top : top + CROP, left : left + CROP].flip(axes) for plane in planes]


def train(
    parameters: Iterable[nn.Parameter],
    loss: Callable[..., Tensor],
    *planes: Tensor,
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Adam on `loss(*crops of the planes)`; the learning rate rises to `rate` and falls along a cosine."""
    optimizer = torch.optim.Adam(parameters, rate)
    schedule = OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.15)
    for batch in random_crops(planes, steps, seed):
        optimizer.zero_grad()
        loss(*batch).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def segment(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of all images, in eval mode."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def dice(logits: Tensor, masks: Tensor) -> float:
    """2·|A∩B| / (|A| + |B|) of predicted and true mask, the mean over images; 1 where both are empty."""
    predicted = (logits > 0).float()
    both, sizes = (predicted * masks).sum((1, 2, 3)), (predicted + masks).sum((1, 2, 3))
    return float(torch.where(sizes > 0, 2 * both / sizes.clamp(min=1), 1.0).mean())
