"""`allocate_ranks` spends a budget where the gradient says that it pays, and leaves no trace."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LAYERS, NET_INPUT, adapted_net, build, net, snapshot
from torch import Tensor, nn

import convlora
from convlora.config import AdapterConfig
from convlora.factors.base import WeightSpec, get_factors
from convlora.inspect.allocate import _component_squares
from convlora.inspect.probe import measure_gradients
from convlora.layer.adapted import weight_spec

FACTORS = ("convlora", "locon")


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def inputs(count: int = 3, shape: tuple[int, ...] = NET_INPUT) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def allocate(model: nn.Module, targets: Any = "*", **options: Any) -> dict[str, int]:
    given = dict(budget=1000, batches=inputs(), loss=square)
    return convlora.allocate_ranks(model, targets, **{**given, **options})  # type: ignore[arg-type]


def rank_of(ranks: dict[str, int], name: str) -> int:
    return ranks[name] if name in ranks else ranks[f"re:{re.escape(name)}"]


def injected_ranks(model: nn.Module, **options: Any) -> dict[str, int]:
    model = convlora.inject(model, "*", **options)
    return {entry.name: entry.rank for entry in convlora.summary(model).layers}


# --- the budget ------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(budget=st.integers(60, 3000), factors=st.sampled_from(FACTORS), max_rank=st.none() | st.integers(1, 3))
@pytest.mark.filterwarnings("ignore:.*more parameters than the layer")  # a depthwise layer's rank 1
def test_budget_is_never_exceeded_and_inject_gives_these_ranks(budget: int, factors: str, max_rank: int | None) -> None:
    ranks = allocate(net(), budget=budget, factors=factors, max_rank=max_rank)
    model = convlora.inject(net(), "*", ranks=ranks, factors=factors)
    assert convlora.summary(model).trainable <= budget
    assert {entry.name: entry.rank for entry in convlora.summary(model).layers} == {n: r for n, r in ranks.items() if r}
    assert max(ranks.values()) <= (max_rank or budget)


def test_the_ranks_serve_narrower_targets() -> None:
    ranks = allocate(net(), budget=80, factors="locon")
    paid = [name for name, rank in ranks.items() if rank]
    assert len(paid) < len(ranks)
    model = convlora.inject(net(), paid, ranks=ranks, factors="locon")
    assert {entry.name: entry.rank for entry in convlora.summary(model).layers} == {n: ranks[n] for n in paid}


@pytest.mark.parametrize("factors", FACTORS)
def test_a_larger_budget_is_not_spent_less(factors: str) -> None:
    model, spent = net(), []
    for budget in (60, 120, 240, 480, 960, 10**6):
        ranks = allocate(model, budget=budget, factors=factors)
        injected = convlora.inject(copy.deepcopy(model), "*", ranks=ranks, factors=factors)
        spent.append(convlora.summary(injected).trainable)
    assert spent == sorted(spent)


class Tree(nn.Module):
    """Pointwise layers at any dotted names, side by side."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            module: nn.Module = self
            *parents, last = name.split(".")
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module._modules[parent]  # type: ignore[assignment]
            module.add_module(last, nn.Conv2d(3, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.modules() if isinstance(layer, nn.Conv2d)], 1)


PART = st.sampled_from(["a", "b", "c", "a*", "?", "[ab]", "re:a", "b!", "a+"])
LEAF = st.sampled_from(["x", "y", "*", "[xy]", "re:x"])  # no leaf has the name of a branch
NAMES = st.lists(st.tuples(st.lists(PART, max_size=3), LEAF).map(lambda t: ".".join([*t[0], t[1]])), min_size=1,
                 max_size=8, unique=True)  # fmt: skip


@settings(max_examples=60)
@given(names=NAMES, budget=st.integers(7, 150))
def test_inject_gives_exactly_these_ranks_whatever_the_names(names: list[str], budget: int) -> None:
    model = Tree(names)
    batches = inputs(2, (1, 3, 4, 4))
    ranks = allocate(model, nn.Conv2d, budget=budget, batches=batches, factors="locon")
    assert len(ranks) == len(names)
    given_ranks = injected_ranks(model, ranks=ranks, factors="locon")
    assert given_ranks == {name: rank_of(ranks, name) for name in names if rank_of(ranks, name)}


def test_a_name_that_ends_another_comes_first() -> None:
    ranks = allocate(Tree(["a.b.x", "b.x", "x"]), budget=60, batches=inputs(1, (1, 3, 4, 4)))
    assert list(ranks) == ["x", "b.x", "a.b.x"]


# --- the measure -----------------------------------------------------------------------------------------------------


