"""The projections of attention, whose weights `nn.MultiheadAttention` holds itself: their whole life as layers."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lives import base_bits, output
from oracle import TORCH, bits, randomise, snapshot
from processes import in_processes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner

import convlora
from convlora import Adapter, ConvLoRAError, ConvLoRAWarning, formats
from convlora.cli.app import app
from convlora.layer.adapted import slot_of
from convlora.layer.projection import Projection

pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")
TESTS = Path(__file__).parents[1]


class Block(nn.Module):
    """Attention of a sequence to itself, and a Linear behind it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, **{"batch_first": True, **options})
        self.mlp = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x, x, x, need_weights=False)[0])  # type: ignore[no-any-return]


class Cross(nn.Module):
    """Attention to keys and values of other widths, so with separate projections, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, kdim=6, vdim=10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.attn(x, x[..., :6].contiguous(), x[..., 6:].contiguous())[0].transpose(0, 1)  # type: ignore[no-any-return]


class Functional(nn.Module):
    """As CLIP's pooling: the function, with the attention's own tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, attn = x.transpose(0, 1), self.attn
        pooled, _ = F.multi_head_attention_forward(
            x.mean(0, keepdim=True), x, x, 16, 2, attn.in_proj_weight, attn.in_proj_bias, None, None, False, 0.0,
            attn.out_proj.weight, attn.out_proj.bias, training=self.training, need_weights=False,
        )  # fmt: skip
        return self.out(pooled[0])  # type: ignore[no-any-return]


class Own(nn.Module):
    """Attention that somebody wrote, with a Parameter of this name."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(48, 16) / 4)
        self.in_proj_bias = nn.Parameter(torch.zeros(48))
        self.proj = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))  # type: ignore[no-any-return]


class Twice(Block):
    """One attention under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.attn

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.again(x, x, x)[0])


class Tied(Block):
    """Two attentions with one input projection."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.MultiheadAttention(16, 4, batch_first=True)
        self.second.in_proj_weight = self.attn.in_proj_weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.second(x, x, x)[0])


def normed() -> nn.Module:
    block = Block()
    nn.utils.parametrizations.weight_norm(block.attn, "in_proj_weight")
    return block


def vit() -> nn.Module:
    from torchvision.models import VisionTransformer  # type: ignore[import-untyped]

    model = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero
    return model  # type: ignore[no-any-return]


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, **{"batch_first": True, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps from nested tensors
        return nn.TransformerEncoder(layer, 2)


@dataclass(frozen=True)
class Case:
    """A network with attention, and the shape of a batch."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 7, 16)
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def base(self) -> nn.Module:
        """The same at every call."""
        torch.manual_seed(0)
        return self.make().to(self.dtype)

    def batch(self, seed: int = 0) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)


CASES: dict[str, Case] = {
    "batch first": Case(Block, options=dict(bias=True)),
    "sequence first": Case(lambda: Block(batch_first=False)),
    "without bias": Case(lambda: Block(bias=False)),
    "bias_kv": Case(lambda: Block(add_bias_kv=True, add_zero_attn=True), options=dict(bias=True)),
    "bfloat16": Case(Block, dtype=torch.bfloat16, options=dict(bias=True, factors="locon")),
    "separate": Case(Cross, options=dict(bias=True)),
    "functional": Case(Functional, options=dict(rank_scaling="sqrt")),
    "own": Case(Own),
    "own, the model itself": Case(Own, options=dict(exclude="proj")),
    "twice": Case(Twice),
    "tied": Case(Tied, options=dict(exclude="second.*")),
    "encoder": Case(encoder, options=dict(bias=True)),
    "encoder, norm first": Case(lambda: encoder(norm_first=True, batch_first=False)),
    "vit": Case(vit, (2, 3, 16, 16)),
}
if find_spec("torchvision") is None:
    del CASES["vit"]
each = pytest.mark.parametrize("name", CASES)


def injected_into(model: nn.Module, name: str, **options: Any) -> nn.Module:
    return convlora.inject(model, **{"targets": "*", "rank": 2, **CASES[name].options, **options})


def injected(name: str, **options: Any) -> nn.Module:
    return injected_into(CASES[name].base(), name, **options)


def trained(name: str, **options: Any) -> nn.Module:
    """A base whose adapter is as if trained, in eval mode."""
    torch.manual_seed(1)
    return randomise(injected(name, **options)).eval()  # type: ignore[no-any-return]


def projections(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Projection)]


def same(left: Any, right: Any) -> bool:
    """State dicts: the same keys in the same order, bitwise the same values."""
    return list(left) == list(right) and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def effective(model: nn.Module) -> dict[str, Tensor]:
    """The base's Parameters by name, as the modules of the model read."""
    names = [key for key in model.state_dict() if ".convlora." not in key]
    return {
        key: getattr(model.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]).detach().clone()
        for key in names
    }


