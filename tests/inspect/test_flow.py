"""Marks go wherever values go: through views, writes, kernels and out of torch."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convlora.inspect.flow import CONSTANT, DataFlow, leaves_with_gradient, nested_leaves

W, X = torch.rand(4, 4), torch.rand(4, 4)


def written(w: Tensor, x: Tensor) -> Tensor:
    y = torch.zeros(2, 4, 4)
    y[1].copy_(w)
    return y[0]  # of the same memory: in doubt, yes


def several(w: Tensor, x: Tensor) -> Tensor:
    mean = torch.zeros(4, 4)
    torch._foreach_copy_([mean], [w])  # writes, and returns nothing
    return mean


DEPENDING: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "linear": F.linear,
    "a view": lambda w, x: w.view(16)[3:],
    "a cast": lambda w, x: w.to(torch.bfloat16),
    "detached": lambda w, x: w.detach() + w.data,
    "a write": written,
    "an out argument": lambda w, x: torch.add(w, 1, out=torch.empty(4, 4)),
    "a write of several": several,
    "an index": lambda w, x: x[w.argmax(1)],
    "a branch": lambda w, x: x if w.sum() > 0 else -x,
    "a number": lambda w, x: x * w[0, 0].item(),
    "numpy": lambda w, x: torch.from_numpy(w.repeat(9, 9).numpy()),
    "sparse": lambda w, x: w.to_sparse(),
    "of sparse": lambda w, x: w.to_sparse().to_dense(),
    "attention": lambda w, x: F.scaled_dot_product_attention(w[None], x[None], x[None]),
    "vmap": lambda w, x: torch.func.vmap(lambda row: row @ x)(w),
    "an object": lambda w, x: torch.distributions.Normal(w, 1.0),
    "a generator": lambda w, x: (w for _ in range(1)),
    "nested": lambda w, x: OrderedDict(a=[(x, {"b": w * 2})]),
}


@pytest.mark.parametrize("case", DEPENDING)
def test_marks_follow_values(case: str) -> None:
    with DataFlow([W, X]) as flow:
        flow.mark(W, 1)
        output = DEPENDING[case](W, X)
    assert flow.marks_of(output) == {1}


INDEPENDENT: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "its dtype and shape": lambda w, x: x.to(w.dtype).view(w.shape),
    "another": lambda w, x: (w * 2, x * 2)[1],
    "a constant": lambda w, x: (w + 1, x * torch.tensor([0.5] * 4))[1],
    "memory used again": lambda w, x: [(w * i).sum() for i in range(50)] and [x * i for i in range(50)],
    "no tensor": lambda w, x: {"loss": 0.5, "name": "a", "kind": torch.float32, "nothing": None},
}


@pytest.mark.parametrize("case", INDEPENDENT)
def test_nothing_else_is_marked(case: str) -> None:
    with DataFlow([W, X]) as flow:
        flow.mark(W, 1)
        output = INDEPENDENT[case](W, X)
    assert flow.marks_of(output) == set()


def test_what_no_operation_made_depends_on_everything_before() -> None:
    outside = torch.rand(CONSTANT + 1)
    with DataFlow([W, X]) as flow:
        flow.mark(W, 1)
        assert flow.marks_of(outside * 2) == {1}
        flow.mark(X, 2)
        assert flow.marks_of(outside) == {1}
        assert flow.marks_of(torch.rand(3).to_sparse()) == {1, 2}


def test_writes_are_seen_behind_the_data_attribute() -> None:
    weight, other = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
    with DataFlow() as flow:
        weight.data[1:].mul_(2)
        other.data.mul(2)
    assert flow.wrote_to(weight)
    assert not flow.wrote_to(other)
    assert not flow.wrote_to(other.detach().to_sparse())


def test_leaves_are_found_once_in_objects_that_hold_each_other() -> None:
    @dataclasses.dataclass
    class Output:
        value: Tensor
        parent: Any = None

    first = Output(W)
    first.parent = Output(X, parent=[first])
    assert [id(leaf) for leaf in nested_leaves(first)] == [id(W), id(X)]


def test_gradients_are_told_by_the_graph() -> None:
    used, cut, frozen = (nn.Parameter(torch.rand(4, 4)) for _ in range(3))
    frozen.requires_grad_(False)
    output = {"y": F.linear(X, used) + cut.data + cut.detach(), "n": cut.argmax()}
    assert leaves_with_gradient(output) == {id(used)}
    assert leaves_with_gradient(X) == set()
    again = checkpoint(F.linear, X.clone().requires_grad_(), used, use_reentrant=False)
    assert id(used) in (leaves_with_gradient(again) or ())
    assert leaves_with_gradient(checkpoint(F.linear, X.clone().requires_grad_(), used, use_reentrant=True)) is None
