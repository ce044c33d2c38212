"""The verbs on a model."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import FACTORS, NET_INPUT, NET_LAYERS, TORCH, adapted_net, bits, net, randomise, snapshot, stock
from torch import nn

import convlora
from convlora.layer.adapted import slot_of


def some_input() -> torch.Tensor:
    return torch.randn(NET_INPUT, generator=torch.Generator().manual_seed(1))


# --- inject ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("training", [True, False])
def test_injecting_keeps_the_output_bitwise_in_train_and_eval(training: bool, factors: str) -> None:
    model, x = net().train(training), some_input()
    twin = copy.deepcopy(model)
    convlora.inject(model, NET_LAYERS, rank=1, factors=factors)
    assert torch.equal(model(x), twin(x))
    assert all(module.training is training for module in model.modules())


def test_only_the_adapters_train() -> None:
    model = adapted_net()
    base = {key: value.clone() for key, value in model.state_dict().items() if ".convlora." not in key}
    factors = [p.detach().clone() for p in convlora.parameters(model)]
    optimizer = torch.optim.AdamW(convlora.parameters(model), lr=1e-2)
    model.eval()(some_input()).square().mean().backward()
    optimizer.step()
    assert [p for p in model.parameters() if p.requires_grad] == convlora.parameters(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    assert not any(torch.equal(p, q) for p, q in zip(convlora.parameters(model), factors, strict=True))


def test_ranks_and_alphas_by_pattern_the_last_match_wins() -> None:
    model = convlora.inject(
        net(), NET_LAYERS, rank=1, alpha=3, ranks={"*": 2, "3": 1, "4": 0}, alphas={"re:[36]": 5, "6": 8}
    )
    layers = {name: slot_of(model[int(name)]).low_rank("default") for name in ("0", "3", "6")}
    assert {name: (f.rank, f.scale) for name, f in layers.items()} == {"0": (2, 1.5), "3": (1, 5.0), "6": (2, 4.0)}
    assert type(model[4]) is nn.ConvTranspose2d


def test_rank_zero_of_a_layer_that_is_not_selected_means_nothing(tmp_path: Path) -> None:
    ranks = {"0": 2, "3": 0, "re:[46]": 0}
    model = convlora.inject(net(), "0", ranks=ranks, alphas={"0": 6})
    assert list(convlora.adapter(model).layers) == ["0"]
    assert slot_of(model[0]).low_rank("default").scale == 3.0
    convlora.save(model, tmp_path / "a.safetensors")
    loaded = convlora.load(copy.deepcopy(convlora.remove(copy.deepcopy(model))), tmp_path / "a.safetensors")
    assert convlora.adapters(loaded)["default"].ranks == ranks
    again = convlora.inject(net(), config=convlora.adapters(loaded)["default"])
    assert list(convlora.adapter(again).layers) == ["0"]
    narrower = convlora.inject(net(), "*", exclude="4", modules_to_save="6", rank=1, ranks={"4": 0, "6": 0})
    assert list(convlora.adapter(narrower).layers) == ["0", "3"]


@pytest.mark.parametrize("ranks", [{"33": 0}, {"1": 0}, {"3": 1}, {"body.*": 0}])
def test_a_rank_of_no_layer_is_an_error(ranks: dict[str, int]) -> None:
    """There is no such layer, it is a norm, or it is not selected and has a rank."""
    model = net()
    before = snapshot(model)
    with pytest.raises(convlora.ConvLoRAError, match=f"ranks pattern '{re.escape(next(iter(ranks)))}' matches none"):
        convlora.inject(model, "0", ranks=ranks)
    assert snapshot(model) == before


def test_rank_scaling_sqrt() -> None:
    model = convlora.inject(nn.Conv2d(64, 64, 3), "*", rank=4, alpha=6, rank_scaling="sqrt")
    assert slot_of(model).low_rank("default").scale == 3.0


def test_alpha_scales_the_update_linearly() -> None:
    one, two = (convlora.inject(nn.Conv2d(16, 16, 3), "*", rank=2, alpha=alpha) for alpha in (2, 6))
    for mine, theirs in zip(convlora.parameters(two), convlora.parameters(randomise(one)), strict=True):
        mine.data.copy_(theirs)
    torch.testing.assert_close(two.weight - two._parameters["weight"], 3 * (one.weight - one._parameters["weight"]))


def test_bias_delta_acts_and_merges() -> None:
    model = adapted_net(bias=True)
    x, plain = some_input(), [p for p in convlora.parameters(model) if p.dim() == 1]
    assert len(plain) == 4
    y = model.eval()(x)
    with convlora.disabled(model):
        assert not torch.equal(model[0].bias, model[0].bias + plain[0])
    assert torch.equal(model[0].bias, model[0]._parameters["bias"] + plain[0])
    assert torch.equal(convlora.remove(convlora.merge(model))(x), y)


def test_bias_true_passes_over_layers_without_bias() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, bias=False))
    convlora.inject(model, "*", rank=1, bias=True)
    assert [len(slot_of(m).low_rank("default").factors()) for m in model] == [3, 2]


FAILING = {
    "typo": ({"targets": ["0", "nothing"]}, "target 'nothing' selects no layer; 4 can be adapted, nearest: "),
    "typo in regex": ({"targets": "re:("}, "no regular expression"),
    "literal that cannot be adapted": ({"targets": ["1"]}, "names '1': BatchNorm2d is no convolution"),
    "class that selects nothing": ({"targets": [nn.Conv3d]}, "target Conv3d selects no layer"),
    "callable that selects nothing": ({"targets": [lambda name, module: False]}, "selects no layer"),
    "everything excluded": ({"targets": ["0"], "exclude": ["0"]}, "exclude leaves no layer"),
    "ranks pattern": ({"targets": ["0"], "ranks": {"3": 2}}, "ranks pattern '3' matches none of the layers"),
    "alphas pattern": ({"targets": ["0"], "alphas": {"x": 2}}, "alphas pattern 'x' matches none"),
    "all ranks zero": ({"targets": ["0"], "ranks": {"0": 0}}, "every selected layer has rank 0"),
    "negative rank": ({"targets": ["0"], "rank": -1}, r"rank \(=-1\) must be"),
    "fractional rank": ({"targets": ["0"], "rank": 1.5}, r"rank \(=1.5\) must be"),
    "rank by string": ({"targets": ["0"], "ranks": {"0": "4"}}, r"ranks\['0'\] \(='4'\) must be"),
    "infinite alpha": ({"targets": ["0"], "alpha": float("inf")}, r"alpha \(=inf\) must be a finite number"),
    "unknown factors": ({"targets": ["0"], "factors": "nothing"}, "'nothing' is not registered; known: convlora, "),
    "unknown init": ({"targets": ["0"], "init": "pissa"}, "has no init 'pissa'; it has default, gaussian"),
    "unknown scaling": ({"targets": ["0"], "rank_scaling": "cube"}, "rank_scaling"),
    "dropout": ({"targets": ["0"], "rank_dropout": 1.0}, "rank_dropout"),
    "name with a dot": ({"targets": ["0"], "name": "a.b"}, "name"),
    "name of an attribute": ({"targets": ["0"], "name": "forward"}, "name"),
    "no targets": ({"targets": []}, "targets is empty"),
    "targets missing": ({}, "targets is missing"),
    "target of another type": ({"targets": [3]}, "targets"),
    "both config and targets": (
        {"targets": "0", "config": convlora.AdapterConfig(targets="0")},
        "targets or config, not both",
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_failed_inject_changes_nothing(case: str) -> None:
    options, message = FAILING[case]
    for model in (net(), adapted_net(name="other")):
        before, state = snapshot(model), torch.get_rng_state()
        with pytest.raises(convlora.ConvLoRAError, match=message) as caught:
            convlora.inject(model, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert snapshot(model) == before
        assert torch.equal(torch.get_rng_state(), state)


def test_a_name_is_taken_once() -> None:
    model = convlora.inject(net(), "0", rank=1)
    before = snapshot(model)
    with pytest.raises(convlora.ConvLoRAError, match="adapter 'default' is there already"):
        convlora.inject(model, "3", rank=1)
    assert snapshot(model) == before


def test_lazy_layers_and_foreign_attributes_are_refused() -> None:
    with pytest.raises(convlora.ConvLoRAError, match="no shape yet"):
        convlora.inject(nn.Sequential(nn.LazyConv2d(8, 3)), "0")
    layer = nn.Conv2d(8, 8, 3)
    layer.convlora = "mine"
    with pytest.raises(convlora.ConvLoRAError, match="attribute named 'convlora'"):
        convlora.inject(nn.Sequential(layer), "0")


def test_quantised_weights_are_refused() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(convlora.ConvLoRAError, match="int8"):
        convlora.inject(nn.Sequential(layer), "0")


def test_an_adapter_larger_than_its_layer_gets_a_warning() -> None:
    with pytest.warns(convlora.ConvLoRAWarning, match=r"more parameters than the layer itself in 1 of 2 .*first: '1'"):
        convlora.inject(nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=64)), "*", rank=4)


def test_an_exclude_that_matches_nothing_gets_a_warning() -> None:
    with pytest.warns(convlora.ConvLoRAWarning, match="exclude 'eval_conv' matches no layer"):
        convlora.inject(net(), "0", rank=1, exclude=["eval_conv"])


def test_ddp_and_fsdp_models_are_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    store = dist.HashStore()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net())
        for call in (
            lambda: convlora.inject(wrapped, "0", rank=1),
            lambda: convlora.inject(nn.Sequential(wrapped), "*"),
        ):
            with pytest.raises(convlora.ConvLoRAError, match="DistributedDataParallel; inject before wrapping"):
                call()
        sharded = net()
        fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(convlora.ConvLoRAError, match="sharded"):
            convlora.inject(sharded, "0", rank=1)
        # injected first, both work, and the adapter can be taken out of the wrapper
        model = adapted_net()
        model.eval()
        y = model(some_input())
        ddp = nn.parallel.DistributedDataParallel(model)
        assert torch.equal(ddp(some_input()), y)
        ddp(some_input()).sum().backward()
        assert all(p.grad is not None for p in convlora.parameters(ddp))
        assert list(convlora.adapter(ddp).layers) == NET_LAYERS
        if TORCH < (2, 7):  # fully_shard cannot run on the CPU yet
            return
        fsdp = adapted_net()
        fsdp.eval()
        y, values = fsdp(some_input()), [p.detach().clone() for p in convlora.parameters(fsdp)]
        fully_shard(fsdp, mesh=dist.init_device_mesh("cpu", (1,)))
        torch.testing.assert_close(fsdp(some_input()), y)
        fsdp(some_input()).sum().backward()
        assert all(p.grad is not None for p in convlora.parameters(fsdp))
        stored = [t for layer in convlora.adapter(fsdp).layers.values() for t in layer.tensors.values()]
        assert all(torch.equal(a, b) for a, b in zip(stored, values, strict=True))
    finally:
        dist.destroy_process_group()


# --- tied modules, tied weights --------------------------------------------------------------------------------


def test_a_module_at_two_places_gets_one_adapter() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    convlora.inject(model, "2", rank=1)  # the second name finds it, too
    assert len(convlora.parameters(model)) == 2
    assert list(convlora.adapter(model).layers) == ["0"]
    x = torch.randn(1, 4, 6, 6)
    y = randomise(model)(x)
    assert torch.equal(convlora.merge(model)(x), y)
    assert torch.equal(convlora.remove(model)(x), y)
    assert model[0] is model[2]


def test_one_parameter_in_two_layers_stays_tied_and_each_has_its_own_adapter() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3))
    model[1].weight = model[2].weight = model[0].weight
    weight, x = model[0].weight, torch.randn(1, 4, 6, 6)
    randomise(convlora.inject(model, ["0", "1"], rank=1))
    y = model(x)
    assert model[0]._parameters["weight"] is model[1]._parameters["weight"] is weight
    assert torch.equal(convlora.merge(model)(x), y)
    assert torch.equal(convlora.unmerge(model)(x), y)
    assert model[0]._parameters["weight"] is model[1]._parameters["weight"] is weight
    convlora.merge(model)
    with pytest.warns(convlora.ConvLoRAWarning, match="2 shared Parameters were untied"):
        convlora.remove(model)
    assert torch.equal(model(x), y)
    assert model[2].weight is weight


# --- remove ----------------------------------------------------------------------------------------------------


def test_remove_restores_classes_identities_order_and_flags() -> None:
    model = net()
    model[3].weight.requires_grad_(False)
    before = snapshot(model)
    convlora.remove(adapted := randomise(convlora.inject(model, NET_LAYERS, rank=1)))
    assert snapshot(adapted) == before


def test_remove_one_of_two_adapters() -> None:
    model = convlora.inject(convlora.inject(net(), ["0", "3"], rank=1, name="a"), ["3", "4"], rank=1, name="b")
    randomise(model)
    convlora.remove(model, "b")
    assert list(convlora.adapters(model)) == ["a"]
    assert type(model[4]) is nn.ConvTranspose2d
    assert model[4].weight.requires_grad  # a layer left with none is what it was
    assert not model[6].weight.requires_grad  # the rest stays frozen
    convlora.remove(model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(convlora.ConvLoRAError, match="remove: the model has no adapters"):
        convlora.remove(model)


def test_removing_from_a_part_leaves_the_rest_frozen_until_the_whole_is_asked() -> None:
    model = nn.ModuleDict({"body": net(), "head": nn.Linear(5, 5)})
    convlora.inject(model, "body.0", rank=1)
    convlora.remove(model["body"])
    assert all(p.requires_grad for p in model["body"].parameters())
    assert not model["head"].weight.requires_grad
    assert convlora.remove(model)["head"].weight.requires_grad
    with pytest.raises(convlora.ConvLoRAError, match="no adapters"):
        convlora.remove(model)


def test_removed_model_pickles_without_convlora(tmp_path: Path) -> None:
    model = convlora.remove(convlora.merge(adapted_net()))
    torch.save((model.eval(), some_input(), model(some_input())), tmp_path / "model.pt")
    code = f"""
        import sys
        sys.modules["convlora"] = None
        import torch
        model, x, y = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        assert torch.equal(model(x), y)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_whole_injected_model_loads_in_a_fresh_process(tmp_path: Path) -> None:
    model = adapted_net(bias=True).eval()
    torch.save((model, some_input(), model(some_input())), tmp_path / "model.pt")
    code = f"""
        import torch
        model, x, y = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        assert torch.equal(model(x), y)
        import convlora
        assert list(convlora.adapters(model)) == ["default"]
        convlora.remove(model)
        assert type(model[0]) is torch.nn.Conv2d
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_remove_refuses_a_parametrization_put_on_later() -> None:
    model = convlora.activate(convlora.inject(net(), "0", rank=1), [])
    nn.utils.parametrizations.weight_norm(model[0], "bias")
    with pytest.raises(convlora.ConvLoRAError, match="'0' was parametrized after inject"):
        convlora.remove(model)


# --- several adapters ------------------------------------------------------------------------------------------


def two() -> nn.Sequential:
    model = convlora.inject(net(), NET_LAYERS, rank=1, name="a", bias=True)
    return randomise(convlora.inject(model, ["0", "4"], rank=2, alpha=3, name="b", factors="locon")).eval()


strengths = st.dictionaries(st.sampled_from(["a", "b"]), st.floats(-2, 2, width=32))


@given(strengths)
@settings(max_examples=40)
def test_updates_add_up_with_their_strengths(chosen: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = two()
    parts = {name: convlora.adapter(model, name) for name in ("a", "b")}
    convlora.activate(model, chosen)
    for path in NET_LAYERS:
        layer = model.get_submodule(path)
        expected = layer._parameters["weight"] + sum(
            (s * parts[n].delta(path) for n, s in chosen.items() if path in parts[n].layers), torch.zeros(())
        )
        torch.testing.assert_close(layer.weight, expected, rtol=0, atol=1e-5)
        bias = layer._parameters["bias"] + chosen.get("a", 0) * parts["a"].layers[path].tensors["lora_bias"]
        torch.testing.assert_close(layer.bias, bias, rtol=0, atol=1e-6)


def test_another_strength_between_forward_and_backward_changes_no_gradient() -> None:
    model, x = adapted_net(bias=True), some_input()
    single = []
    for strength in (0.5, 2.0):
        convlora.activate(model, {"default": strength})
        single.append(torch.autograd.grad(model(x).square().sum(), convlora.parameters(model)))
    losses = []
    for strength in (0.5, 2.0):
        convlora.activate(model, {"default": strength})
        losses.append(model(x).square().sum())
    both = torch.autograd.grad(sum(losses), convlora.parameters(model))
    for got, *parts in zip(both, *single, strict=True):
        torch.testing.assert_close(got, parts[0] + parts[1])


def test_activate_takes_a_name_a_list_or_strengths() -> None:
    model, x = two(), some_input()
    both = model(x)
    only_a = convlora.activate(model, "a")(x)
    assert torch.equal(convlora.activate(model, ["a"])(x), only_a)
    assert torch.equal(convlora.activate(model, {"a": 1, "b": 0.0})(x), only_a)
    assert torch.equal(convlora.activate(model, ["b", "a"])(x), both)
    convlora.activate(model, [])
    assert torch.equal(model(x), convlora.remove(copy.deepcopy(model))(x))


def test_a_new_adapter_leaves_the_output_and_the_old_one_as_they_are() -> None:
    model, x = adapted_net(name="a").eval(), some_input()
    y = model(x)
    convlora.inject(model, ["3"], rank=2, name="b")
    assert torch.equal(model(x), y)
    assert len(convlora.parameters(model)) == 10
    assert len(convlora.parameters(model, "a")) == 8
    assert convlora.adapters(model)["b"].rank == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [("c", r"no adapter 'c'; the model has \['a', 'b'\]"), ({"a": float("nan")}, "finite"), (3, "expected a name")],
)
def test_failed_activate_changes_nothing(names: object, message: str) -> None:
    model, x = two(), some_input()
    y, before = model(x), snapshot(model)
    with pytest.raises(convlora.ConvLoRAError, match=message):
        convlora.activate(model, names)  # type: ignore[arg-type]
    assert snapshot(model) == before
    assert torch.equal(model(x), y)


def test_disabled_restores_the_former_state_after_an_exception() -> None:
    model, x = convlora.activate(two(), {"a": 0.5}), some_input()
    y = model(x)
    with pytest.raises(KeyError), convlora.disabled(model):
        assert model[0].weight is model[0]._parameters["weight"]
        raise KeyError
    assert torch.equal(model(x), y)


# --- merge -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_a_hundred_times_drifts_nowhere(dtype: torch.dtype) -> None:
    model = adapted_net(bias=True).to(dtype).eval()
    x = some_input().to(dtype)
    y, state = model(x), bits(model)
    for _ in range(100):
        convlora.merge(model)
        convlora.unmerge(model)
    assert bits(model) == state
    assert torch.equal(model(x), y)


def test_state_dict_is_bitwise_the_same_while_merged() -> None:
    model = adapted_net()
    state = bits(model)
    assert bits(convlora.merge(model)) == state
    assert list(convlora.unmerge(model).state_dict()) == list(state)


def test_state_saved_while_merged_reloads_right() -> None:
    model, x = adapted_net().eval(), some_input()
    y = convlora.merge(model)(x)
    fresh = adapted_net().eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), y)


def test_merged_weight_is_never_stale() -> None:
    model, x = convlora.merge(adapted_net(bias=True)).eval(), some_input()

    def live() -> torch.Tensor:
        return convlora.unmerge(copy.deepcopy(model))(x)

    assert torch.equal(model(x), live())
    randomise(model)
    assert torch.equal(model(x), live())
    convlora.activate(model, {"default": 0.3})
    assert torch.equal(model(x), live())
    model.load_state_dict(net().state_dict())
    assert torch.equal(model(x), live())
    model.load_state_dict({k: v + 0.1 * (not k.endswith("scale")) for k, v in model.state_dict().items()}, assign=True)
    assert torch.equal(model(x), live())
    model.double().float()
    assert torch.equal(model(x), live())
    convlora.activate(model, [])
    assert torch.equal(model(x), live())
    model.double()
    convlora.activate(model, "default")
    x = x.double()
    assert torch.equal(model(x), live())


def test_merge_of_named_adapters_is_undone_by_unmerge() -> None:
    model, x = convlora.activate(two(), {"a": 0.5, "b": 2.0}), some_input()
    y = model(x)
    merged = convlora.merge(model, ["b"])(x)
    assert torch.equal(convlora.unmerge(model)(x), y)
    assert torch.equal(convlora.activate(model, "b")(x), merged)


def test_merged_context_restores_the_former_state_after_an_exception() -> None:
    model, x = adapted_net().eval(), some_input()
    y = model(x)
    with pytest.raises(KeyError), convlora.merged(model):
        assert torch.equal(model(x), y)
        assert not model(x).requires_grad
        raise KeyError
    assert model(x).requires_grad
    with convlora.merged(convlora.merge(model)):
        pass
    assert not model(x).requires_grad


def test_merging_non_finite_values_is_refused_and_changes_nothing() -> None:
    model = adapted_net(bias=True)
    with torch.no_grad():
        slot_of(model[3]).low_rank("default").lora_bias.fill_(float("nan"))
    with pytest.raises(convlora.ConvLoRAError, match=r"non-finite values in '3.bias'"):
        convlora.merge(model)
    assert not any(slot_of(model[int(i)]).merged for i in NET_LAYERS)
    convlora.merge(model, check_finite=False)
    large = convlora.inject(nn.Conv2d(64, 64, 3).half(), "*", rank=1)
    with torch.no_grad():
        large._parameters["weight"].fill_(60000.0)
    convlora.merge(large)  # the sum overflows, no value does


def test_rank_dropout_never_gets_into_merged_weights() -> None:
    model = adapted_net(rank=2, rank_dropout=0.9)
    expected = model.eval()[0].weight.detach()
    assert torch.equal(convlora.merge(model.train())[0].weight, expected)
    assert torch.equal(convlora.remove(model)[0].weight, expected)


def test_merge_works_in_inference_mode_and_training_goes_on_after_it() -> None:
    model, x = adapted_net().eval(), some_input()
    y = model(x).detach()
    with torch.inference_mode():
        assert torch.equal(convlora.merge(model)(x), y)
    x.requires_grad_(True)
    model(x).sum().backward()
    assert x.grad is not None
    convlora.unmerge(model)(x).sum().backward()
    assert all(p.grad is not None for p in convlora.parameters(model))


def test_removing_merged_adapters_keeps_parameter_identities_and_earlier_state_dicts() -> None:
    model = adapted_net()
    weight, state = model[0]._parameters["weight"], model.state_dict()
    base = state["0.weight"].clone()
    effective = model[0].weight.detach().clone()
    convlora.remove(convlora.merge(model))
    assert model[0].weight is weight
    assert weight.requires_grad
    assert torch.equal(weight, effective)
    assert torch.equal(state["0.weight"], base)


def test_removing_one_of_several_merged_adapters_is_refused() -> None:
    model = convlora.merge(two())
    before = snapshot(model)
    with pytest.raises(convlora.ConvLoRAError, match="one of several merged adapters"):
        convlora.remove(model, "a")
    with pytest.raises(convlora.ConvLoRAError, match="merged; unmerge it first"):
        convlora.inject(model, "0", rank=1, name="c")
    assert snapshot(model) == before


# --- checkpoints -----------------------------------------------------------------------------------------------


def test_base_keys_are_unchanged_and_base_checkpoints_load_strictly() -> None:
    model, base = adapted_net(), net()
    assert [key for key in model.state_dict() if ".convlora." not in key] == list(base.state_dict())
    factors = [p.detach().clone() for p in convlora.parameters(model)]
    assert model.load_state_dict(base.state_dict(), strict=True).missing_keys == []
    assert all(torch.equal(p, q) for p, q in zip(convlora.parameters(model), factors, strict=True))
    assert torch.equal(stock(model[0]).weight, model[0].weight)


def test_full_checkpoints_load_back_strictly() -> None:
    model, other, x = adapted_net().eval(), adapted_net().eval(), some_input()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))
    assert bits(other) == bits(model)


@pytest.mark.parametrize(
    "lost",
    [
        ["0.convlora.default.lora_A"],
        ["0.convlora.default.lora_A", "0.convlora.default.lora_B"],
        ["6.convlora.default.lora_A", "6.convlora.default.lora_B"],
        [f"{i}.convlora.default.lora_{f}" for i in (0, 3, 4) for f in "AB"],
    ],
)
@pytest.mark.parametrize("plain", [True, False])
def test_half_an_adapter_in_a_checkpoint_is_reported(lost: list[str], plain: bool) -> None:
    model = adapted_net()
    state = model.state_dict()
    for key in lost:
        del state[key]
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        model.load_state_dict(dict(state) if plain else state)
    assert all(key in str(caught.value) for key in lost)
    model.load_state_dict(net().state_dict())  # and the next call starts afresh


def test_an_unknown_adapter_in_a_checkpoint_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"0\.convlora\.other\.lora_A"):
        adapted_net().load_state_dict(adapted_net(name="other").state_dict())


def test_meta_models_materialise_as_new_adapters() -> None:
    base = net()
    with torch.device("meta"):
        model = convlora.inject(net(), NET_LAYERS, rank=1, alpha=3)
    model.to_empty(device="cpu")
    model.load_state_dict(base.state_dict())
    assert torch.equal(model(some_input()), base(some_input()))
    assert all(p.isfinite().all() for p in convlora.parameters(model))
    assert slot_of(model[0]).low_rank("default")._gain.item() == 3


def test_calls_chain_and_take_only_modules() -> None:
    with warnings.catch_warnings():
        model = convlora.activate(convlora.inject(net(), NET_LAYERS, rank=1), "default")
    assert convlora.remove(convlora.unmerge(convlora.merge(model))) is model
    for call in (convlora.remove, convlora.merge, convlora.parameters, convlora.summary, convlora.adapters):
        with pytest.raises(convlora.ConvLoRAError, match=r"expected an nn\.Module, got dict"):
            call({})  # type: ignore[type-var, arg-type]