# --- inject ------------------------------------------------------------------------------------------------------


@each
def test_inject_changes_neither_output_nor_base_keys(name: str) -> None:
    case = CASES[name]
    model, base, x = injected(name), case.base(), case.batch()
    assert projections(model)
    assert torch.equal(output(model, x), output(base, x))
    assert torch.equal(model.train()(x), base.train()(x))
    assert base_bits(model) == bits(base)
    assert [key for key in model.state_dict() if ".convlora." not in key] == list(base.state_dict())
    model.load_state_dict(base.state_dict(), strict=True)
    full = model.state_dict()
    assert not model.load_state_dict(full, strict=True).missing_keys
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".convlora." not in key)


def test_a_pattern_selects_projections_by_their_path() -> None:
    def selected(targets: Any, **options: Any) -> list[str]:
        return [row.name for row in convlora.summary(convlora.inject(Block(), targets, rank=2, **options)).layers]

    assert selected("in_proj") == selected("attn.in_proj") == selected("*.in_*") == ["attn.in_proj"]
    assert sorted(selected("attn.*")) == ["attn.in_proj", "attn.out_proj"]
    assert selected("*", exclude="in_proj") == ["attn.out_proj", "mlp"]
    assert sorted(selected(nn.Linear)) == ["attn.in_proj", "attn.out_proj", "mlp"]
    assert selected(lambda name, module: name.endswith("in_proj") and module.weight.shape == (48, 16)) == [
        "attn.in_proj"
    ]
    model = convlora.inject(Cross(), "*", ranks={"k_proj": 3, "q_proj": 0}, alphas={"attn.v_proj": 8}, bias=True)
    rows = {row.name: (row.rank, row.shape) for row in convlora.summary(model).layers}
    assert rows == {"attn.k_proj": (3, (16, 6)), "attn.v_proj": (4, (16, 10)), "attn.out_proj": (4, (16, 16))}
    layers = convlora.adapter(model).layers
    assert layers["attn.v_proj"].alpha == 8
    assert [path for path, layer in layers.items() if "lora_bias" in layer.tensors] == ["attn.out_proj"]


