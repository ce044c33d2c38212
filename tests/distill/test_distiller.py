"""`Distiller`: what it compares, what it leaves alone, and what it says when it cannot."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import AFFINITIES
from processes import in_processes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import convlora
from convlora import ConvLoRAError
from convlora.distill import Distiller, spatial_affinity
from convlora.distill.taps import FeatureTaker, FeatureTap, find_taps


class Block(nn.Module):
    """As SPAN's: several outputs, and an activation that overwrites a convolution's output."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.act(self.first(x))
        return x + self.second(inner), inner


class Net(nn.Module):
    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.block_1, self.block_2 = Block(channels), Block(channels)
        self.norm, self.drop = nn.BatchNorm2d(channels), nn.Dropout(0.5)
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.block_1(self.head(x))
        x, _ = self.block_2(x)
        return self.tail(self.drop(self.norm(x)))


BLOCKS = ["block_1[0]", "block_2[0]"]


def student(trained: bool = True, **options: Any) -> nn.Module:
    model = convlora.inject(Net(), "*", **{"rank": 2, **options})
    if trained:
        for parameter in convlora.parameters(model):
            nn.init.normal_(parameter, std=0.1)
    return model


def batch(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def by_hand(model: nn.Module, x: Tensor, block: str, element: int) -> Tensor:
    """A block's output by a plain hook."""
    seen: list[Tensor] = []
    handle = model.get_submodule(block).register_forward_hook(lambda _m, _i, out: seen.append(out[element]))
    model(x)
    handle.remove()
    return seen[0]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


# --- what comes out ------------------------------------------------------------------------------------------------


def test_terms_are_the_losses_between_student_and_frozen_base() -> None:
    model, x = student().eval(), batch()
    out = Distiller(model, BLOCKS)(x)
    with convlora.disabled(model):
        base = {block: by_hand(model, x, block, 0) for block in ("block_1", "block_2")}
        torch.testing.assert_close(out.teacher, model(x), rtol=0, atol=0)
    for block, feature in base.items():
        expected = AFFINITIES["spatial_affinity"](by_hand(model, x, block, 0).double(), feature.double())
        torch.testing.assert_close(out.terms[f"{block}[0]"].double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.loss, sum(out.terms.values()))
    torch.testing.assert_close(out.student, model(x), rtol=0, atol=0)
    assert list(out.terms) == BLOCKS
    assert not out.teacher.requires_grad


def test_gradients_are_those_of_the_loss_by_hand() -> None:
    model, x = student().eval(), batch()
    out = Distiller(model, ["block_2[0]"], loss="mse")(x)
    got = torch.autograd.grad(out.loss, convlora.parameters(model), allow_unused=True)
    with convlora.disabled(model), torch.no_grad():
        target = by_hand(model, x, "block_2", 0)
    expected = torch.autograd.grad(
        F.mse_loss(by_hand(model, x, "block_2", 0), target), convlora.parameters(model), allow_unused=True
    )
    assert any(gradient is not None and gradient.any() for gradient in got)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_a_fresh_adapter_has_no_loss_and_no_gradient_from_it() -> None:
    model = student(trained=False).eval()
    out = Distiller(model, BLOCKS)(batch())
    out.loss.backward()
    assert out.loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in convlora.parameters(model))


