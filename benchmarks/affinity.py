"""Spatial affinity in blocks beside the textbook form: time, memory and accuracy, forward and backward.

    python benchmarks/affinity.py

The textbook form makes the two matrices of all pixel pairs and lets autograd do the rest. Goals: on two CPU threads,
four images of 48 channels, at least 4 times as fast at 32, 48 and 64 pixels a side; extra memory at 64 at most 1/20 of
the textbook form's; one image of 256 pixels a side in under 1 GB extra; the loss within 1e-6 of float64's. Memory is
that of the process (its peak while the function runs less what it had before), in a process of its own for each figure.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from common import (
    RESULTS,
    Section,
    TimedCase,
    facts_of_run,
    in_new_process,
    peak_memory,
    time_interleaved,
    write_results,
)
from torch import Tensor

from convlora.distill import spatial_affinity

CHANNELS = 48
FORMS = ("blocks", "textbook")


def textbook(student: Tensor, teacher: Tensor) -> Tensor:
    """FAKD's loss as its equations stand."""
    s, t = (F.normalize(f.flatten(2), dim=1) for f in (student, teacher))
    return (s.mT @ s - t.mT @ t).abs().mean()


LOSSES = {"blocks": spatial_affinity, "textbook": textbook}


def features(images: int, side: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    teacher = torch.randn(images, CHANNELS, side, side, device=device)
    student = (teacher + 0.3 * torch.randn_like(teacher)).to(dtype)
    return student.requires_grad_(), teacher.to(dtype)


def step(form: str, pair: tuple[Tensor, Tensor]) -> float:
    """Forward and backward; reading the loss waits for a GPU."""
    pair[0].grad = None
    loss = LOSSES[form](*pair)
    loss.backward()
    return loss.item()


# --- time -------------------------------------------------------------------------------------------------------------


def timing(device: str, dtype: torch.dtype, sides: list[int], rounds: int) -> Section:
    name = str(dtype).removeprefix("torch.")
    section = Section(
        f"Time on {device}, {name}",
        f"Forward and backward, 4 images of {CHANNELS} channels, milliseconds: median (interquartile range)."
        " Ratio: median of the rounds' ratios, CPU time in brackets. Goal on two CPU threads in float32: at least 4.",
        ("side", *FORMS, "textbook / blocks", "goal"),
    )
    for side in sides:
        pair = features(4, side, device, dtype)
        cases = [TimedCase(form, lambda _, form=form, pair=pair: step(form, pair)) for form in FORMS]
        times = time_interleaved(f"{side} x {side}", cases, rounds)
        ratio = times["textbook"].over(times["blocks"])
        goal = ("met" if ratio.wall >= 4 else "missed") if device == "cpu" and dtype == torch.float32 else ""
        section.add(
            str(side), *(str(times[form]) for form in FORMS), f"{ratio.wall:.1f} ({ratio.cpu:.1f})", goal,
            side=side, **{form: times[form].facts() for form in FORMS}, ratio=vars(ratio),
        )  # fmt: skip
    return section


# --- memory -----------------------------------------------------------------------------------------------------------


def extra_memory(form: str, images: int, side: int) -> tuple[int, float]:
    """(peak above what was there before, seconds) of one forward and backward, after a small one as warm-up."""
    step(form, features(1, 16, "cpu"))
    pair = features(images, side, "cpu")
    start = time.perf_counter()
    peak = peak_memory(lambda: step(form, pair))
    return peak, time.perf_counter() - start


def measured_apart(form: str, images: int, side: int) -> tuple[int, float]:
    """The same in a fresh process."""
    memory, seconds = in_new_process(__file__, "--measure", f"{form},{images},{side}")
    return int(memory), float(seconds)


def memory_section() -> Section:
    section = Section(
        "Extra memory on the CPU",
        f"Peak of one forward and backward above what the process had before, {CHANNELS} channels, float32, MiB. Goals:"
        " at 64 at most 1/20 of the textbook form's; at 256 under 1 GB.",
        ("images x side", *FORMS, "share", "seconds, blocks", "goal"),
    )
    for images, side, textbook_too in ((4, 32, True), (4, 48, True), (4, 64, True), (1, 128, True), (1, 256, False)):
        blocks, seconds = measured_apart("blocks", images, side)
        other = measured_apart("textbook", images, side)[0] if textbook_too else None
        goal = ""
        if side == 64 and other:
            goal = "met" if blocks <= other / 20 else "missed"
        if side == 256:
            goal = "met" if blocks < 1e9 else "missed"
        section.add(
            f"{images} x {side}", f"{blocks / 2**20:.1f}", f"{other / 2**20:.0f}" if other else "not run",
            f"1/{other / blocks:.0f}" if other else "", f"{seconds:.2f}", goal,
            images=images, side=side, blocks=blocks, textbook=other, seconds=seconds,
        )  # fmt: skip
    return section


# --- accuracy ---------------------------------------------------------------------------------------------------------


def accuracy() -> Section:
    section = Section(
        "Accuracy of float32",
        "Relative error of loss and gradient (largest error over largest value) against the textbook form in float64,"
        f" 2 images of {CHANNELS} channels, 32 pixels a side, by how far the student is from the teacher. Where a "
        "difference of affinities is near 0, rounding may turn its sign and so move the gradient. Goal for the loss of "
        "blocks: 1e-6.",
        ("noise on the student", *(f"{what}, {form}" for form in FORMS for what in ("loss", "gradient")), "goal"),
    )
    for noise in (1.0, 0.1, 1e-2, 1e-3, 1e-4):
        torch.manual_seed(0)
        teacher = torch.randn(2, CHANNELS, 32, 32)
        student = teacher + noise * torch.randn_like(teacher)
        exact, exact_gradient = _value(textbook, student.double(), teacher.double())
        errors = {}
        for form, loss in LOSSES.items():
            value, gradient = _value(loss, student, teacher)
            scale = exact_gradient.abs().max()
            errors[form] = abs(value - exact) / exact, float((gradient.double() - exact_gradient).abs().max() / scale)
        goal = "met" if errors["blocks"][0] <= 1e-6 else "missed"
        section.add(f"{noise:g}", *(f"{e:.0e}" for form in FORMS for e in errors[form]), goal, noise=noise, **errors)
    return section


def _value(loss: object, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    student = student.clone().requires_grad_()
    value = loss(student, teacher)  # type: ignore[operator]
    return value.item(), torch.autograd.grad(value, student)[0]


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of the timing.", min=1)] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
    quick: Annotated[bool, typer.Option(help="Three rounds, writes nothing.")] = False,
    out: Annotated[Path, typer.Option(help="Results as JSON, and beside it as Markdown.")] = RESULTS / "affinity.json",
    measure: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Compare the block form of spatial affinity with the textbook form."""
    torch.set_num_threads(threads)
    if measure:
        form, images, side = measure.split(",")
        print(*extra_memory(form, int(images), int(side)))
        return
    facts = facts_of_run("torch", "convlora")
    sections = [timing("cpu", torch.float32, [32, 48, 64], 3 if quick else rounds)]
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        sections += [timing("cuda", dtype, [32, 48, 64, 96], rounds) for dtype in (torch.float32, torch.bfloat16)]
    sections += [memory_section(), accuracy()]
    for section in sections:
        section.show()
    if not quick:
        write_results(out, "python benchmarks/affinity.py", facts, sections)


if __name__ == "__main__":
    typer.run(main)