def test_errors_name_the_projection() -> None:
    with pytest.raises(ConvLoRAError, match=r"selects no layer; 3 can be adapted, nearest: 'attn.in_proj'"):
        convlora.inject(Block(), "attn.in_prj")
    with pytest.raises(ConvLoRAError, match=r"names 'attn': MultiheadAttention .* for the layers inside: 'attn.\*'"):
        convlora.inject(Block(), "attn")
    with pytest.raises(ConvLoRAError, match=r"ranks pattern 'k_proj' matches none .*nearest: '.*_proj'"):
        convlora.inject(Block(), "*", ranks={"k_proj": 2})
    named = Block()
    named.attn.convlora = "mine"  # type: ignore[assignment]
    with pytest.raises(ConvLoRAError, match=r"'in_proj' names 'attn.in_proj': the module around it has an attribute"):
        convlora.inject(named, "in_proj")
    integers = Block()
    integers.attn.in_proj_weight = nn.Parameter(torch.zeros(48, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConvLoRAError, match=r"'attn.in_proj': its weight is torch.int8, not floating point"):
        convlora.inject(integers, "in_proj")


def test_an_attention_with_a_child_of_this_name_keeps_it() -> None:
    block = Block()
    block.attn.in_proj = nn.Linear(2, 2)  # type: ignore[assignment]
    model = convlora.inject(block, "*", rank=1)
    assert list(formats.specs_of(model)) == ["attn.out_proj", "attn.in_proj", "mlp"]
    assert convlora.adapter(model).layers["attn.in_proj"].spec.shape == (2, 2)
    assert model.attn.in_proj_weight is model.attn._parameters["in_proj_weight"]


@each
def test_what_only_looks_leaves_nothing(name: str) -> None:
    case = CASES[name]
    model = case.base()
    before = snapshot(model)
    specs = formats.specs_of(model)
    assert any(spec.in_parent for spec in specs.values())
    with pytest.raises(ConvLoRAError):
        convlora.inject(model, ["*", "nothing.of.this"])
    with pytest.raises(ConvLoRAError, match=r"in_proj|k_proj|q_proj"):
        convlora.load(model, convlora.adapter(convlora.inject(Block(kdim=3), "*", rank=1)))
    ranks = convlora.allocate_ranks(
        model,
        "*",
        budget=600,
        batches=[case.batch(i) for i in range(2)],
        loss=lambda m, x: m(x).float().square().mean(),
    )
    assert set(ranks) <= set(specs)
    assert any(rank for path, rank in ranks.items() if specs[path].in_parent)
    assert snapshot(model) == before


def test_specs_of_a_checkpoint_are_those_of_the_network() -> None:
    for make in (Block, Cross, Own, encoder, lambda: Block(bias=False)):
        base: nn.Module = make()
        of_model, of_state = formats.specs_of(base), formats.specs_from_checkpoint(base.state_dict())
        assert of_model == of_state
        assert {p: s.in_parent for p, s in of_model.items()} == {p: s.in_parent for p, s in of_state.items()}
    assert list(formats.specs_from_checkpoint({"w.pos_weight": torch.zeros(2, 2)})) == []


# --- a life ------------------------------------------------------------------------------------------------------


@each
def test_the_effective_tensors_are_the_base_s_with_the_update(name: str) -> None:
    model = trained(name)
    base, adapter = CASES[name].base().state_dict(), convlora.adapter(model)
    found = effective(model)
    expected = adapter.apply_to(base)
    assert all(torch.equal(found[key], expected[key]) for key in base)
    changed = {key for key in base if not torch.equal(expected[key], base[key])}
    assert {
        f"{path.rpartition('.')[0]}.in_proj_weight".lstrip(".") for path in adapter.layers if "in_proj" in path
    } <= changed
    for path in projections(model):
        layer = model.get_submodule(path)
        assert torch.equal(layer.weight, found[f"{path}_weight"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in CASES if name != "tied"])  # one gradient for two weights there
def test_gradients_are_those_of_the_plain_network_at_the_effective_weights(name: str) -> None:
    case = CASES[name]
    model = trained(name, bias=False).train()
    base, x = case.base().train(), case.batch()
    with torch.no_grad():
        for key, value in effective(model).items():
            base.get_parameter(key).copy_(value)
    output_ = model(x)
    assert torch.equal(output_, base(x))
    output_.float().square().mean().backward()
    base(x).float().square().mean().backward()
    for path in projections(model):
        low_rank = slot_of(model.get_submodule(path)).low_rank("default")
        full = base.get_parameter(f"{path}_weight").grad
        assert full is not None
        a, b = low_rank.lora_A.double(), low_rank.lora_B.double()
        tolerance = dict(rtol=0.03, atol=0.03) if case.dtype is torch.bfloat16 else dict(rtol=1e-4, atol=1e-6)
        scale = low_rank.scale
        torch.testing.assert_close(low_rank.lora_B.grad.double(), scale * full.double() @ a.T, **tolerance)
        torch.testing.assert_close(low_rank.lora_A.grad.double(), scale * b.T @ full.double(), **tolerance)


@each
def test_switched_off_and_removed_it_is_the_base_exactly(name: str) -> None:
    case = CASES[name]
    base, x = case.base(), case.batch()
    expected, before = output(base, x), snapshot(base)
    model = randomise(injected_into(base, name))
    live = output(model, x)
    assert not torch.equal(live, expected)
    with convlora.disabled(model):
        assert torch.equal(output(model, x), expected)
    assert torch.equal(output(convlora.activate(model, {"default": 0.0}), x), expected)
    assert torch.equal(output(convlora.activate(model, "default"), x), live)
    assert convlora.changed(model) == []
    assert snapshot(convlora.remove(model)) == before


@each
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_all_ways_to_merge_agree_bitwise(name: str, strength: float, tmp_path: Path) -> None:
    case = CASES[name]
    model, base, x = trained(name), case.base(), case.batch()
    live = output(convlora.activate(model, {"default": strength}), x)
    convlora.save(model, tmp_path / "a.safetensors")
    torch.save(base.state_dict(), tmp_path / "base.pth")
    state = convlora.merged_state_dict(model)
    assert list(state) == list(base.state_dict())
    assert list(state._metadata) == list(base.state_dict()._metadata)  # type: ignore[attr-defined]
    files = [str(tmp_path / file) for file in ("base.pth", "a.safetensors", "out.pth")]
    result = CliRunner().invoke(app, ["merge", *files[:2], f"--strength={strength}", "-o", files[2]])
    assert result.exit_code == 0, result.output
    assert same(torch.load(files[2]), state)
    assert same(convlora.adapter(model).apply_to(base.state_dict(), strength), state)
    keys = bits(model)
    assert torch.equal(output(convlora.merge(model), x), live)
    assert bits(model) == keys
    assert torch.equal(output(convlora.unmerge(model), x), live)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name == "tied" else "error")
        convlora.remove(convlora.merge(model))
    assert torch.equal(output(model, x), live)
    assert same(model.state_dict(), state)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    base.load_state_dict(state, strict=True)
    if name != "tied":  # one Parameter there, and one of the two merged
        assert torch.equal(output(base, x), live)


@each
def test_the_file_in_a_fresh_base_gives_the_live_output_bitwise(name: str, tmp_path: Path) -> None:
    model, x = trained(name), CASES[name].batch()
    convlora.save(model, tmp_path / "a.safetensors")
    read = Adapter.read(tmp_path / "a.safetensors")
    assert {p: layer.spec.in_parent for p, layer in read.layers.items()} == {
        p: layer.spec.in_parent for p, layer in convlora.adapter(model).layers.items()
    }
    fresh = convlora.load(CASES[name].base(), tmp_path / "a.safetensors")
    assert torch.equal(output(fresh, x), output(model, x))
    assert same(fresh.state_dict(), model.state_dict())
    other = randomise(copy.deepcopy(fresh))
    assert torch.equal(output(convlora.load(other, read), x), output(model, x))  # a hot swap