@pytest.mark.parametrize("layers", [{"block_1[0]": "stem"}, {"block_1[0]": "body.0", "block_2[0]": "body.1"}])
def test_another_teacher_by_mapping(layers: dict[str, str]) -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 9, 3, padding=1)
            self.body = nn.Sequential(nn.Conv2d(9, 9, 3, padding=1), nn.Conv2d(9, 9, 3, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.stem(x))

    teacher, model, x = Teacher(), nn.Module.train(Net()), batch()
    out = Distiller(model, layers, teacher=teacher)(x)
    first = teacher.stem(x) if "stem" in layers.values() else teacher.body[0](teacher.stem(x))
    torch.testing.assert_close(out.terms["block_1[0]"], spatial_affinity(by_hand(model, x, "block_1", 0), first))
    assert len(out.terms) == len(layers)
    assert teacher.training


def test_weights_and_order() -> None:
    model, x = student().eval(), batch()
    out = Distiller(model, ["block_2[1]", "head", "block_1[0]"], weights={"block_*": 3.0, "block_2": 0.5}, loss="l1")(x)
    assert list(out.terms) == ["head", "block_1[0]", "block_2[1]"]
    torch.testing.assert_close(out.loss, sum(w * t for w, t in zip((1, 3, 0.5), out.terms.values(), strict=True)))
    half = Distiller(model, BLOCKS, weights=0.5)(x)
    torch.testing.assert_close(half.loss, 0.5 * sum(half.terms.values()))


def test_a_user_loss_and_a_projection() -> None:
    model, x = student().eval(), batch()
    teacher, project = Net(channels=10), nn.Conv2d(6, 10, 1)
    distiller = Distiller(model, BLOCKS, teacher=teacher, loss=F.smooth_l1_loss, project={"block_*": project})
    distiller(x).loss.backward()
    assert project.weight.grad is not None
    assert project.weight.grad.any()
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_may_see_another_image() -> None:
    model, x, clean = student().eval(), batch(), batch(1)
    out = Distiller(model, ["head"], loss="l1")(x, clean)
    with convlora.disabled(model):
        torch.testing.assert_close(out.teacher, model(clean), rtol=0, atol=0)
        torch.testing.assert_close(out.terms["head"], (model.head(clean) - _on(model.head, x)).abs().mean())
    torch.testing.assert_close(out.student, model(x), rtol=0, atol=0)


def _on(layer: nn.Module, x: Tensor) -> Tensor:
    slot = layer.convlora
    state = slot.state()
    slot.activate({"default": 1.0})
    try:
        return layer(x)
    finally:
        slot.restore(state)


def test_no_layers_means_outputs_alone() -> None:
    out = Distiller(student(), [])(batch())
    assert out.terms == {}
    assert out.loss.item() == 0
    F.l1_loss(out.student, out.teacher).backward()


def test_a_layer_that_runs_twice_counts_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    model, x = convlora.inject(Twice(), "*", rank=1), batch()
    nn.init.normal_(convlora.parameters(model)[1], std=0.1)
    out = Distiller(model, ["conv"], loss="mse")(x)
    with convlora.disabled(model):
        base = [first := model.conv(x), model.conv(first)]
    own = [first := model.conv(x), model.conv(first)]
    expected = torch.stack([F.mse_loss(s, t) for s, t in zip(own, base, strict=True)]).mean()
    torch.testing.assert_close(out.terms["conv"], expected)


def test_inputs_by_position_and_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": self.conv(x) + y, "x": x}

    model, x, y = convlora.inject(Two(), "*", rank=1), batch(), batch(1)
    expected = model(x, y)["sum"]
    for given in ((x, y), {"y": y, "x": x}):
        out = Distiller(model, ["conv"])(given)
        torch.testing.assert_close(out.student["sum"], expected, rtol=0, atol=0)


# --- layers ----------------------------------------------------------------------------------------------------------


def test_names_elements_and_globs() -> None:
    model = student()
    assert find_taps(model, "block_1") == [FeatureTap("block_1")]
    assert find_taps(model, "block_1[0]") == [FeatureTap("block_1", (0,))]
    assert find_taps(model, "block_[12]") == [FeatureTap("block_1"), FeatureTap("block_2")]
    assert find_taps(model, "block_[12][-1]") == [FeatureTap("block_1", (-1,)), FeatureTap("block_2", (-1,))]
    assert find_taps(model, "block_*") == [FeatureTap("block_1"), FeatureTap("block_2")]
    assert find_taps(model, "block_1.*") == [
        FeatureTap("block_1.first"),
        FeatureTap("block_1.second"),
        FeatureTap("block_1.act"),
    ]
    assert find_taps(model, "block_*[0][key]") == [FeatureTap("block_1", (0, "key")), FeatureTap("block_2", (0, "key"))]
    assert find_taps(model, r"re:block_1\.(first|act)") == [FeatureTap("block_1.first"), FeatureTap("block_1.act")]
    assert find_taps(model, nn.BatchNorm2d) == [FeatureTap("norm")]
    assert find_taps(model, lambda name, module: name == "tail") == [FeatureTap("tail")]
    assert find_taps(model, "second") == [FeatureTap("block_1.second"), FeatureTap("block_2.second")]
    assert find_taps(model, "") == [FeatureTap("")]
    assert str(FeatureTap("a.b", (0, "key"))) == "a.b[0][key]"
    assert not any("convlora" in tap.module for tap in find_taps(model, "*"))


def test_an_element_of_a_mapping() -> None:
    class Mapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
            return {"features": [x, self.body(x)]}

    model = convlora.inject(Mapping(), "*", rank=1)
    nn.init.ones_(convlora.parameters(model)[1])
    net = nn.Sequential(model)
    out = Distiller(net, ["0[features][1]"], loss="l1")(batch())
    assert out.terms["0[features][1]"].item() > 0


def test_features_are_safe_from_an_activation_in_place() -> None:
    model, x = student().eval(), batch()
    expected = F.conv2d(model.head(x), model.block_1.first.weight, model.block_1.first.bias, padding=1)
    _, found = FeatureTaker(model, find_taps(model, "block_1.first"))(x)
    (feature,) = found[FeatureTap("block_1.first")]
    torch.testing.assert_close(feature, expected)
    seen: list[Tensor] = []
    handle = model.block_1.first.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(x)
    handle.remove()
    assert not torch.allclose(seen[0], expected)  # what a plain hook keeps


# --- what is left alone -----------------------------------------------------------------------------------------------


def test_batchnorm_and_dropout_do_not_notice_the_teacher() -> None:
    """Three training steps with and without a Distiller: the same outputs and statistics, bit by bit."""
    runs = []
    for distil in (True, False):
        torch.manual_seed(3)
        model = student().train()
        model.norm.momentum = 0.5
        torch.manual_seed(4)
        distiller = Distiller(model, BLOCKS)
        runs.append([*(distiller(batch(i)).student if distil else model(batch(i)) for i in range(3))])
        runs[-1] += [model.norm.running_mean, model.norm.running_var, model.norm.num_batches_tracked]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_a_teacher_that_draws_numbers_leaves_the_students_alone() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + torch.randn_like(x)

    model = convlora.inject(Noisy(), "*", rank=1)
    torch.manual_seed(0)
    with_teacher = [Distiller(model, [])(batch()).student for _ in range(2)]
    torch.manual_seed(0)
    assert all(torch.equal(out, model(batch())) for out in with_teacher)


def test_modes_adapters_and_hooks_come_back() -> None:
    model = student().train()
    model.norm.eval()
    convlora.activate(model, {"default": 0.5})
    before = [module.training for module in model.modules()], hooks(model), model(batch()).shape
    Distiller(model, BLOCKS)(batch())
    assert ([module.training for module in model.modules()], hooks(model), model(batch()).shape) == before
    assert model.head.convlora.strengths() == {"default": 0.5}


@pytest.mark.parametrize("fails", ["student", "teacher", "loss", "project", "interrupt"])
def test_nothing_is_left_after_an_exception(fails: str) -> None:
    model = student().train()
    options: dict[str, Any] = {}
    if fails == "loss":
        options["loss"] = lambda s, t: s.reshape(-1, 7)
    if fails == "project":
        options["project"] = {"block_1": nn.Conv2d(5, 5, 1)}
    distiller = Distiller(model, BLOCKS, **options)
    calls: list[bool] = []

    def trip(module: nn.Module, inputs: Any) -> None:
        calls.append(module.training)
        if fails == "interrupt":
            raise KeyboardInterrupt
        if (fails == "student") == module.training and fails in ("student", "teacher"):
            raise RuntimeError("tripped")

    handle = model.tail.register_forward_pre_hook(trip)
    expected = (
        KeyboardInterrupt
        if fails == "interrupt"
        else RuntimeError
        if fails in ("student", "teacher")
        else ConvLoRAError
    )
    with pytest.raises(expected):
        distiller(batch())
    handle.remove()
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())
    assert model.head.convlora.strengths() == {"default": 1.0}
    assert torch.is_grad_enabled()


