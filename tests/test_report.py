"""`summary` counts, `audit` tries out."""

from __future__ import annotations

import pytest
import torch
from oracle import NET_INPUT, adapted_net, bits, net, snapshot
from torch import Tensor, nn

import convlora


def test_summary_counts_what_trains() -> None:
    model = convlora.inject(adapted_net(bias=True), ["0"], rank=2, name="b", factors="locon")
    report = convlora.summary(model)
    assert report.trainable == sum(p.numel() for p in convlora.parameters(model))
    assert report.base == sum(p.numel() for p in net().parameters())
    assert report.total == sum(p.numel() for p in model.parameters())
    assert [(e.name, e.type, e.shape, e.adapter, e.factors, e.rank) for e in report.layers[:3]] == [
        ("0", "Conv2d", (8, 3, 3, 3), "default", "convlora", 1),
        ("0", "Conv2d", (8, 3, 3, 3), "b", "locon", 2),
        ("3", "Conv2d", (8, 4, 3, 3), "default", "convlora", 1),
    ]
    assert sum(e.parameters for e in report.layers) == report.trainable
    first = report.layers[0]
    assert first.share == first.parameters / (8 * 3 * 9 + 8)


def test_summary_prints_a_table() -> None:
    lines = str(convlora.summary(adapted_net())).splitlines()
    assert lines[0].split() == ["layer", "type", "shape", "adapter", "factors", "rank", "parameters", "share"]
    assert lines[2].split() == ["0", "Conv2d", "8×3×3×3", "default", "convlora", "1", "99", "44.2%"]
    assert lines[-1] == "332 of 1,391 parameters train (31.35% of the base)"
    assert convlora.summary(net()).layers == []


class Reparameterised(nn.Module):
    """Trains by `conv`, and writes it into `eval_conv` at every eval forward, as SPAN does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.eval_conv = nn.Conv2d(3, 4, 3)
        self.never = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x + 0 * torch.rand(())
        if self.training:
            return self.norm(self.conv(x))
        self.eval_conv.weight.data = self.conv.weight.data.clone()
        return self.norm(self.eval_conv(x))


def test_audit_names_what_goes_wrong() -> None:
    model = convlora.inject(Reparameterised(), nn.Conv2d, rank=1)
    report = convlora.audit(model, torch.randn(NET_INPUT))
    assert report.problems == {
        "eval_conv": "base weight overwritten by the model: exclude it",
        "never": "never read: the adapter has no effect",
    }
    assert not report.ok
    assert "2 of 3 adapted layers have a problem" in str(report)


def test_audit_sees_layers_read_in_one_mode_only() -> None:
    class TrainOnly(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x) if self.training else x

    report = convlora.audit(convlora.inject(TrainOnly(nn.Conv2d(3, 8, 3)), "0", rank=1), torch.randn(NET_INPUT))
    assert report.problems == {"0": "read only in train mode: the modes disagree"}


def test_audit_leaves_the_model_as_it_was() -> None:
    model = convlora.inject(Reparameterised(), nn.Conv2d, rank=1)
    convlora.activate(model, {"default": 0.5})
    model.eval()
    model.norm.train()
    before, state, calls = snapshot(model), torch.get_rng_state(), model.calls
    pointers = [p.data_ptr() for p in model.parameters()]
    convlora.audit(model, torch.randn(NET_INPUT, generator=torch.Generator()))
    assert snapshot(model) == before
    assert model.calls == calls
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert torch.equal(torch.get_rng_state(), state)
    assert model.conv.weight.requires_grad


def test_audit_leaves_the_model_as_it_was_after_an_error() -> None:
    model = convlora.merge(adapted_net())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="expected input"):
        convlora.audit(model, torch.randn(1, 7, 4, 4))
    assert snapshot(model) == before
    with pytest.raises(convlora.ConvLoRAError, match="no adapters"):
        convlora.audit(net(), torch.randn(NET_INPUT))


def test_audit_of_a_sound_model() -> None:
    model = adapted_net()
    state = bits(model)
    report = convlora.audit(model, torch.randn(NET_INPUT))
    assert report.ok
    assert str(report) == "all 4 adapted layers are read in train and eval mode, none is overwritten"
    assert bits(model) == state