@each
def test_copies_pickles_and_full_checkpoints_compute_the_same(name: str) -> None:
    model, x = trained(name), CASES[name].batch()
    live = output(model, x)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, x), live)
    if name != "tied":  # weight
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(output(torch.load(buffer, weights_only=False), x), live)
    for path in projections(twin):
        assert twin.get_submodule(path).owner is twin.get_submodule(path.rpartition(".")[0])
    randomise(twin)
    assert torch.equal(output(model, x), live)
    fresh = injected(name)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(output(fresh, x), live)
    half = {
        key: value for key, value in model.state_dict().items() if not key.endswith("_proj.convlora.default.lora_A")
    }
    with pytest.raises(RuntimeError, match=r"_proj\.convlora\.default\.lora_A"):
        injected(name).load_state_dict(half, strict=True)
    average = AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(output(average, x), live)
    assert torch.equal(output(convlora.remove(twin), x), output(CASES[name].base(), x))


def test_a_whole_model_is_unpickled_in_another_process(tmp_path: Path) -> None:
    model = trained("batch first")
    torch.save({"model": model, "x": CASES["batch first"].batch(), "y": output(model, CASES["batch first"].batch())},
               tmp_path / "all.pth")  # fmt: skip
    code = (
        "import sys, torch; sys.path[:0] = [sys.argv[2], sys.argv[2] + '/model']; torch.set_num_threads(1)\n"
        "d = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): assert torch.equal(d['model'](d['x']), d['y'])\n"
        "import convlora; convlora.remove(convlora.merge(d['model']))\n"
        "with torch.no_grad(): assert torch.equal(d['model'](d['x']), d['y'])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "all.pth"), str(TESTS)], check=True)


@each
def test_two_adapters_and_what_one_caller_uses(name: str) -> None:
    case = CASES[name]
    model, x = trained(name), case.batch()
    first, base = output(model, x), output(case.base(), x)
    convlora.inject(model, "*", rank=1, name="second", **{**case.options, "factors": "locon"})
    convlora.activate(randomise(model, "second"), ["second"])
    second = output(model, x)
    both = output(convlora.activate(model, {"default": 1.0, "second": 1.0}), x)
    with convlora.using(model, "default"):
        assert torch.equal(output(model, x), first)
        with convlora.using(model, []):
            assert torch.equal(output(model, x), base)
    assert torch.equal(output(model, x), both)
    assert torch.equal(output(convlora.activate(model, "second"), x), second)
    convlora.remove(model, "second")
    assert torch.equal(output(convlora.activate(model, "default"), x), first)
    assert base_bits(model) == bits(case.base())


def test_samples_with_adapters_of_their_own_are_refused_clearly() -> None:
    model, x = trained("batch first"), CASES["batch first"].batch()
    with convlora.per_sample(model, ["default", None, "default"]), pytest.raises(ConvLoRAError, match="per_sample: a"):
        model(x)
    assert torch.equal(output(model, x), output(trained("batch first"), x))


@each
def test_summary_and_audit_know_of_projections(name: str) -> None:
    model, x = trained(name), CASES[name].batch()
    rows = {row.name: row for row in convlora.summary(model).layers}
    for path in projections(model):
        weight = model.get_submodule(path.rpartition(".")[0])._parameters[f"{path.rpartition('.')[2]}_weight"]
        assert weight is not None
        assert rows[path].type == "Projection"
        assert rows[path].shape == tuple(weight.shape)
    base = sum(p.numel() for p in CASES[name].base().parameters())
    assert convlora.summary(model).base == base
    before = snapshot(model)
    assert convlora.audit(model, x).ok, str(convlora.audit(model, x))
    assert snapshot(model) == before


class Idle(Block):
    """Its attention is never asked, or overwrites its own weight."""

    overwrites = False

    def forward(self, x: Tensor) -> Tensor:
        if self.overwrites:
            self.attn.in_proj_weight.data.mul_(1.0)
            return super().forward(x)
        return self.mlp(x)  # type: ignore[no-any-return]


def test_audit_finds_projections_that_do_not_act() -> None:
    x = CASES["batch first"].batch()
    model = convlora.inject(Idle(), "*", rank=1)
    assert "never read" in convlora.audit(model, x).problems["attn.in_proj"]
    model.overwrites = True
    assert "overwritten" in convlora.audit(model, x).problems["attn.in_proj"]


def test_what_trains_outside_is_named_once() -> None:
    model = injected("batch first")
    with torch.no_grad():
        model.attn.in_proj_weight.add_(1)  # type: ignore[union-attr]
    assert convlora.changed(model) == []  # that was the effective weight
    with torch.no_grad():
        model.attn._parameters["in_proj_weight"].add_(1)  # type: ignore[union-attr]
    assert convlora.changed(model) == ["attn.in_proj_weight"]
    model.requires_grad_(True)
    assert "attn.in_proj_weight" not in [n for n, p in convlora.freeze(model).named_parameters() if p.requires_grad]


# --- where torch goes other ways ---------------------------------------------------------------------------------


@pytest.fixture
def fast_paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of torch's fused functions, one for each call."""
    called: list[str] = []
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        plain = getattr(torch, name)

        def counted(*args: Any, _plain: Any = plain, _name: str = name) -> Any:
            called.append(_name)
            return _plain(*args)

        monkeypatch.setattr(torch, name, counted)
    return called


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_fast_paths_of_torch_compute_with_the_adapter(masked: bool, merged: bool, fast_paths: list[str]) -> None:
    model, x = trained("encoder"), CASES["encoder"].batch()
    mask = torch.arange(7).expand(3, 7) >= torch.tensor([[7], [4], [2]]) if masked else None
    plain = CASES["encoder"].base().eval()
    plain.load_state_dict(convlora.merged_state_dict(model))
    if merged:
        convlora.merge(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nested tensors.*")
        fast, expected = model(x, src_key_padding_mask=mask), plain(x, src_key_padding_mask=mask)
    assert fast_paths == ["_transformer_encoder_layer_fwd"] * 4
    assert torch.equal(fast, expected)
    if not merged:
        slow = model(x, src_key_padding_mask=mask)
        assert slow.requires_grad
        assert len(fast_paths) == 4  # with gradients there is none
        kept = slice(None) if mask is None else ~mask
        torch.testing.assert_close(slow[kept], fast[kept], rtol=1e-4, atol=1e-5)


def test_native_attention_computes_with_the_adapter(fast_paths: list[str]) -> None:
    model, x = trained("batch first"), CASES["batch first"].batch()
    fast = output(model, x)
    assert fast_paths == ["_native_multi_head_attention"]
    torch.testing.assert_close(model(x), fast, rtol=1e-4, atol=1e-5)
    assert fast_paths == ["_native_multi_head_attention"]


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        for message in (
            ".*grad attribute of a Tensor.*",
            ".*LeafSpec.*",
            ".*CUDA.*",
            ".*torch.jit.*",
            ".*deprecated.*",
        ):
            warnings.filterwarnings("ignore", message)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["batch first", "separate", "encoder", "functional"])
def test_compiles_as_one_graph_and_follows_a_hot_swap(name: str) -> None:
    model, x = trained(name), CASES[name].batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()
    ours = [p.grad for p in convlora.parameters(model)]
    assert all(grad is not None and bool(grad.ne(0).any()) for grad in ours if grad is not None and grad.dim() > 1)
    convlora.load(model, convlora.adapter(randomise(injected(name))))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    convlora.merge(model)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["batch first", "separate", "encoder"])
