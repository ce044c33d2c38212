"""How exact a merged weight is, that small updates are not lost, that extremes are safe, that a seed means a file.

1. Merge error: random layers of every sort at random magnitudes, each merged as it is and with `exact=True`, against
   `W + Σ strength·ΔW` in extended precision.
2. Small updates: a bfloat16 base trained with steps far below bfloat16's resolution, against the same in float64.
3. Extremes: huge and tiny alphas, ranks above full rank, zero and denormal weights, overflow.
4. Determinism: the same seed gives the same adapter file, byte for byte, in other processes, too.
"""

from __future__ import annotations

import copy
import hashlib
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Section
from einops import rearrange
from torch import Tensor, nn

import convlora
from benchmarks.trust import ROOT, environment
from benchmarks.trust.dense import UpdateSize, rounding_bound
from convlora.layer.adapted import weight_spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- 1. merge error ----------------------------------------------------------------------------------------------


@dataclass
class MergeErrors:
    """What was seen of one dtype, and of one way to merge."""

    layers: int = 0
    elements: int = 0
    correctly_rounded: int = 0
    within_one_ulp: int = 0
    ulp: float = 0.0  # largest error in units in the last place of the element itself
    layer_ulp: float = 0.0  # largest error in those of the layer's largest element
    of_bound: float = 0.0  # largest error over what `rounding_bound` allows
    moved: int = 0  # layers whose merged weight is not bitwise that before