def test_a_network_that_changes_its_input_changes_it_once() -> None:
    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.mul_(2))

    model, x = convlora.inject(Scaling(), "*", rank=1), batch()
    expected = model(x.clone())
    out = Distiller(model, ["conv"])(x)
    assert torch.equal(out.student, expected)
    assert torch.equal(out.teacher, expected)
    assert torch.equal(x, 2 * batch())


def test_no_second_copy_of_the_weights_exists() -> None:
    model = student()
    before = {id(p) for p in model.parameters()}
    distiller = Distiller(model, BLOCKS)
    assert distiller.teacher is None
    assert {id(p) for p in distiller.student.parameters()} == before


# --- how it is used ---------------------------------------------------------------------------------------------------


def test_under_autocast() -> None:
    model, x = student().eval(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = Distiller(model, BLOCKS)(x)
    assert out.student.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in convlora.parameters(model))


def test_gradient_accumulation_is_the_sum() -> None:
    model = student().eval()
    distiller, parameters = Distiller(model, BLOCKS), convlora.parameters(model)
    single = [torch.autograd.grad(distiller(batch(i)).loss, parameters, allow_unused=True) for i in range(2)]
    for i in range(2):
        distiller(batch(i)).loss.backward()
    for parameter, *parts in zip(parameters, *single, strict=True):
        expected = None if parts[0] is None else parts[0] + parts[1]
        assert (parameter.grad is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_two_calls_before_one_backward(compiled: bool) -> None:
    """The second call switches the adapters off and on again while the first waits for its backward."""
    torch._dynamo.reset()
    model = student().eval()
    parameters = convlora.parameters(model)
    distiller = Distiller(torch.compile(model, backend="aot_eager") if compiled else model, BLOCKS)
    single = [torch.autograd.grad(distiller(batch(i)).loss, parameters, allow_unused=True) for i in range(2)]
    both = torch.autograd.grad(distiller(batch(0)).loss + distiller(batch(1)).loss, parameters, allow_unused=True)
    for got, *parts in zip(both, *single, strict=True):
        assert (got is None) == (parts[0] is None)
        if got is not None:
            torch.testing.assert_close(got, parts[0] + parts[1])


def _gradients_of_rank(rank: int, find_unused: bool) -> list[Tensor | None]:
    """One of two processes: the gradients of its half of the batch, averaged by DDP."""
    model = student().eval()
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
    for _ in range(2):  # the reducer has a state: a teacher's pass through it would show in the second step
        out = Distiller(ddp, BLOCKS)(batch()[rank : rank + 1])
        for parameter in convlora.parameters(model):
            parameter.grad = None
        (out.loss + F.l1_loss(out.student, out.teacher)).backward()
    return [parameter.grad for parameter in convlora.parameters(model)]


@pytest.mark.parametrize("find_unused", [False, True])
def test_two_processes_under_ddp_give_the_gradients_of_the_joined_batch(tmp_path: Path, find_unused: bool) -> None:
    gradients, _ = in_processes(tmp_path, _gradients_of_rank, find_unused)
    torch.manual_seed(0)
    model = student().eval()
    out = Distiller(model, BLOCKS)(batch())
    (out.loss + F.l1_loss(out.student, out.teacher)).backward()
    for parameter, gradient in zip(convlora.parameters(model), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


class Checkpointed(Net):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        for block in (self.block_1, self.block_2):
            x, _ = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.tail(x)


def test_gradient_checkpointing() -> None:
    torch.manual_seed(0)
    model = convlora.inject(Checkpointed(), "*", rank=2)
    for parameter in convlora.parameters(model):
        nn.init.normal_(parameter, std=0.1)
    distiller = Distiller(model, ["block_1.second", "block_2[0]"])
    got = torch.autograd.grad(distiller(batch()).loss, convlora.parameters(model), allow_unused=True)
    plain = copy.deepcopy(model)
    plain.forward = lambda x: plain.tail(plain.block_2(plain.block_1(plain.head(x))[0])[0])
    distiller = Distiller(plain, ["block_1.second", "block_2[0]"])
    expected = torch.autograd.grad(distiller(batch()).loss, convlora.parameters(plain), allow_unused=True)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_reentrant_checkpointing_is_refused() -> None:
    """It runs the block without gradients, so the loss on its inside would have none, silently."""
    model = convlora.inject(Checkpointed(), "*", rank=1)
    model.reentrant = True
    warnings.simplefilter(
        "ignore"
    )  # PyTorch's: the input of the first checkpoint has no gradient in the teacher's pass
    with pytest.raises(ConvLoRAError, match=r"'block_1\.second': it runs without gradients.*use_reentrant=False"):
        Distiller(model, ["block_1.second"])(batch())


@pytest.mark.parametrize("warm", [True, False])
def test_a_compiled_student_gives_what_the_eager_one_gives(warm: bool) -> None:
    """Also if it was compiled before, in a graph without hooks; and two distillers do not mix."""
    torch._dynamo.reset()
    model, x = student().eval(), batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    if warm:
        compiled(x)
        with torch.no_grad():
            compiled(x)
    parameters = convlora.parameters(model)
    for layers in (BLOCKS, ["head"], ["block_1.first", "tail"], BLOCKS):
        expected = Distiller(model, layers)(x)
        for _ in range(2):
            out = Distiller(compiled, layers)(x)
            assert list(out.terms) == list(expected.terms)
            torch.testing.assert_close(out.terms, expected.terms)
            torch.testing.assert_close(out.student, expected.student)
            torch.testing.assert_close(out.teacher, expected.teacher)
        got = torch.autograd.grad(out.loss, parameters, allow_unused=True)
        want = torch.autograd.grad(expected.loss, parameters, allow_unused=True)
        assert [g is None for g in got] == [g is None for g in want]
        torch.testing.assert_close([g for g in got if g is not None], [g for g in want if g is not None])
        compiled(x)
    assert hooks(model) == 0


def test_a_compiled_student_does_not_recompile_at_every_call() -> None:
    torch._dynamo.reset()
    model = student().eval()
    distiller = Distiller(torch.compile(model, backend="eager"), BLOCKS)
    for i in range(2):
        distiller(batch(i)).loss.backward()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for i in range(4):
        distiller(batch(i)).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_on_a_real_span_in_train_form() -> None:
    """Spandrel's own class: fuses its weights in eval, returns tuples, overwrites features in place."""
    span = pytest.importorskip("spandrel.architectures.SPAN").SPAN
    torch.manual_seed(0)
    model = span(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2).train()
    convlora.inject(model, "block_*.*", exclude="eval_conv", rank=1)
    for parameter in convlora.parameters(model):
        nn.init.normal_(parameter, std=0.1)
    distiller = Distiller(model, ["block_*[0]", "conv_2"])
    out = distiller(batch())
    assert [*out.terms] == [*(f"block_{i}[0]" for i in range(1, 7)), "conv_2"]
    assert all(term.item() > 0 for term in out.terms.values())
    out.loss.backward()
    assert all(p.grad is not None for p in convlora.parameters(model))


# --- errors -----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no such layer": (
        lambda: Distiller(student(), ["blok_1[0]"]),
        r"distill: layer 'blok_1\[0\]' selects no module of Net; nearest: 'block_1'",
    ),
    "no such layer of the teacher": (
        lambda: Distiller(student(), {"head": "haed"}, teacher=Net()),
        r"layer 'haed' selects no module of Net; nearest: 'head'.* \(the teacher\)",
    ),
    "the teacher lacks a name": (
        lambda: Distiller(student(), ["block_1[0]"], teacher=nn.Sequential(nn.Conv2d(3, 3, 1))),
        r"layer 'block_1' selects no module of Sequential; nearest: '0' \(the teacher\)",
    ),
    "a mapping to several": (
        lambda: Distiller(student(), {"block_*": "head"}),
        r"'block_\*' is 2 layers of the student \(block_1, block_2",
    ),
    "a mapping of no names": (lambda: Distiller(student(), {"head": 3}), "takes names, got 3"),  # type: ignore[dict-item]
    "no adapters": (lambda: Distiller(Net(), ["head"]), "the student has no adapters to switch off"),
    "its own teacher": (
        lambda: Distiller(model := student(), ["head"], teacher=model),
        "the teacher is the student; leave it out",
    ),
    "no module": (lambda: Distiller(3, ["head"]), "expected an nn.Module, got int"),  # type: ignore[arg-type]
    "no such loss": (lambda: Distiller(student(), ["head"], loss="l3"), "no loss 'l3'; there are attention, "),
    "a weight of no layer": (
        lambda: Distiller(student(), ["head"], weights={"haed": 1.0}),
        "weights pattern 'haed' matches none of the student's layers; nearest: 'head'",
    ),
    "a weight that is no number": (lambda: Distiller(student(), ["head"], weights=float("nan")), "of 'head' .=nan"),
    "a projection that is none": (
        lambda: Distiller(student(), ["head"], project={"head": 3}),  # type: ignore[dict-item]
        "project of 'head' must be callable, got int",
    ),
    "a tuple": (
        lambda: Distiller(student(), ["block_1"])(batch()),
        "'block_1': it returns a tuple of 2; say which element",
    ),
    "no such element": (
        lambda: Distiller(student(), ["block_1[2]"])(batch()),
        r"'block_1\[2\]': its output, a tuple of 2, has no element \[2\]",
    ),
    "an element of a tensor": (
        lambda: Distiller(student(), ["head[0]"])(batch()),
        r"its output, a Tensor, has no element \[0\]",
    ),
    "features that do not fit": (
        lambda: Distiller(student(), ["head"], teacher=Net(10), loss="l1")(batch()),
        r"'head' <- 'head': l1: student \(2, 6, 8, 8\), teacher \(2, 10, 8, 8\)",
    ),
    "a loss that fails": (
        lambda: Distiller(student(), ["head"], loss=lambda s, t: s.reshape(-1, 7))(batch()),
        r"'head' <- 'head': the loss fails on \(2, 6, 8, 8\) and \(2, 6, 8, 8\): shape",
    ),
    "a loss that is no scalar": (
        lambda: Distiller(student(), ["head"], loss=lambda s, t: s - t)(batch()),
        r"'head': the loss must be a scalar tensor, got \(2, 6, 8, 8\)",
    ),
    "a loss that is no tensor": (
        lambda: Distiller(student(), ["head"], loss=lambda s, t: 3.0)(batch()),
        "'head': the loss must be a scalar tensor, got float",
    ),
    "a loss that is not finite": (
        lambda: Distiller(student(), BLOCKS, loss=lambda s, t: (s - t).sum() / 0)(batch()),
        r"the loss is (inf|-inf|nan); not finite: 'block_1\[0\]' \((inf|-inf|nan)\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_say_what_and_what_to_do(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ConvLoRAError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_layer_that_does_not_run_is_named() -> None:
    class Idle(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.head(x))

    with pytest.raises(ConvLoRAError, match="'norm' did not run in this forward"):
        Distiller(convlora.inject(Idle(), "*", rank=1), ["norm"])(batch())


def test_a_student_that_lost_its_adapters_is_an_error() -> None:
    model = student()
    distiller = Distiller(model, BLOCKS)
    convlora.remove(model)
    with pytest.raises(ConvLoRAError, match="no adapters"):
        distiller(batch())


def test_a_block_compiled_in_place_is_an_error_and_never_stale() -> None:
    torch._dynamo.reset()
    model, x = student().eval(), batch()
    model.block_1.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            model(x)
        model(x)
    with pytest.raises(ConvLoRAError, match=r"'block_1\.first' did not run.*compiled in parts"):
        for _ in range(3):
            Distiller(model, ["block_1.first"])(x)


def test_non_finite_losses_pass_where_the_check_is_off() -> None:
    out = Distiller(student(), BLOCKS, loss=lambda s, t: (s - t).sum() / 0, check_finite=False)(batch())
    assert not out.loss.isfinite()


def test_it_shows_what_it_compares() -> None:
    assert repr(Distiller(student(), BLOCKS)) == (
        "Distiller(Net by its frozen base, spatial_affinity of block_1[0], block_2[0])"
    )
    assert (
        repr(Distiller(Net(), {"head": "tail"}, teacher=Net(), loss="l1"))
        == "Distiller(Net by Net, l1 of head <- tail)"
    )