def test_exports_and_traces(name: str) -> None:
    model, x = trained(name), CASES[name].batch()
    live = output(model, x)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), live, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["batch first", "separate"])
def test_functional_calls_and_devices_without_values(name: str) -> None:
    model, x = trained(name), CASES[name].batch()
    twice = {key: p * 2 for key, p in model.named_parameters()}
    plain = CASES[name].base().eval()
    with torch.no_grad():
        doubled = torch.func.functional_call(model, twice, (x,))
        for key, p in model.named_parameters():
            p.copy_(twice[key])
        torch.testing.assert_close(model(x), doubled)
    assert all(p.is_meta for p in copy.deepcopy(model).to("meta").parameters())
    empty = convlora.inject(plain.to("meta"), "*", rank=2)
    empty.to_empty(device="cpu").load_state_dict(trained(name, bias=False).state_dict(), strict=True)
    assert torch.equal(output(empty, x), output(trained(name, bias=False), x))
    wide = trained(name).double()
    torch.testing.assert_close(output(wide, x.double()).float(), output(trained(name), x), rtol=1e-4, atol=1e-5)


def test_its_own_reset_reaches_the_base() -> None:
    model = trained("batch first")
    model.attn._reset_parameters()  # type: ignore[operator, union-attr]
    assert not torch.equal(
        model.state_dict()["attn.in_proj_weight"], CASES["batch first"].base().state_dict()["attn.in_proj_weight"]
    )
    assert not model.state_dict()["attn.in_proj_bias"].any()
    assert slot_of(model.attn.in_proj).active == ("default",)  # type: ignore[union-attr]
    before = bits(model)
    for module in model.modules():
        if isinstance(module, Projection):
            module.reset_parameters()
    assert bits(model) == before