def random_layer(choose: random.Random, dtype: torch.dtype) -> Any:
    """A layer of random sort, size and magnitude with one to three adapters of random sort, rank, scale and size."""
    n = choose.choice([1, 2, 2, 3])
    groups = choose.choice([1, 1, 2, 4])
    into, out = groups * choose.randint(1, 8), groups * choose.randint(1, 8)
    kernel = tuple(choose.randint(1, 4) for _ in range(n))
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if choose.random() < 0.2:
        layer: Any = nn.Linear(into, out)
    else:
        layer = choose.choice(convolutions)[n - 1](into, out, kernel, groups=groups)
    with torch.no_grad():
        size = 10 ** choose.uniform(-6, 2) if choose.random() < 0.5 else 0.1
        for parameter in layer.parameters():
            parameter.normal_(std=size)
    layer.to(dtype)
    strengths = {}
    for name in ("a", "b", "c")[: choose.choice([1, 1, 2, 3])]:
        strengths[name] = choose.choice([1.0, 1.0, choose.uniform(-2, 2)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", convlora.ConvLoRAWarning)  # tiny layers
            convlora.inject(
                layer, "*", name=name, rank=choose.choice([1, 2, 4, 16]), factors=choose.choice(["convlora", "locon"]),
                alpha=choose.choice([None, 10 ** choose.uniform(-6, 6)]),
                rank_scaling=choose.choice(["linear", "sqrt"]),
            )  # fmt: skip
        low_rank = layer.convlora.low_rank(name)
        ratio = 10 ** choose.uniform(-4, 1)
        with torch.no_grad():
            low_rank.lora_A.mul_(10 ** choose.uniform(-3, 3))
            low_rank.lora_B.normal_()
            now = float(low_rank("weight").double().square().mean().sqrt())
            low_rank.lora_B.mul_(ratio * size / max(now, 1e-30))
    convlora.activate(layer, strengths)
    return layer


def fused_exactly(layer: Any) -> tuple[Any, Tensor, list[UpdateSize]]:
    """`W + Σ strength·ΔW` of an adapted layer in numpy's longdouble, by definition; W; what rounding depends on."""
    spec = weight_spec(layer)
    base = layer._parameters["weight"].detach()
    total, changes = base.double().numpy().astype(np.longdouble), []
    for name in layer.convlora.active:
        low_rank = layer.convlora.low_rank(name)
        a, b = (p.detach().flatten(1).double().numpy().astype(np.longdouble) for p in low_rank.parameters())
        gain = low_rank.strength * low_rank.scale
        update, size = (_as_stored((q @ p).astype(np.longdouble), spec) for p, q in ((a, b), (np.abs(a), np.abs(b))))
        total = total + np.longdouble(low_rank.strength) * np.longdouble(low_rank.scale) * update
        sizes = torch.from_numpy(size.astype(np.float64)) * abs(gain)
        changes.append(UpdateSize(sizes, a.shape[0], abs(gain), torch.float32))
    return total, base, changes


def _as_stored(update: Any, spec: Any) -> Any:
    conv = update.reshape(spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)
    return rearrange(conv, "(g o) i ... -> (g i) o ...", g=spec.groups) if spec.transposed else conv


def ulps(values: Any, dtype: torch.dtype) -> Any:
    """The unit in the last place of a dtype at values of longdouble."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(np.maximum(np.abs(values), info.smallest_normal))
    return np.ldexp(np.longdouble(info.eps), exponent - 1)


def rounded_to_nearest(values: Any, dtype: torch.dtype) -> Any:
    """Values of longdouble rounded once to a dtype, ties to even, as longdouble."""
    ulp = ulps(values, dtype)
    rounded = np.rint(values / ulp) * ulp
    return np.where(np.abs(rounded) > torch.finfo(dtype).max, np.copysign(np.inf, rounded), rounded)


def compare(weight: Tensor, layer: Any, exact: bool, seen: MergeErrors) -> None:
    """Add the error of a merged weight to what was seen."""
    expected, base, changes = fused_exactly(layer)
    got = weight.detach().double().numpy().astype(np.longdouble)
    error = np.abs(got - expected)
    ulp = ulps(expected, weight.dtype)
    in_double = torch.from_numpy(expected.astype(np.float64))
    bound = rounding_bound(base.double(), in_double, changes, weight.dtype, exact).numpy()
    seen.layers += 1
    seen.elements += got.size
    seen.correctly_rounded += int((got == rounded_to_nearest(expected, weight.dtype)).sum())
    seen.within_one_ulp += int((error <= ulp).sum())
    seen.ulp = max(seen.ulp, float((error / ulp).max()))
    seen.layer_ulp = max(seen.layer_ulp, float(error.max() / ulps(np.abs(expected).max(), weight.dtype)))
    seen.of_bound = max(seen.of_bound, float((error / bound).max()))


def merge_errors(layers: int, seed: int = 0) -> dict[tuple[torch.dtype, bool], MergeErrors]:
    """By (dtype, exact), over a number of layers each."""
    found = {(dtype, exact): MergeErrors() for dtype in DTYPES for exact in (False, True)}
    for dtype in DTYPES:
        choose = random.Random(seed)
        torch.manual_seed(seed)
        for _ in range(layers):
            layer = random_layer(choose, dtype)
            live = layer.weight.detach().clone()
            for exact in (False, True):
                merged = convlora.merge(layer, exact=exact).weight
                compare(merged, layer, exact, found[dtype, exact])
                found[dtype, exact].moved += not torch.equal(merged, live)
    return found


# --- 2. small updates --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """What became of many steps below the resolution of bfloat16."""

    error: float  # of the factors' movement, against float64
    in_bfloat16: float  # how much of the movement is left where the factors are bfloat16, too
    weights_moved: float  # share of the fused bfloat16 weights that moved, of those that should


def small_updates(steps: int = 100, seed: int = 0) -> Small:
    """Train a bfloat16 convolution by steps of 2⁻¹¹ on factors in [½, 1), where bfloat16 has one number each 2⁻⁸."""
    torch.manual_seed(seed)
    base: Any = nn.Conv2d(8, 8, 3, padding=1).bfloat16()
    x, direction = torch.randn(2, 8, 10, 10).bfloat16(), torch.randn(2, 8, 10, 10).bfloat16()
    layer = convlora.inject(copy.deepcopy(base), "*", rank=4, factors="locon")
    with torch.no_grad():
        for p in convlora.parameters(layer):
            p.uniform_(0.5, 1).mul_(torch.randn_like(p).sign())
            p.copy_(p.bfloat16())  # all three trainings start alike
    start = [p.detach().clone() for p in convlora.parameters(layer)]
    wide = copy.deepcopy(layer).double()

    def gradients(model: Any) -> list[Tensor]:
        y = model(x.to(model.bias.dtype))
        return list(torch.autograd.grad((y * direction.to(y.dtype)).sum(), convlora.parameters(model)))

    lr = 2**-11 / max(float(g.abs().max()) for g in gradients(wide))
    narrow = [s.bfloat16() for s in start]
    weight = layer.weight.detach().clone()
    for model in (layer, wide):
        for _ in range(steps):
            found = gradients(model)
            with torch.no_grad():
                for p, g in zip(convlora.parameters(model), found, strict=True):
                    p.sub_(g, alpha=lr)
            if model is layer:
                for n, g in zip(narrow, found, strict=True):
                    n.sub_(g.bfloat16(), alpha=lr)
    expected = torch.cat([(p.detach() - s).flatten() for p, s in zip(convlora.parameters(wide), start, strict=True)])
    moved = torch.cat([(p.detach() - s).flatten() for p, s in zip(convlora.parameters(layer), start, strict=True)])
    left = torch.cat([(n.double() - s).flatten() for n, s in zip(narrow, start, strict=True)])
    change = (wide.weight.detach() - weight).abs()
    should = change > weight.abs().double() * 2**-7
    did = (layer.weight != weight)[should]
    return Small(
        float((moved - expected).norm() / expected.norm()),
        float((left @ expected) / expected.square().sum()),
        float(did.double().mean()),
    )


# --- 3. extremes -------------------------------------------------------------------------------------------------


def _layer(
    kind: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, fill: float | None = None, **options: Any
) -> Any:
    """A layer with random factors."""
    layer: Any = kind().to(dtype)
    with torch.no_grad():
        if fill is not None:
            layer.weight.fill_(fill)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", convlora.ConvLoRAWarning)
            convlora.inject(layer, "*", **{"rank": 2, **options})
        for p in convlora.parameters(layer):
            p.normal_()
    return layer


def _scaled(layer: Any, factor: float) -> Any:
    with torch.no_grad():
        for p in convlora.parameters(layer):
            p.mul_(factor)
    return layer


def _conv() -> nn.Module:
    return nn.Conv2d(4, 6, 3)


EXTREMES: dict[str, Callable[[], Any]] = {
    "alpha 1e18": lambda: _layer(_conv, alpha=1e18),
    "alpha 1e18, factors 1e-9": lambda: _scaled(_layer(_conv, alpha=1e18), 1e-9),
    "alpha 1e-18": lambda: _layer(_conv, alpha=1e-18),
    "alpha 1e-45, below float32": lambda: _layer(_conv, alpha=1e-45),
    "alpha 1e-300, below float32": lambda: _layer(_conv, alpha=1e-300),
    "alpha 0": lambda: _layer(_conv, alpha=0),
    "alpha 1e18, strength 1e-18": lambda: convlora.activate(_layer(_conv, alpha=1e18), {"default": 1e-18}),
    "alpha -1e18, strength 1e18": lambda: convlora.activate(_layer(_conv, alpha=-1e18), {"default": 1e18}),
    "factors whose product underflows": lambda: _scaled(_layer(_conv, alpha=1e18), 1e-23),
    "denormal factors": lambda: _scaled(_layer(_conv), 1e-40),
    "rank above full rank": lambda: _layer(_conv, rank=500),
    "rank above full rank, Linear": lambda: _layer(lambda: nn.Linear(2, 3), rank=64, rank_scaling="sqrt"),
    "rank above full rank, depthwise": lambda: _layer(lambda: nn.Conv2d(4, 4, 3, groups=4), rank=64, factors="locon"),
    "zero weights": lambda: _layer(_conv, fill=0.0),
    "denormal weights": lambda: _layer(_conv, fill=1e-40),
    "denormal weights and updates": lambda: _scaled(_layer(_conv, fill=1e-40), 1e-20),
    "denormal weights in float16": lambda: _scaled(_layer(_conv, torch.float16, fill=6e-8), 1e-4),
    "denormal weights in bfloat16": lambda: _scaled(_layer(_conv, torch.bfloat16, fill=1e-39), 1e-20),
    "largest float16": lambda: _scaled(_layer(_conv, torch.float16, fill=65504.0), 1.0),
}


def fault_at_extreme(name: str) -> str | None:
    """What went wrong at an extreme; None if nothing did.

    Both merges are within their bounds, unmerging brings back the bits, training from there gives finite gradients.
    """
    torch.manual_seed(0)
    layer = EXTREMES[name]()
    live = layer.weight.detach().clone()
    for exact in (False, True):
        seen = MergeErrors()
        compare(convlora.merge(layer, exact=exact).weight, layer, exact, seen)
        if not seen.of_bound <= 1:
            return f"error over bound {seen.of_bound:g} (exact={exact})"
        if exact and seen.correctly_rounded < seen.elements:
            return f"{seen.elements - seen.correctly_rounded} of {seen.elements} not correctly rounded"
    if not torch.equal(convlora.unmerge(layer).weight, live):
        return "not bitwise after unmerge"
    layer.weight.double().mean().backward()
    if not all(bool(p.grad.isfinite().all()) for p in convlora.parameters(layer)):
        return "a gradient that is not finite"
    return None


def fault_at_overflow(dtype: torch.dtype) -> str | None:
    """A fused weight that overflows is refused, and nothing is changed."""
    torch.manual_seed(0)
    layer = _scaled(_layer(_conv, dtype), 1e3 if dtype == torch.float16 else 1e19)
    for exact in (False, True):
        try:
            convlora.merge(layer, exact=exact)
        except convlora.ConvLoRAError as error:
            if "non-finite" not in str(error) or layer.convlora.merged:
                return f"wrong refusal: {error}"
        else:
            return "infinite weights were merged"
    return None


# --- 4. determinism ----------------------------------------------------------------------------------------------


def trained_file(seed: int, factors: str, dtype: torch.dtype) -> str:
    """SHA-256 of the adapter file that a short training on one thread gives: several sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _trained_file(seed, factors, dtype)
    finally:
        torch.set_num_threads(threads)


def _trained_file(seed: int, factors: str, dtype: torch.dtype) -> str:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=2), nn.SiLU(), nn.Conv2d(8, 3, 3))
    model.to(dtype)
    convlora.inject(model, ["0", "2", "4"], rank=2, factors=factors, bias=True, rank_dropout=0.1)
    for _ in range(5):
        loss = model(torch.randn(2, 3, 12, 12, dtype=dtype)).float().square().mean()
        gradients = torch.autograd.grad(loss, convlora.parameters(model))
        with torch.no_grad():
            for p, g in zip(convlora.parameters(model), gradients, strict=True):
                p.sub_(g, alpha=0.1)
    with tempfile.TemporaryDirectory() as folder:
        convlora.save(model, f"{folder}/a.safetensors")
        return hashlib.sha256(Path(f"{folder}/a.safetensors").read_bytes()).hexdigest()


