"""Losses between features: against naive float64 versions, gradients included, and their laws."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import AFFINITIES
from torch import Tensor

from convlora import ConvLoRAError
from convlora.distill import attention, channel_affinity, instance_affinity, l1, mse, register_loss, spatial_affinity
from convlora.distill import losses as losses_module
from convlora.distill.affinity import pairwise_l1

LOSSES = {loss.__name__: loss for loss in (spatial_affinity, channel_affinity, instance_affinity, attention, l1, mse)}


def features(
    *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, apart: float = 0.3
) -> tuple[Tensor, Tensor]:
    """A teacher's feature and a student's that differs by noise; the student's takes gradients."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(shape, dtype=torch.float64, generator=generator)
    student = teacher + apart * torch.randn(shape, dtype=torch.float64, generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def value_and_gradients(loss: object, student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    s, t = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    value = loss(s, t)  # type: ignore[operator]
    return value.detach(), *torch.autograd.grad(value, (s, t))


@pytest.mark.parametrize("shape", [(2, 5, 6, 4), (3, 7, 9), (1, 4, 3, 2, 5), (2, 1, 4, 4), (4, 3, 1, 1)])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_definition(name: str, shape: tuple[int, ...]) -> None:
    student, teacher = features(*shape)
    got = value_and_gradients(LOSSES[name], student, teacher)
    expected = value_and_gradients(AFFINITIES[name], student, teacher)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@given(
    images=st.integers(1, 9), channels=st.integers(1, 6), others=st.integers(1, 6), pixels=st.integers(1, 80),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_spatial_affinity_is_the_definition_for_any_size(
    images: int, channels: int, others: int, pixels: int, seed: int
) -> None:
    student, _ = features(images, channels, pixels, seed=seed)
    teacher, _ = features(images, others, pixels, seed=seed + 1)
    got = value_and_gradients(spatial_affinity, student, teacher)
    expected = value_and_gradients(AFFINITIES["spatial_affinity"], student, teacher)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pixels", [31, 32, 33, 700, 1025])  # blocks have 512 pixels a side, for one image in float64
def test_blocks_of_spatial_affinity_fit_together(pixels: int) -> None:
    student, teacher = features(1, 3, pixels)
    got = value_and_gradients(spatial_affinity, student, teacher)
    expected = value_and_gradients(AFFINITIES["spatial_affinity"], student, teacher)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def test_spatial_affinity_passes_gradcheck() -> None:
    student, teacher = features(2, 4, 3, 3)
    assert torch.autograd.gradcheck(spatial_affinity, (student, teacher.requires_grad_()))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "spatial_affinity"])
def test_other_losses_have_second_derivatives(name: str) -> None:
    student, teacher = features(3, 4, 3, 2)
    assert torch.autograd.gradgradcheck(LOSSES[name], (student, teacher))


@pytest.mark.parametrize("apart", [1.0, 1e-1, 1e-3])
@pytest.mark.parametrize("side", [8, 32])
def test_spatial_affinity_in_float32_is_within_a_millionth(side: int, apart: float) -> None:
    student, teacher = features(2, 48, side, side, dtype=torch.float32, apart=apart)
    exact = AFFINITIES["spatial_affinity"](student.double(), teacher.double()).item()
    assert abs(spatial_affinity(student, teacher).item() - exact) <= 1e-6 * exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_features_accumulate_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = features(2, 6, 5, 5, dtype=dtype)
    loss = LOSSES[name](student, teacher)
    exact = AFFINITIES[name](student.double(), teacher.double()).item()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact) <= 1e-5 * exact
    loss.backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name: str) -> None:
    student, teacher = features(2, 6, 5, 5, dtype=torch.float32)
    under_autocast = torch.autocast("cpu", dtype=torch.bfloat16)(LOSSES[name])
    got = value_and_gradients(under_autocast, student, teacher)
    for one, other in zip(got, value_and_gradients(LOSSES[name], student, teacher), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_features_give_exactly_zero_and_no_gradient(name: str) -> None:
    student, _ = features(2, 6, 9, 7, dtype=torch.float32)
    loss = LOSSES[name](student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("name", ["spatial_affinity", "channel_affinity", "instance_affinity", "attention"])
def test_vectors_of_zeros_give_finite_gradients(name: str) -> None:
    student, teacher = features(2, 4, 5, 5)
    with torch.no_grad():
        student[0], student[:, 1], student[:, :, 2], teacher[:, :, 3] = 0, 0, 0, 0
    loss = LOSSES[name](student, teacher)
    loss.backward()
    assert math.isfinite(loss.item())
    assert loss.item() > 0
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 10  # PyTorch's `normalize` gives 1e12 here


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_affinities_do_not_see_the_length_of_vectors(scale: float, seed: int) -> None:
    student, teacher = features(2, 3, 4, 4, seed=seed)
    for name in ("spatial_affinity", "channel_affinity", "instance_affinity"):
        torch.testing.assert_close(LOSSES[name](scale * student, teacher), LOSSES[name](student, teacher))


@given(seed=st.integers(0, 99))
def test_spatial_affinity_is_symmetric_and_bounded(seed: int) -> None:
    student, teacher = features(2, 3, 4, 4, seed=seed, apart=3)
    torch.testing.assert_close(spatial_affinity(student, teacher), spatial_affinity(teacher, student))
    assert 0 <= spatial_affinity(student, teacher).item() <= 2


def test_order_of_pixels_does_not_count_for_spatial_affinity() -> None:
    student, teacher = features(2, 3, 6, 6)
    moved = (student.flatten(2)[..., (order := torch.randperm(36))], teacher.flatten(2)[..., order])
    torch.testing.assert_close(spatial_affinity(*moved), spatial_affinity(student, teacher))


@pytest.mark.parametrize("name", ["spatial_affinity", "channel_affinity", "attention"])
def test_channels_may_come_last(name: str) -> None:
    student, teacher = features(2, 3, 6, dtype=torch.float64)
    tokens = LOSSES[name](student.mT, teacher.mT, channel_dim=-1)
    torch.testing.assert_close(tokens, LOSSES[name](student, teacher))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_memory_format_changes_nothing(layout: torch.memory_format) -> None:
    student, teacher = features(2, 8, 6, 6)
    plain = value_and_gradients(spatial_affinity, student, teacher)
    laid = value_and_gradients(spatial_affinity, student.contiguous(memory_format=layout), teacher)
    for one, other in zip(laid, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_a_double_backward_raises() -> None:
    student, teacher = features(1, 3, 4, 4)
    (gradient,) = torch.autograd.grad(spatial_affinity(student, teacher), student, create_graph=True)
    with pytest.raises(ConvLoRAError, match="no second derivative"):
        gradient.square().sum().backward()


def test_the_gradient_reaches_the_weight_of_the_loss() -> None:
    student, teacher = features(1, 3, 4, 4)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = spatial_affinity(student, teacher)
    (weight * loss).backward()
    torch.testing.assert_close(weight.grad, loss.detach())


@pytest.mark.parametrize("frozen", ["student", "teacher", "both"])
def test_only_what_needs_a_gradient_gets_one(frozen: str) -> None:
    student, teacher = (f.detach() for f in features(1, 3, 4, 4))
    student.requires_grad_(frozen == "teacher")
    teacher.requires_grad_(frozen == "student")
    loss = spatial_affinity(student, teacher)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    assert (student.grad is None, teacher.grad is None) == (frozen != "teacher", frozen != "student")


def test_spatial_affinity_compiles_into_one_graph() -> None:
    student, teacher = features(2, 4, 6, 6)
    compiled = torch.compile(lambda s, t: 2 * spatial_affinity(s.sin(), t), fullgraph=True, backend="aot_eager")
    got = value_and_gradients(compiled, student, teacher)
    expected = value_and_gradients(lambda s, t: 2 * spatial_affinity(s.sin(), t), student, teacher)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_operator_keeps_pytorchs_contract() -> None:
    student, teacher = (f.flatten(2).detach() for f in features(2, 4, 6, 6))
    for wanted in ((True, True), (True, False), (False, False)):
        torch.library.opcheck(
            torch.ops.convlora.spatial_affinity,
            (student, teacher, *wanted),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_no_matrix_of_all_pairs_is_ever_held() -> None:
    """The largest tensor made on the way has fewer elements than a quarter of (HW)²."""
    student, teacher = (f.flatten(2) for f in features(1, 2, 64, 64, dtype=torch.float32))

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    with Largest() as largest:
        pairwise_l1(student, teacher).backward()
    assert 0 < largest.elements <= 4096**2 / 4


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("spatial_affinity", (2, 3, 4, 4), (2, 3, 4, 5)),
        ("spatial_affinity", (2, 3, 4, 4), (1, 3, 4, 4)),
        ("spatial_affinity", (2, 3), (2, 3)),
        ("channel_affinity", (2, 3, 4, 4), (2, 4, 4, 4)),
        ("instance_affinity", (2, 3, 4, 4), (3, 3, 4, 4)),
        ("attention", (2, 3, 4, 4), (2, 3, 5, 4)),
        ("l1", (2, 3, 4, 4), (2, 1, 4, 4)),
        ("mse", (2, 3, 4, 4), (3, 4, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_named(name: str, one: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(ConvLoRAError, match=f"{name}: .*\\({one[0]}, {one[1]}"):
        LOSSES[name](torch.rand(one), torch.rand(other))


def test_integers_are_refused() -> None:
    with pytest.raises(ConvLoRAError, match=r"floating point, got torch\.int64"):
        spatial_affinity(torch.ones(1, 2, 3, 3, dtype=torch.int64), torch.rand(1, 2, 3, 3))


def test_names_are_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_module, "_losses", dict(losses_module._losses))
    assert register_loss("huber", F.smooth_l1_loss) is F.smooth_l1_loss
    assert register_loss("huber", F.smooth_l1_loss) is F.smooth_l1_loss
    with pytest.raises(ConvLoRAError, match="'huber' is taken"):
        register_loss("huber", F.l1_loss)
    with pytest.raises(ConvLoRAError, match="must be callable, got int"):
        register_loss("seven", 7)  # type: ignore[arg-type]
    with pytest.raises(ConvLoRAError, match="non-empty string"):
        register_loss("", F.l1_loss)
    with pytest.raises(ConvLoRAError, match="no loss 'hubert'; there are attention, channel_affinity, huber,"):
        losses_module.get_loss("hubert")