def probed(model: nn.Module, batches: list[Any], loss: Callable[..., Tensor] = square) -> dict[str, Any]:
    config = AdapterConfig(targets="*", name="probed")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    layers |= {name: m for name, m in model.named_modules() if name == "" and not list(m.children())}
    return measure_gradients(model, layers, config, batches, loss)


@pytest.mark.parametrize("hazard", LAYERS)
def test_probe_sees_the_gradient_of_the_weight(hazard: str) -> None:
    layer, x = build(hazard)
    total, power = probed(layer, [x, 2 * x])[""]
    expected = [torch.autograd.grad(square(layer, s * x), layer.weight)[0] for s in (1, 2)]
    torch.testing.assert_close(total, sum(expected))
    assert math.isclose(power, sum(float(g.square().sum()) for g in expected), rel_tol=1e-5)


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("hazard", LAYERS)
def test_gradient_in_the_form_of_r_components_has_r_components(hazard: str, factors: str) -> None:
    spec = weight_spec(build(hazard)[0])
    factorization = get_factors(factors)
    for rank in (1, 2):
        tensors = {name: torch.randn(shape) for name, shape in factorization.shapes(spec, rank).items()}
        gradient = spec.from_convolution(factorization.delta(tensors, spec))
        squares = _component_squares(factorization, spec, gradient)
        assert sum(s > 1e-9 * sum(squares) for s in squares) == min(rank, len(squares))
        assert squares == sorted(squares, reverse=True)
        assert math.isclose(sum(squares), float(gradient.double().square().sum()), rel_tol=1e-6)