def file_hashes_of_new_process(seed: int, hash_seed: int) -> list[str]:
    """The files of `file_hashes`, made by another process."""
    code = f"from benchmarks.trust import numerics; print(*numerics.file_hashes({seed}))"
    settings = environment(PYTHONHASHSEED=str(hash_seed))
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=settings, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def file_hashes(seed: int) -> list[str]:
    """The files of a seed, for both factorizations and two dtypes."""
    return [trained_file(seed, factors, dtype) for factors in ("convlora", "locon") for dtype in DTYPES[:2]]


# --- all of it ---------------------------------------------------------------------------------------------------


def measure(count: int, seed: int = 0) -> Section:
    """`count` random layers in each dtype, and the other three questions once."""
    start = time.perf_counter()
    section = Section("Numerics", "", ("question", "cases", "result", "goal", "outcome"))

    def add(question: str, cases: str, result: str, goal: str, holds: bool, **facts: Any) -> None:
        outcome = "holds" if holds else "FAILED"
        facts = {"question": question, "result": result, "failed": int(not holds), **facts}
        section.add(question, cases, result, goal, outcome, **facts)

    for (dtype, exact), seen in merge_errors(count, seed).items():
        name = str(dtype).removeprefix("torch.") + (", exact=True" if exact else "")
        cases, facts = f"{seen.layers} layers, {seen.elements} weights", vars(seen)
        add(f"{name}: error over its bound", cases, f"{seen.of_bound:.3f}", "≤ 1", seen.of_bound <= 1, **facts)
        wrong = seen.elements - seen.correctly_rounded
        if exact:
            add(f"{name}: error in ulp of the weight", cases, f"{seen.ulp:.6f}", "≤ 0.5", seen.ulp <= 0.5 + 1e-6)
            add(f"{name}: not correctly rounded", cases, str(wrong), "0", wrong == 0)
        else:
            within = f"{seen.within_one_ulp / seen.elements:.4%} ≤ 1 ulp, largest {seen.ulp:.3g} ulp"
            add(f"{name}: error in ulp of the weight", cases, within, "stated", True)
            add(f"{name}: in ulp of the layer's largest weight", cases, f"{seen.layer_ulp:.2f}", "stated", True)
            add(f"{name}: not correctly rounded", cases, f"{wrong / seen.elements:.4%}", "stated", True)
            add(f"{name}: merged not bitwise as unmerged", cases, str(seen.moved), "0", seen.moved == 0)
    small = small_updates(seed=seed)
    steps = "100 steps of 2⁻¹¹"
    add("bfloat16 base, float32 factors: movement lost", steps, f"{small.error:.2%}", "< 2 %", small.error < 0.02)
    add("  kept with bfloat16 factors", steps, f"{small.in_bfloat16:.2%}", "stated", True)
    add("  fused weights that follow", steps, f"{small.weights_moved:.2%}", "100 %", small.weights_moved == 1)
    wrong_at = {name: problem for name in EXTREMES if (problem := fault_at_extreme(name))}
    wrong_at |= {f"overflow in {d}": problem for d in DTYPES if (problem := fault_at_overflow(d))}
    said = "; ".join(f"{name}: {problem}" for name, problem in wrong_at.items()) or "as it should be"
    add("extremes", f"{len(EXTREMES) + len(DTYPES)} layers", said, "as it should be", not wrong_at)
    files = [file_hashes(seed) for _ in range(2)] + [file_hashes_of_new_process(seed, other) for other in (1, 2)]
    alike = all(file == files[0] for file in files)
    add("same seed, same file", "4 files, 3 processes", "bitwise" if alike else "differ", "bitwise", alike)
    section.note = (
        "Merged weights against W + Σ strength·ΔW in extended precision, over layers of every sort, |W| from 1e-6 to"
        " 100, |ΔW|/|W| from 1e-4 to 10, ranks 1 to 16, one to three adapters. The bound of an element, with u the unit"
        " roundoff of float32 and n products: half an ulp + (n + 3)·u·gain·Σ|b||a| + u·(|W| + gain·Σ|b||a|) for each"
        f" adapter. {time.perf_counter() - start:.0f} s."
    )
    return section
