"""Every architecture of spandrel, adapted on all its layers: the laws that hold for one layer hold for whole nets."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zoo
from oracle import PRODUCTS, bits, randomise
from torch import Tensor, nn

import convlora
from convlora.layer.adapted import Adapted, slot_of
from convlora.model.traversal import adapted_layers
from convlora.support.patterns import pattern_matches
from convlora.targets import named_layers

pytest.importorskip("spandrel")

each = pytest.mark.parametrize("name", zoo.ARCHITECTURES)
several = pytest.mark.parametrize("factors", [*PRODUCTS, "dora"])  # which sees the weight, however it is made
pytestmark = [
    # Every layer is adapted, depthwise ones with few weights included.
    pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),  # third-party networks call it the old way
    pytest.mark.filterwarnings("ignore:'saved_variables' is deprecated:DeprecationWarning"),  # likewise
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """All outputs in eval, then in train mode. Buffers, the adapters' copies too, come back as they were."""
    buffers = copy.deepcopy(dict(model.named_buffers()))
    found = []
    with torch.no_grad():
        for training in (False, True):
            found += zoo.run(model.train(training), inputs)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    assert found
    assert all(bool(output.isfinite().all()) for output in found)
    return found


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bitwise."""
    return len(left) == len(right) and all(map(torch.equal, left, right))


def named(patterns: tuple[str, ...], names: list[str]) -> set[str]:
    """The names that patterns select; each pattern selects one at least."""
    hits = {pattern: {name for name in names if pattern_matches(pattern, name)} for pattern in patterns}
    assert all(hits.values())
    return set().union(*hits.values())


def backward(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """One training forward against random targets, and its gradients."""
    loss = sum((output - torch.randn_like(output)).square().mean() for output in zoo.run(model.train(), inputs))
    assert isinstance(loss, Tensor)
    loss.backward()


def test_every_architecture_has_a_case_or_a_reason() -> None:
    cases = {name.split("/")[0] for name in zoo.ARCHITECTURES}
    assert cases | set(zoo.LEFT_OUT) == zoo.shipped()
    assert not cases & set(zoo.LEFT_OUT)


@each
def test_every_layer_of_an_adaptable_class_is_adapted(name: str) -> None:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
    base, _ = zoo.build(name)
    expected = [
        path for path, module in named_layers(base) if isinstance(module, kinds)
    ]  # with attention's projections
    present = [kind for kind in kinds if any(isinstance(module, kind) for module in base.modules())]
    assert sorted(adapted_layers(zoo.inject(base, targets=present))) == sorted(expected)


@each
@several
def test_injecting_keeps_the_output_bitwise_in_train_and_eval(name: str, factors: str) -> None:
    base, inputs = zoo.build(name)
    model, _ = zoo.adapted(name, factors=factors)
    assert same(outputs(model, inputs), outputs(base, inputs))


@each
@several
def test_a_training_step_moves_the_adapters_only(name: str, factors: str) -> None:
    model, inputs = zoo.adapted(name, factors=factors)
    ours = {id(p) for p in convlora.parameters(model)}
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    optimizer = torch.optim.SGD(convlora.parameters(model), lr=0.1)
    backward(model, inputs)
    optimizer.step()
    moved = {key for key, tensor in tensors.items() if not torch.equal(tensor, before[key])}
    assert not [key for key in moved if id(tensors[key]) not in ours and ".convlora." not in key]
    assert convlora.changed(model) == []
    assert not [key for key, p in model.named_parameters() if id(p) not in ours and p.grad is not None]
    layers = adapted_layers(model)
    trained = [path for path in layers if f"{path}.convlora.default.lora_B" in moved]
    assert len(trained) > len(layers) / 2  # the tiny sizes alone leave some layers without influence


@each
@several
def test_file_merge_and_removal_keep_the_adapted_output_bitwise(name: str, factors: str, tmp_path: Path) -> None:
    base, inputs = zoo.build(name)
    model = randomise(zoo.adapted(name, factors=factors)[0], std=0.1)
    expected = outputs(model, inputs)
    assert not same(expected, outputs(base, inputs))

    convlora.save(model, tmp_path / "adapter.safetensors")
    second = convlora.load(zoo.build(name)[0], tmp_path / "adapter.safetensors")
    assert same(outputs(second, inputs), expected)
    assert convlora.changed(model) == convlora.changed(second) == []

    merged = convlora.merge(second)
    assert same(outputs(merged, inputs), expected)

    plain = convlora.remove(merged)
    assert [type(module) for module in plain.modules()] == [type(module) for module in base.modules()]
    assert list(plain.state_dict()) == list(base.state_dict())
    assert same(outputs(plain, inputs), expected)


@each
@several
def test_removal_restores_the_base_bitwise(name: str, factors: str) -> None:
    model, inputs = zoo.build(name)
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    base = copy.deepcopy(model)
    state, identities = bits(model), [id(p) for p in model.parameters()]
    randomise(zoo.inject(model, exclude=zoo.ARCHITECTURES[name].overwritten, factors=factors), std=0.1)
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".convlora." not in key)
    convlora.unmerge(convlora.merge(model))
    convlora.remove(model)
    assert bits(model) == state
    assert [id(p) for p in model.parameters()] == identities
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert same(outputs(model, inputs), outputs(base, inputs))


@each
def test_audit_names_the_layers_that_a_network_bypasses(name: str) -> None:
    case = zoo.ARCHITECTURES[name]
    base, inputs = zoo.build(name)
    model = zoo.inject(base)
    layers = list(adapted_layers(model))
    state = bits(model)
    report = {entry.name: entry for entry in convlora.audit(model, *(x.clone() for x in inputs)).layers}
    assert bits(model) == state

    overwritten, unread = named(case.overwritten, layers), named(case.unread, layers)
    assert {path for path in layers if report[path].overwritten} == overwritten
    assert {path for path in layers if not (report[path].read_in_train or report[path].read_in_eval)} == unread
    one_mode = {path for path in layers if report[path].read_in_train != report[path].read_in_eval} - overwritten
    assert one_mode <= named(case.sparse, layers)
    assert bool(one_mode) == bool(case.sparse)

    backward(model, inputs)  # what is not read gets no gradient, and the other way round
    idle = {path for path, layer in adapted_layers(model).items() if not has_gradient(layer)}
    assert idle == unread | overwritten | named(case.discarded, layers)
    assert {path for path in layers if not report[path].trains} == idle
    mute = {path for path in layers if not (report[path].acts_in_train or report[path].acts_in_eval)} - overwritten
    assert mute == unread | named(case.discarded, layers)


def has_gradient(layer: nn.Module) -> bool:
    return all(p.grad is not None for p in slot_of(layer).low_rank("default").parameters())


# --- SPAN in its train form -------------------------------------------------------------------------------------


def span() -> nn.Module:
    """SPAN with 26 channels, ×4: 102 convolutions, of which 20 are fused anew at every eval forward."""
    from spandrel.architectures.SPAN import SPAN

    torch.manual_seed(0)
    return SPAN(num_in_ch=3, num_out_ch=3, feature_channels=26, upscale=4, img_range=1.0)


@several
def test_audit_of_span_names_exactly_its_twenty_eval_convs(factors: str) -> None:
    model = convlora.inject(span(), targets=nn.Conv2d, rank=4, factors=factors)
    report = convlora.audit(model, torch.rand(1, 3, 8, 8))
    expected = [name for name, _ in span().named_modules() if name.endswith("eval_conv")]
    assert len(report.layers) == 102
    assert len(expected) == 20
    assert list(report.problems) == expected
    assert all("exclude it" in problem for problem in report.problems.values())


@several
def test_span_agrees_in_train_and_eval_mode_with_random_adapters(factors: str) -> None:
    base, x = span().double(), torch.rand(1, 3, 12, 12, dtype=torch.float64)
    model = convlora.inject(copy.deepcopy(base), targets=nn.Conv2d, exclude="eval_conv", rank=4, factors=factors)
    randomise(model, std=0.1)
    with torch.no_grad():
        trained, evaluated = model.train()(x), model.eval()(x)
        assert torch.allclose(trained, evaluated, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(evaluated, base.eval()(x), rtol=1e-2, atol=1e-2)
    assert sum(isinstance(module, Adapted) for module in model.modules()) == 82
