"""Adapters live their whole life on networks of torchvision, timm, diffusers and torch.nn, the quick ones here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.trust import catalogue, models
from benchmarks.trust.catalogue import NetworkCase, inputs_of

QUICK = {
    "torch": [
        "nn.LSTM between layers", "nn.MultiheadAttention", "nn.MultiheadAttention, kdim", "nn.Transformer",
        "nn.TransformerEncoder", "nn.TransformerEncoder, nested tensors",
    ],
    "torchvision": [
        "MaxVit", "VisionTransformer", "mobilenet_v3_small", "regnet_x_400mf", "resnet18", "squeezenet1_1",
    ],
    "timm": ["byobnet", "convnext", "maxxvit", "nfnet", "vision_transformer"],
    "diffusers": ["UNet2DConditionModel", "AutoencoderTiny"],
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")  # other people's


@pytest.mark.parametrize("name", [f"{library}: {name}" for library, names in QUICK.items() for name in names])
def test_an_adapter_lives_its_whole_life(name: str) -> None:
    library, _, network = name.partition(": ")
    pytest.importorskip(library)
    case = next(case for case in catalogue.network_cases((library,)) if case.name == network)
    life = models.life_on(case, "locon" if len(network) % 2 else "convlora")
    assert life.outcome == dict.fromkeys(models.STAGES, "ok")
    assert life.layers > 0
    cut = 9 if network == "AutoencoderTiny" else 0  # its encoder ends in bytes
    assert list(life.audited.values()) == ["no gradient reaches it: the adapter cannot be trained"] * cut


@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is not installed")
def test_every_module_of_timm_has_a_case_or_a_reason() -> None:
    cases = {case.name for case in catalogue.network_cases(("timm",))}
    left_out = {name.removeprefix("timm/") for name in catalogue.LEFT_OUT}
    assert not cases & left_out
    assert catalogue.timm_modules() - cases - left_out == set()


# --- failures are seen --------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.layer(x))  # type: ignore[no-any-return]


class Forgetful(Net):
    """Counts its calls, and is different after the third."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Forgetful.calls += 1
        return super().forward(x) * (1 if Forgetful.calls < 4 else 2)


class Writing(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.layer._parameters["weight"].data.add_(1)
        return super().forward(x)


class Failing(Net):
    def forward(self, x: Tensor) -> Tensor:
        if "convlora" in "".join(dict(self.named_modules())):
            raise RuntimeError("not with me")
        return super().forward(x)


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))  # type: ignore[no-any-return]


class Counting(Normed):
    """Counts its calls in train mode, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count(self.calls)
        return super().forward(x)

    def count(self, calls: Tensor) -> None:
        if self.training:
            calls.add_(1)


class CountingInSilence(Counting):
    def count(self, calls: Tensor) -> None:
        super().count(calls.data)


class CountingInAParameter(Normed):
    """Through `.data`, which leaves no trace."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls.data.add_(1)
        return super().forward(x)


class Bare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _case(make: Callable[[], nn.Module]) -> NetworkCase:
    return NetworkCase("test", make.__name__, make, lambda: inputs_of(torch.randn(2, 4)))


def test_a_network_that_changes_by_itself_fails() -> None:
    assert models.life_on(_case(Forgetful)).failures


def test_a_network_that_overwrites_a_base_weight_has_it_named_and_excluded() -> None:
    life = models.life_on(_case(Writing))
    assert life.audited["layer"] == "overwritten"
    assert life.layers == 1


def test_statistics_move_in_the_adapter_and_what_else_is_written_is_named() -> None:
    normed, counting = models.life_on(_case(Normed)), models.life_on(_case(Counting))
    assert not normed.failures
    assert not counting.failures
    assert normed.statistics == counting.statistics == 1
    assert (normed.changed, counting.changed) == ([], ["calls"])


def test_a_buffer_that_is_written_uncounted_is_named() -> None:
    life = models.life_on(_case(CountingInSilence))
    assert (life.failures, life.changed) == ({}, ["calls"])


def test_a_write_that_changed_misses_is_told() -> None:
    assert "moved: ['calls']" in models.life_on(_case(CountingInAParameter)).failures["train"]


def test_an_exception_is_told() -> None:
    assert models.life_on(_case(Failing)).failures == {"identity": "RuntimeError: not with me"}


def test_measure_tells_failures_and_refusals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "network_cases", lambda: [_case(Net), _case(Bare)])
    section = models.measure(10)
    assert [row[1:-1] for row in section.rows] == [("2", *["ok"] * 6), ("0", *["–"] * 6)]
    assert section.rows[1][-1] == "inject: target <lambda> selects no layer; 0 can be adapted"
    assert "2 networks (2 of test)" in section.note
    assert len(models.measure(1).rows) == 1
    monkeypatch.setattr(models, "network_cases", lambda: [_case(Net), _case(Failing)])
    failing = models.measure(10)
    assert [row["failed"] for row in failing.data] == [0, 1]
    assert "not with me" in failing.rows[1][2]
    assert "Failed: 1;" in failing.note
    assert "test: Net: ok; all act" in capsys.readouterr().out
