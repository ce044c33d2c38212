"""`summary` counts, `audit` tries out."""

from __future__ import annotations

from typing import Any

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
    assert (
        lines[-1] == "332 of 1,391 parameters train (31.35% of the base); 'default' has running statistics of 1 module"
    )
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


class Bypassing(nn.Module):
    """Eight layers, of which the output depends on `used` alone, or not in the usual way."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("used", "dtype", "dropped", "cut", "fused", "cached", "evaluated", "direct"):
            setattr(self, name, nn.Linear(4, 4))
        self.cache: Tensor | None = None
        self.packed = self.fused.weight.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = self.cached.weight * 2
        x = self.used(x.to(self.dtype.weight.dtype))
        self.dropped(x)
        x = x + nn.functional.linear(x, self.cut.weight.detach())
        x = x + nn.functional.linear(x, self.packed) + nn.functional.linear(x, self.direct._parameters["weight"])
        if self.training:
            return nn.functional.linear(x, self.cache) + self.evaluated.weight.shape[0]
        return nn.functional.linear(x, self.cache) + self.evaluated(x)


def test_audit_finds_what_a_forward_bypasses() -> None:
    model = convlora.inject(Bypassing(), nn.Linear, rank=1)
    report = convlora.audit(model, torch.randn(2, 4))
    assert report.problems == {
        "dtype": "read, but no output depends on it: the adapter has no effect",
        "dropped": "read, but no output depends on it: the adapter has no effect",
        "cut": "no gradient reaches it: the adapter cannot be trained",
        "fused": "never read: the adapter has no effect",
        "cached": "never read: the adapter has no effect",
        "evaluated": "acts only in eval mode: the modes disagree",
        "direct": "never read: the adapter has no effect",
    }
    assert model.cache is None


def test_audit_sees_writes_that_torch_does_not_count() -> None:
    class Writing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self[0]._parameters["weight"].data.mul_(0.9)
            return super().forward(x)

    model = convlora.inject(Writing(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)), "*", rank=1)
    before = snapshot(model)
    report = convlora.audit(model, torch.randn(NET_INPUT))
    assert report.problems == {"0": "base weight overwritten by the model: exclude it"}
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_audit_sees_through_the_fused_kernels_of_torch() -> None:
    """In eval mode without gradients these call one kernel on the weights of their layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = convlora.inject(nn.TransformerEncoder(layer, 2), ["*.out_proj", "*.linear?"], rank=1)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    x = torch.randn(2, 5, 8)
    assert convlora.audit(model, x, src_key_padding_mask=mask).ok
    for parameter in convlora.parameters(model):
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad(), torch.profiler.profile() as profile:
        evaluated = model.eval()(x, src_key_padding_mask=mask)
    kernels = {event.name for event in profile.events()}
    assert "aten::_transformer_encoder_layer_fwd" in kernels
    trained = model.train()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(evaluated[~mask], trained[~mask], rtol=1e-4, atol=1e-5)


def test_audit_takes_arguments_by_name() -> None:
    class Named(nn.Conv2d):
        def forward(self, *, image: Tensor, scale: float) -> Tensor:
            return super().forward(image) * scale

    model = convlora.inject(Named(3, 4, 3), "*", rank=1)
    assert convlora.audit(model, image=torch.randn(NET_INPUT), scale=2.0).ok


def test_audit_of_a_merged_model_is_that_of_the_model() -> None:
    model = convlora.inject(Bypassing(), nn.Linear, rank=1)
    report = convlora.audit(model, torch.randn(2, 4))
    before = snapshot(convlora.merge(model))
    assert convlora.audit(model, torch.randn(2, 4)) == report
    assert snapshot(model) == before
    assert not model.used.weight.requires_grad


def test_audit_in_inference_mode_leaves_gradients_open() -> None:
    with torch.inference_mode():
        model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), "0", rank=1)
        report = convlora.audit(model, torch.randn(NET_INPUT))
    assert report.ok
    assert report.layers[0].trains is None
    assert convlora.audit(adapted_net(), torch.randn(NET_INPUT)).layers[0].trains


def test_audit_runs_the_model_inside_its_wrappers() -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise AssertionError("compiled")

    model = adapted_net()
    for wrapper in (torch.compile(model, backend=backend), torch.optim.swa_utils.AveragedModel(model)):
        wrapper.eval()
        assert convlora.audit(wrapper, torch.randn(NET_INPUT)).ok
        assert not wrapper.training
    model[3].compile(backend=backend)
    assert convlora.audit(model, torch.randn(NET_INPUT)).ok


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