def test_a_norm_on_the_weight_stays_and_is_baked_in_at_the_end() -> None:
    torch.manual_seed(0)
    base = normed().eval()
    model = randomise(convlora.inject(copy.deepcopy(base), "*", rank=2)).eval()
    x = CASES["batch first"].batch()
    live = output(model, x)
    assert "attn.in_proj" in convlora.adapter(model).layers
    assert torch.equal(output(convlora.merge(model), x), live)
    with pytest.raises(ConvLoRAError, match="'attn' computes its in_proj_weight"):
        convlora.merged_state_dict(model)
    with pytest.warns(ConvLoRAWarning, match="the norm of 1 weights was baked in"):
        convlora.remove(model)
    assert torch.equal(output(model, x), live)
    assert isinstance(model.attn._parameters["in_proj_weight"], nn.Parameter)
    back = copy.deepcopy(base)
    before = snapshot(back)
    assert snapshot(convlora.remove(convlora.inject(back, "*", rank=2))) == before


def kept_for_backward(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps of a call, beside Parameters and buffers."""
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(t.untyped_storage().nbytes() for name, t in kept.items() if name not in owned)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["batch first", "separate", "bfloat16", "own", "encoder"])
def test_no_effective_weight_is_kept_for_backward(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    if autocast and (name == "own" or case.dtype is torch.bfloat16):
        pytest.skip("its own forward may use a weight otherwise than autocast casts it; nothing to cast")
    model, x = trained(name, bias=False).train(), case.batch().requires_grad_()
    weights = sum(effective(model)[f"{path}_weight"].nbytes for path in projections(model)) // (2 if autocast else 1)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x).float().square().mean().backward()
        return [p.grad.clone() for p in convlora.parameters(model) if p.grad is not None]

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        less, formed_again = kept_for_backward(model, x), gradients()
        monkeypatch.setattr("convlora.layer.adapted.forms_again", lambda: False)
        more, kept = kept_for_backward(model, x), gradients()
    assert more - less >= weights
    assert all(torch.equal(a, b) for a, b in zip(formed_again, kept, strict=True))


def test_a_mask_on_the_weight_keeps_its_zeros() -> None:
    base = CASES["batch first"].base()
    nn.utils.prune.l1_unstructured(base.attn, "in_proj_weight", 0.5)
    zeros = base.attn.in_proj_weight == 0  # type: ignore[union-attr]
    model, x = randomise(convlora.inject(base, "*", rank=2)).eval(), CASES["batch first"].batch()
    live = output(model, x)
    assert bool((model.attn.in_proj_weight == 0)[zeros].all())
    assert not torch.equal(model.attn.in_proj_weight, model.attn.__dict__["in_proj_weight"])
    assert torch.equal(output(convlora.merge(model), x), live)
    assert torch.equal(output(convlora.remove(model), x), live)
    assert bool((model.attn.in_proj_weight == 0)[zeros].all())


@pytest.mark.parametrize("merged", [False, True])
def test_what_others_write_does_not_act_and_assignment_is_refused(merged: bool) -> None:
    case = CASES["batch first"]
    model, x = trained("batch first"), case.batch()
    live, full = output(model, x), bits(model)
    if merged:
        convlora.merge(model)
    attn: Any = model.attn
    with torch.no_grad():
        nn.init.zeros_(attn.in_proj_weight)
        attn.in_proj_bias.data.zero_()
        attn.out_proj.weight.zero_()
    assert torch.equal(output(model, x), live)
    with pytest.raises(ConvLoRAError, match=r"MultiheadAttention.in_proj_weight cannot be set while adapters act"):
        attn.in_proj_weight = nn.Parameter(attn.in_proj_weight.detach())
    with pytest.raises(ConvLoRAError, match="cannot be set while adapters act"):
        nn.utils.parametrizations.weight_norm(attn, "in_proj_weight")
    assert bits(model) == full
    assert torch.equal(output(model, x), live)
    convlora.activate(model, [])
    attn.in_proj_weight = nn.Parameter(torch.zeros(48, 16))
    assert not model.state_dict()["attn.in_proj_weight"].any()
    convlora.activate(model, "default")
    model.load_state_dict(case.base().state_dict(), strict=True, assign=True)
    assert torch.equal(output(model, x), live)


def test_its_own_forward_reads_what_is_kept_without_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = trained("batch first"), CASES["batch first"].batch()
    output(model, x)
    kept = slot_of(model.attn.in_proj)._fused["weight"].value  # type: ignore[union-attr]
    read: list[Tensor] = []
    plain = torch._native_multi_head_attention
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: (read.append(args[5]), plain(*args))[1])
    output(model, x)
    assert read[0] is kept
    assert model.attn.in_proj_weight is not kept


# --- with copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("low", "whole"), ("whole", "low")])
def test_one_adapter_has_factors_and_another_the_whole_attention(order: tuple[str, str], tmp_path: Path) -> None:
    base, x = CASES["batch first"].base(), CASES["batch first"].batch()
    before, expected = snapshot(base), output(base, x)
    model = base.train()
    for name in order:
        saved = "attn" if name == "whole" else ()
        convlora.inject(model, "*", rank=2, name=name, modules_to_save=saved, bias=True)
        randomise(model, name)
    assert list(convlora.adapter(model, "whole").layers) == ["mlp"]
    assert set(convlora.adapter(model, "whole").modules) == {"attn", "attn.out_proj"}
    assert "attn.in_proj" in convlora.adapter(model, "low").layers
    outputs = {}
    for acting in ({"low": 1.0}, {"whole": 1.0}, {"low": 0.5, "whole": 1.0}, {"low": 1.0, "whole": 0.5}, {}):
        key = str(acting)
        outputs[key] = output(convlora.activate(model, acting), x)
        if acting:
            assert torch.equal(output(convlora.merge(model), x), outputs[key])
            plain = CASES["batch first"].base()
            state = convlora.merged_state_dict(model)
            convlora.unmerge(model)
            plain.load_state_dict(state)
            assert torch.equal(output(plain, x), outputs[key])
    assert torch.equal(outputs["{}"], expected)
    assert len({value.sum().item() for value in outputs.values()}) == 5
    twin = copy.deepcopy(convlora.activate(model, ["low", "whole"]))
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    assert torch.equal(output(torch.load(buffer, weights_only=False), x), output(twin, x))
    for name in order:
        convlora.remove(model, name)
    assert snapshot(model.train()) == before
    assert torch.equal(
        output(convlora.activate(convlora.remove(twin, order[0]), order[1]), x), outputs[str({order[1]: 1.0})]
    )


def test_a_saved_attention_has_no_factors_of_the_same_adapter() -> None:
    model = convlora.inject(Block(), "*", rank=1, modules_to_save="attn")
    assert [row.name for row in convlora.summary(model).layers if row.factors != "copy"] == ["mlp"]
    assert not projections(model)
    with pytest.raises(ConvLoRAError, match="modules_to_save leaves no layer"):
        convlora.inject(Block(), "in_proj", modules_to_save="attn")


# --- checkpoints and files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch first", "separate", "own, the model itself", "encoder"])
def test_the_difference_of_two_checkpoints_is_an_adapter(name: str, tmp_path: Path) -> None:
    model, base = trained(name), CASES[name].base()
    merged = convlora.merged_state_dict(model)
    found = Adapter.extract(base.state_dict(), merged, rank=2)
    assert set(found.layers) == set(convlora.adapter(model).layers)
    for key, value in found.apply_to(base.state_dict()).items():
        torch.testing.assert_close(value, merged[key], rtol=1e-4, atol=1e-5)
    loaded = convlora.load(CASES[name].base(), found)
    torch.testing.assert_close(
        output(loaded, CASES[name].batch()), output(model, CASES[name].batch()), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", ["batch first", "separate", "encoder"])
@pytest.mark.parametrize("format", ["locon", "loralib"])
def test_other_formats_hold_projections(format: str, name: str, tmp_path: Path) -> None:
    base, x = CASES[name].base(), CASES[name].batch()
    model = trained(name, bias=False)
    place = tmp_path / "a.safetensors"
    formats.write(convlora.adapter(model), place, format)
    read = formats.read(place, layers=formats.specs_of(base))
    assert {p: s.spec.in_parent for p, s in read.layers.items()} == {
        p: s.spec.in_parent for p, s in convlora.adapter(model).layers.items()
    }
    torch.testing.assert_close(output(convlora.load(base, read), x), output(model, x))
    state = CASES[name].base().state_dict()
    of_state = formats.read(place, layers=formats.specs_from_checkpoint(state)).apply_to(state)
    expected = convlora.merged_state_dict(model)
    for key, value in of_state.items():
        torch.testing.assert_close(value, expected[key])


def test_a_linear_of_the_same_name_is_meant_where_the_checkpoint_has_one() -> None:
    adapter = convlora.adapter(trained("batch first", targets="in_proj", bias=False))
    linear = {"attn.in_proj.weight": torch.zeros(48, 16)}
    assert torch.equal(adapter.apply_to(linear)["attn.in_proj.weight"], adapter.delta("attn.in_proj"))
    with pytest.raises(ConvLoRAError, match=r"missing: attn.in_proj_weight"):
        adapter.apply_to({"attn.weight": torch.zeros(48, 16)})


def test_the_commands_know_projections(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    model, base = trained("encoder", bias=False), CASES["encoder"].base()
    base_file, file, merged = (str(tmp_path / f"{n}.safetensors") for n in ("base", "a", "merged"))
    save_file(dict(base.state_dict()), base_file)
    convlora.save(model, file)
    path = projections(model)[0]
    assert path in run("info", file)
    assert path in run("layers", base_file, "in_proj")
    run("verify", file, "--base", base_file)
    run("merge", base_file, file, "-o", merged)
    written, expected = load_file(merged), convlora.merged_state_dict(model)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], value) for key, value in expected.items())
    run("extract", base_file, merged, "-o", str(tmp_path / "b.safetensors"), "--rank", "2")
    assert path in run("diff", file, str(tmp_path / "b.safetensors"))
    prefixed = {f"module.{k}": v for k, v in base.state_dict().items()}
    save_file(prefixed, str(tmp_path / "prefixed.safetensors"))
    run("verify", file, "--base", str(tmp_path / "prefixed.safetensors"))
    run("convert", file, "-o", str(tmp_path / "peft"), "--to", "peft")


def test_features_of_an_attention_are_taken_as_before() -> None:
    from convlora.distill.taps import find_taps

    base, model = Block(), convlora.inject(Block(), "*", rank=1)
    for pattern in ("*", "attn", "attn.out_proj"):
        assert find_taps(model, pattern) == find_taps(base, pattern)
    distiller = convlora.distill.Distiller(randomise(model), ["attn[0]"], loss="mse")
    assert distiller(CASES["batch first"].batch()).loss > 0


# --- several processes -------------------------------------------------------------------------------------------


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model(x).square().mean().backward()
    found = [p.grad for p in convlora.parameters(model)]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]  # type: ignore[misc]


def _of_each(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    for name in ("batch first", "separate", "encoder", "own, the model itself"):
        x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(5))
        expected = _gradients(trained(name, bias=False), x)
        ddp = nn.parallel.DistributedDataParallel(trained(name, bias=False))
        sharded = trained(name, bias=False)
        mesh = dist.init_device_mesh("cpu", (2,))
        for module in list(sharded.modules()):
            if isinstance(module, nn.MultiheadAttention):
                fully_shard(module, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for model in (ddp, sharded):
            found = _gradients(model, x[rank : rank + 1])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        convlora.save(sharded, f"{folder}/{name}.safetensors")
        loaded = convlora.load(CASES[name].base(), f"{folder}/{name}.safetensors")
        torch.testing.assert_close(output(loaded, x), output(trained(name, bias=False), x))


@pytest.mark.skipif(TORCH < (2, 7) or TORCH == (2, 8), reason="there fully_shard cannot run, or sums, on the CPU")
def test_projections_train_in_several_processes(tmp_path: Path) -> None:
    in_processes(tmp_path, _of_each, str(tmp_path))


# --- training checkpoints, and layers that leave -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch first", "separate", "own, the model itself", "encoder", "twice"])
def test_a_training_checkpoint_gives_the_adapter(name: str) -> None:
    model, x = trained(name), CASES[name].batch()
    adapter = convlora.adapter(model)
    config = convlora.adapters(model)["default"]
    found = Adapter.from_state_dict({f"module.{key}": value for key, value in model.state_dict().items()}, config)
    assert found.fingerprint == adapter.fingerprint
    assert {p: (layer.spec, layer.spec.in_parent) for p, layer in found.layers.items()} == {
        p: (layer.spec, layer.spec.in_parent) for p, layer in adapter.layers.items()
    }
    assert torch.equal(output(convlora.load(CASES[name].base(), found), x), output(model, x))


def test_an_attention_that_was_replaced_is_missed() -> None:
    model = trained("batch first")
    model.attn = nn.MultiheadAttention(16, 2, batch_first=True).requires_grad_(False)
    with pytest.warns(ConvLoRAWarning, match=r"'attn\.in_proj'.* left the model"):
        convlora.adapter(model)


# --- other names and strengths -----------------------------------------------------------------------------------


def test_a_prefix_is_found_for_projections_too() -> None:
    model, x = trained("encoder"), CASES["encoder"].batch()
    adapter = convlora.adapter(model)
    whole = nn.ModuleDict({"net": CASES["encoder"].base()})
    convlora.load(whole, adapter)
    assert torch.equal(output(whole["net"], x), output(model, x))
    state = {f"net.{key}": value for key, value in CASES["encoder"].base().state_dict().items()}
    renamed = adapter.rename({"": "net"})
    assert all(layer.spec.in_parent == path.endswith("in_proj") for path, layer in renamed.layers.items())
    merged = renamed.apply_to(state)
    assert same({key.removeprefix("net."): value for key, value in merged.items()}, convlora.merged_state_dict(model))
    with pytest.raises(ConvLoRAError, match="it fits by rename"):
        adapter.apply_to(state)


def test_strengths_by_layer_reach_projections() -> None:
    model = trained("batch first", bias=False)
    convlora.activate(model, {"default": {"*": 1.0, "in_proj": 0.5}})
    expected = convlora.adapter(model).apply_to(CASES["batch first"].base().state_dict(), {"attn.in_proj": 0.5})
    assert same(convlora.merged_state_dict(model), expected)
    assert all(torch.equal(value, expected[key]) for key, value in effective(model).items())