def test_factorization_that_cannot_fit_is_measured_by_output_channel() -> None:
    class Plain:
        """What `register_factors` asks for, and no more."""

        inits = ("default",)

        def shapes(self, spec: WeightSpec, rank: int) -> dict[str, tuple[int, ...]]:
            return {"up": (spec.out_channels, rank), "down": (rank, math.prod(spec.shape) // spec.out_channels)}

        def init_(self, factors: Any, method: str) -> None:
            nn.init.normal_(factors["down"])
            nn.init.zeros_(factors["up"])

        def delta(self, factors: Any, spec: WeightSpec) -> Tensor:
            return factors["up"] @ factors["down"]

        def drop(self, factors: Any, keep: Tensor) -> dict[str, Tensor]:
            return {**factors, "up": factors["up"] * keep}

    convlora.register_factors("test-allocate-plain", Plain)
    model = net()
    assert allocate(model, factors="test-allocate-plain") == allocate(model, factors="locon")


class Pair(nn.Module):
    """Two layers of one shape side by side, each fed and weighted by a number."""

    def __init__(self, feed: float = 1.0, weight: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.one, self.two = nn.Conv2d(6, 8, 3, bias=False), nn.Conv2d(6, 8, 3, bias=False)
        self.feed = feed
        with torch.no_grad():
            self.two.weight.mul_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(self.feed * x.flip(1).square())


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_neither_the_unit_of_a_layer_nor_that_of_the_loss_counts(factors: str, unit: float) -> None:
    batches = inputs(3, (2, 6, 9, 9))
    expected = allocate(Pair(), batches=batches, factors=factors, budget=700)
    assert allocate(Pair(unit, 1 / unit), batches=batches, factors=factors, budget=700) == expected

    def scaled(model: nn.Module, x: Tensor) -> Tensor:
        return unit * square(model, x)

    assert allocate(Pair(), batches=batches, loss=scaled, factors=factors, budget=700) == expected


def inner(direction: Callable[[int], dict[str, Tensor]]) -> Callable[[nn.Module, int], Tensor]:
    """A loss whose gradient in each layer's weight is given, for each batch."""

    def loss(model: nn.Module, batch: int) -> Tensor:
        terms = [(model.get_submodule(name).weight * g).sum() for name, g in direction(batch).items()]
        return torch.stack(terms).sum()

    return loss


def test_batches_that_disagree_lower_the_worth_of_a_layer() -> None:
    gradient = torch.randn(8, 6, 3, 3)
    loss = inner(lambda batch: {"one": gradient, "two": gradient * (1 if batch % 2 else -0.8)})
    for factors in FACTORS:
        ranks = allocate(Pair(), batches=range(4), loss=loss, budget=500, factors=factors)
        assert ranks["one"] > ranks["two"]


@pytest.mark.parametrize("factors", FACTORS)
def test_no_layer_gets_more_rank_than_its_gradient_has(factors: str) -> None:
    def low_rank(rank: int) -> Tensor:
        spec, factorization = WeightSpec((8, 6, 3, 3)), get_factors(factors)
        return factorization.delta({n: torch.randn(s) for n, s in factorization.shapes(spec, rank).items()}, spec)

    one, two = low_rank(1).view(8, 6, 3, 3), low_rank(2).view(8, 6, 3, 3)
    loss = inner(lambda batch: {"one": one, "two": two})
    ranks = allocate(Pair(), batches=range(2), loss=loss, budget=10**6, factors=factors)
    assert ranks == {"one": 1, "two": 2}


def test_layers_without_gradient_are_left_out() -> None:
    model = nn.ModuleDict({"read": nn.Linear(4, 4), "unread": nn.Linear(4, 4), "frozen": nn.Linear(4, 4)})

    def loss(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = model["frozen"](x)
        return model["read"](x).square().mean()

    ranks = allocate(model, batches=inputs(2, (3, 4)), loss=loss)
    assert ranks["read"] > 0
    assert ranks["unread"] == ranks["frozen"] == 0


class Kinds(nn.Module):
    """One computation as layers of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv1d = nn.Linear(6, 8), nn.Conv1d(6, 8, 1)
        self.conv2d, self.conv3d = nn.Conv2d(6, 8, 1), nn.Conv3d(6, 8, 1)
        self.transposed = nn.ConvTranspose2d(6, 8, 1)
        with torch.no_grad():
            for layer in (self.conv1d, self.conv2d, self.conv3d):
                layer.weight.copy_(self.linear.weight.view_as(layer.weight))
                layer.bias.copy_(self.linear.bias)  # type: ignore[union-attr]
            self.transposed.weight.copy_(self.linear.weight.T.reshape_as(self.transposed.weight))
            self.transposed.bias.copy_(self.linear.bias)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:  # (n, 6)
        results = [self.linear(x), self.conv1d(x[..., None]), self.conv2d(x[..., None, None])]
        results += [self.conv3d(x[..., None, None, None]), self.transposed(x[..., None, None])]
        return torch.stack([result.flatten(1).square() for result in results]).sum(0)


@pytest.mark.parametrize("factors", FACTORS)
def test_one_computation_is_worth_the_same_as_any_kind_of_layer(factors: str) -> None:
    for rank in (1, 2, 3):
        ranks = allocate(Kinds(), batches=inputs(2, (9, 6)), budget=5 * 14 * rank, factors=factors)
        assert set(ranks.values()) == {rank}


def test_tied_parameters_are_measured_where_each_layer_is_and_a_layer_used_twice_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight
            self.again = self.one

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x))) + self.again(x)

    model, (x,) = Tied(), inputs(1, (3, 4))
    found = probed(model, [x])
    assert list(found) == ["one", "two"]
    both = torch.autograd.grad(square(model, x), model.one.weight)[0]
    torch.testing.assert_close(found["one"][0] + found["two"][0], both)
    assert list(allocate(model, batches=[x])) == ["one", "two"]


# --- no trace --------------------------------------------------------------------------------------------------------


class Moody(nn.Module):
    """Everything that a forward may move: statistics, power iteration, random numbers, attributes, weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 4, 1))
        self.legacy = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.eval_conv = nn.Conv2d(3, 3, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.eval_conv.weight.data = torch.rand(3, 3, 1, 1)
        return self.legacy(self.normed(self.body(self.eval_conv(x))))


def broken(model: nn.Module, x: Tensor) -> Tensor:
    model.train(not model.training)
    value = square(model, x)
    if x is LAST:
        raise KeyError("of the loss")
    return value


FIRST, LAST = inputs(2)


@pytest.mark.parametrize("loss", [square, broken])
@pytest.mark.parametrize("mode", ["train", "eval", "mixed", "frozen", "no_grad", "adapted"])
def test_model_and_random_numbers_come_back_as_they_were(loss: Any, mode: str) -> None:
    model = Moody().train(mode != "eval")
    square(model, FIRST).backward()
    if mode == "mixed":
        model.body.eval()
    if mode == "frozen":
        model.requires_grad_(False)
    if mode == "adapted":
        convlora.inject(model, "body.*", rank=1)
    gradients = {name: (p.grad, copy.deepcopy(p.grad)) for name, p in model.named_parameters()}
    before, calls, state = snapshot(model), model.calls, torch.get_rng_state()
    with torch.set_grad_enabled(mode != "no_grad"):
        if loss is broken:
            with pytest.raises(KeyError):
                allocate(model, batches=[FIRST, LAST], loss=loss, exclude="eval_conv")
        else:
            assert any(allocate(model, batches=[FIRST, LAST], loss=loss, exclude="eval_conv").values())
        assert torch.is_grad_enabled() == (mode != "no_grad")
    assert snapshot(model) == before
    assert model.calls == calls
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in model.named_parameters():
        assert p.grad is gradients[name][0]
        assert p.grad is None or torch.equal(p.grad, gradients[name][1])


def test_ranks_are_the_same_for_the_same_seed() -> None:
    model = Moody()
    assert allocate(model, exclude="eval_conv") == allocate(model, exclude="eval_conv")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_give_ranks(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    ranks = allocate(model, batches=[x.to(dtype) for x in inputs()])
    assert sum(ranks.values()) > 1
    assert all(p.dtype == dtype for p in model.parameters())


def test_one_loss_a_batch() -> None:
    calls = []

    def counting(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(x)
        return square(model, x)

    allocate(net(), loss=counting, batches=(x for x in inputs(3)))
    assert len(calls) == 3


def test_adapters_that_act_are_part_of_the_model_measured() -> None:
    model = adapted_net(rank=1)
    merged = copy.deepcopy(model)
    convlora.remove(convlora.merge(merged))
    assert allocate(model) == allocate(merged)
    assert list(convlora.adapters(model)) == ["default"]


def test_the_loss_may_be_that_of_a_distiller() -> None:
    distiller = convlora.distill.Distiller(convlora.inject(net(), "0", rank=1), ["0"], loss="l1")
    model = distiller.student

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = distiller(x)
        return out.loss + out.student.square().mean()

    before = snapshot(model)
    assert sum(allocate(model, loss=loss).values())
    assert snapshot(model) == before


# --- what a user can get wrong ---------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "budget of no layer": (dict(budget=3), r"budget \(=3\) pays for no layer; rank 1 of '.*', the cheapest of"),
    "budget zero": (dict(budget=0), r"budget \(=0\) must be an integer of at least 1"),
    "budget float": (dict(budget=1e4), r"budget \(=10000\.0\) must be an integer"),
    "budget bool": (dict(budget=True), r"budget \(=True\) must be"),
    "max_rank": (dict(max_rank=0), r"max_rank \(=0\) must be an integer of at least 1"),
    "no batches": (dict(batches=[]), r"batches is empty; give at least one"),
    "used iterator": (dict(batches=iter(())), r"an iterator can be used only once"),
    "batches no iterable": (dict(batches=3), r"batches \(=3\) must be an iterable"),
    "loss not callable": (dict(loss=3), r"loss \(=3\) must be callable"),
    "loss NaN": (dict(loss=lambda m, x: square(m, x) * math.nan), r"the loss of batch 1 is nan; it must be finite"),
    "loss vector": (dict(loss=lambda m, x: m(x)), r"must return a scalar tensor .*, got torch.float32 of shape \(2, "),
    "loss number": (dict(loss=lambda m, x: square(m, x).item()), r"must return a scalar tensor .*, got float"),
    "loss integer": (dict(loss=lambda m, x: m(x).argmax()), r"scalar tensor of floating point, got torch.int64"),
    "loss detached": (dict(loss=lambda m, x: square(m, x).detach()), r"the loss has no gradient; it must come from"),
    "loss elsewhere": (
        dict(loss=lambda m, x: torch.ones((), requires_grad=True) * 2),
        r"the loss has no gradient in any of the \d+ selected layers",
    ),
    "gradient infinite": (
        dict(loss=lambda m, x: (square(m, x) - square(m, x).detach()).abs().sqrt()),
        r"the gradient of '.*' is not finite; scale the loss down",
    ),
    "target": (dict(targets="typo"), r"target 'typo' selects no layer"),
    "factors": (dict(factors="typo"), r"factors: 'typo' is not registered"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_change_nothing(case: str) -> None:
    options, message = ERRORS[case]
    model = net()
    before = snapshot(model)
    with pytest.raises(convlora.ConvLoRAError, match=message) as caught:
        allocate(model, **options)
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before


def test_merged_model_is_refused() -> None:
    with pytest.raises(convlora.ConvLoRAError, match="allocate_ranks: the model is merged; unmerge it first"):
        allocate(convlora.merge(adapted_net()))


def test_budget_below_the_layers_that_have_a_gradient_is_an_error() -> None:
    model = nn.ModuleDict({"large": nn.Linear(50, 50), "small": nn.Linear(2, 2)})
    with pytest.raises(convlora.ConvLoRAError, match="pays for none of the layers that have a gradient"):
        allocate(model, budget=50, batches=[torch.ones(1, 50)], loss=lambda m, x: m["large"](x).sum())


def test_exclude_that_matches_nothing_is_a_warning() -> None:
    with pytest.warns(convlora.ConvLoRAWarning, match="allocate_ranks: exclude 'typo' matches no layer"):
        allocate(net(), exclude="typo")