class Autoencoder(nn.Module):
    """Works by two methods, and has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.decoder = nn.Linear(3, 4)
        self.spare = nn.Linear(4, 4)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


GLOBAL = torch.ones(2, 3)
NEVER = "never read: the adapter has no effect"


def test_audit_runs_calls_in_the_place_of_a_forward() -> None:
    model = convlora.inject(Autoencoder(), "*", rank=1)
    x, z = torch.randn(2, 4), torch.randn(2, 3)
    assert convlora.audit(model, call=lambda m: m.decode(z)).problems == {"encoder": NEVER, "spare": NEVER}
    assert convlora.audit(model, call=lambda _: model.decode(GLOBAL)).problems == {"encoder": NEVER, "spare": NEVER}
    both = [lambda m: m.encode(x), lambda m: m.decode(z)]
    assert convlora.audit(model, call=both).problems == {"spare": NEVER}
    layers = {layer.name: layer for layer in convlora.audit(model, call=both).layers}
    assert layers["decoder"].trains is layers["encoder"].trains is True
    assert layers["spare"].trains is False
    wrapped = torch.optim.swa_utils.AveragedModel(model)
    assert convlora.audit(wrapped, call=both).problems == {"spare": NEVER}


def test_a_tensor_of_a_call_carries_no_mark() -> None:
    """What a closure brings was not computed by the layers that were read before it."""
    model = convlora.inject(Autoencoder(), "*", rank=1)
    x, aside = torch.randn(2, 4), torch.randn(2, 4)

    def call(m: Autoencoder) -> Tensor:
        m.encode(x)
        return aside + m.spare(x)

    problems = convlora.audit(model, call=call).problems
    assert problems == {"encoder": "read, but no output depends on it: the adapter has no effect", "decoder": NEVER}


class Experts(nn.Module):
    """Chooses its layer by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        return self.experts[int(x.sum().sign()) + 1](x) + shift


def test_audit_merges_what_several_inputs_find() -> None:
    model = convlora.inject(Experts(), "*", rank=1)
    ones = torch.ones(2, 4)
    one = convlora.audit(model, ones)
    assert one.problems == {"experts.0": NEVER, "experts.1": NEVER}
    assert "as found with the inputs given" in str(one)
    assert convlora.audit(model, ones, batches=[-ones]).problems == {"experts.1": NEVER}
    forms: list[Any] = [ones, (-ones,), {"x": 0 * ones, "shift": 1.0}]
    assert convlora.audit(model, batches=forms).ok
    assert convlora.audit(model, batches=iter(forms)).ok
    assert convlora.audit(model, ones, call=[lambda m: m(-ones)], batches=[0 * ones]).ok


@pytest.mark.parametrize("options", [{"call": 3}, {"call": [None]}, {"batches": torch.ones(2, 4)}, {"batches": 3}])
def test_audit_refuses_what_is_no_call_and_no_list(options: dict[str, Any]) -> None:
    model = convlora.inject(Experts(), "*", rank=1)
    with pytest.raises(convlora.ConvLoRAError, match=r"audit: (call|batches)"):
        convlora.audit(model, **options)


class Block(nn.Module):
    """RepVGG's way: two branches in training, one convolution when deployed."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.deployed = False

    def deploy(self) -> None:
        if not self.deployed:
            self.fused = nn.Conv2d(3, 3, 3, padding=1)
            padded = nn.functional.pad(self.point.weight, (1, 1, 1, 1))
            self.fused.weight.data = (self.wide.weight + padded).detach()
            self.fused.bias.data = (self.wide.bias + self.point.bias).detach()
            del self.wide, self.point
            self.deployed = True

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x) if self.deployed else self.wide(x) + self.point(x)


class DeploysInEval(nn.Sequential):
    def train(self, mode: bool = True) -> DeploysInEval:
        super().train(mode)
        if not mode:
            for block in self:
                if isinstance(block, Block):
                    block.deploy()
        return self


class DeploysInForward(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        self[0].deploy()
        return super().forward(x)


class ReplacesInTraining(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self[1] = nn.Conv2d(3, 3, 1)
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "targets", "vanishing", "modes"),
    [
        (DeploysInEval, "*", ["0.wide", "0.point"], "eval"),
        (DeploysInEval, "0.*", ["0.wide", "0.point"], "eval"),
        (DeploysInForward, "*", ["0.wide", "0.point"], "train and eval"),
        (DeploysInForward, "0.*", ["0.wide", "0.point"], "train and eval"),
        (ReplacesInTraining, "*", ["1"], "train"),
    ],
)
@pytest.mark.parametrize("copies", [False, True])
def test_audit_names_layers_that_the_model_takes_out(
    kind: type[nn.Sequential], targets: str, vanishing: list[str], modes: str, copies: bool
) -> None:
    norm = [nn.BatchNorm2d(3)] if copies else []
    model = convlora.inject(kind(Block(), nn.Conv2d(3, 3, 1), *norm), targets, rank=1, factors="locon")
    if copies:
        convlora.inject(model, targets, rank=1, factors="locon", name="second")
    before = snapshot(model)
    report = convlora.audit(model, torch.randn(2, 3, 6, 6))
    problem = f"the model replaces or deletes it in {modes} mode: exclude it"
    assert report.problems == dict.fromkeys(vanishing, problem)
    assert snapshot(model) == before
    assert not model[0].deployed


def test_audit_of_a_sound_model() -> None:
    model = adapted_net()
    state = bits(model)
    report = convlora.audit(model, torch.randn(NET_INPUT))
    assert report.ok
    said = str(report)
    assert said.startswith("all 4 adapted layers act in train and eval mode, none is overwritten; ")
    assert "may read others for other inputs" in said
    assert bits(model) == state
