"""PyTorch's own machinery on adapted models: compile, export, tracing, functional transforms, autocast and so on."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import FACTORS, NET_INPUT, NET_LAYERS, TORCH, adapted_net, net, randomise
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import convlora


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # of PyTorch's compiler itself, on this PyTorch and this machine
        for message in (
            ".*grad attribute of a Tensor.*",
            ".*isinstance.treespec, LeafSpec.*",
            ".*CUDA.*",
            ".*torch.jit.*",
            ".*deprecated.*",
            *([".*get_attr.*"] if TORCH < (2, 8) else []),
        ):
            warnings.filterwarnings("ignore", message)
        yield


def x() -> Tensor:
    return torch.randn(NET_INPUT, generator=torch.Generator().manual_seed(1))


State = Callable[[nn.Module], nn.Module]
STATES: dict[str, State] = {
    "active": lambda model: model,
    "merged": convlora.merge,
    "off": lambda model: convlora.activate(model, []),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("factors", FACTORS)
def test_compiles_as_one_graph(factors: str, state: str) -> None:
    model = STATES[state](adapted_net(factors=factors, bias=True).eval())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x()), model(x()))
    if state == "active":
        compiled(x()).sum().backward()
        ours = [p.grad.clone() for p in convlora.parameters(model) if p.grad is not None]
        model.zero_grad()
        model(x()).sum().backward()
        for mine, p in zip(ours, convlora.parameters(model), strict=True):
            torch.testing.assert_close(mine, p.grad)


@pytest.mark.parametrize("factors", ["convlora", "dora", "loha", "lokr"])
def test_compiles_with_inductor(factors: str) -> None:
    model = adapted_net(factors=factors).eval()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x()), model(x()), rtol=1e-4, atol=1e-4)


def count_compilations(model: nn.Module) -> tuple[Callable[..., Tensor], list[int]]:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        graphs.append(1)
        return graph.forward

    return torch.compile(model, backend=backend, fullgraph=True), graphs


def test_hot_swap_and_strengths_recompile_nothing() -> None:
    model = adapted_net(alpha=1).eval()
    other = randomise(copy.deepcopy(model))
    compiled, graphs = count_compilations(model)
    compiled(x())
    assert len(graphs) == 1
    convlora.load(model, convlora.adapter(other))
    assert torch.equal(compiled(x()), other(x()))
    rescaled = convlora.adapter(convlora.inject(_base_of(model), NET_LAYERS, rank=1, alpha=7))
    convlora.load(model, rescaled)
    compiled(x())
    convlora.activate(model, {"default": 0.3})
    assert torch.equal(compiled(x()), model(x()))
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")
def test_hot_swap_of_lower_ranks_recompiles_nothing() -> None:
    model = adapted_net(rank=4).eval()
    compiled, graphs = count_compilations(model)
    compiled(x())
    for rank, scaling in ((2, "linear"), (1, "sqrt"), (4, "linear")):
        small = randomise(convlora.inject(_base_of(model), NET_LAYERS, rank=rank, alpha=3, rank_scaling=scaling))
        convlora.load(model, convlora.adapter(small))
        torch.testing.assert_close(compiled(x()), small(x()))
    assert len(graphs) == 1


def _base_of(model: nn.Module) -> nn.Module:
    return convlora.remove(convlora.unmerge(copy.deepcopy(model)))


def test_compiled_merged_models_are_never_stale() -> None:
    model = convlora.merge(adapted_net().eval())
    compiled, graphs = count_compilations(model)

    def live() -> Tensor:
        return convlora.unmerge(copy.deepcopy(model))(x())

    torch.testing.assert_close(compiled(x()), live())
    randomise(model)
    torch.testing.assert_close(compiled(x()), live())
    convlora.activate(model, {"default": 0.5})
    torch.testing.assert_close(compiled(x()), live())
    convlora.load(model, convlora.adapter(randomise(convlora.inject(_base_of(model), NET_LAYERS, rank=1))))
    torch.testing.assert_close(compiled(x()), live())
    assert len(graphs) == 1


@pytest.mark.skipif(TORCH < (2, 7), reason="there an export looks at copies of the layers, which are not merged yet")
def test_a_merged_export_has_the_operators_of_the_base() -> None:
    model = convlora.merge(adapted_net(bias=True).eval())

    def operators(module: nn.Module) -> list[str]:
        graph = torch.export.export(module, (x(),)).graph
        return [str(node.target) for node in graph.nodes if node.op == "call_function"]

    assert operators(model) == operators(net().eval())


def test_identical_blocks_share_graphs() -> None:
    blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()) for _ in range(12)])
    convlora.inject(blocks, nn.Conv2d, rank=1)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        graphs.append(1)
        return graph.forward

    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    blocks(torch.randn(1, 8, 6, 6))
    assert len(graphs) <= 2


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("factors", FACTORS)
def test_exports(factors: str, state: str) -> None:
    model = STATES[state](adapted_net(factors=factors, bias=True).eval())
    for strict in (True, False):
        exported = torch.export.export(model, (x(),), strict=strict).module()
        torch.testing.assert_close(exported(x()), model(x()))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("factors", FACTORS)
def test_traces_and_reloads(factors: str, state: str, tmp_path: object) -> None:
    model = STATES[state](adapted_net(factors=factors, bias=True).eval())
    with torch.no_grad():
        traced = torch.jit.trace(model, (x(),))
    traced.save(f"{tmp_path}/traced.pt")
    torch.testing.assert_close(torch.jit.load(f"{tmp_path}/traced.pt")(x()), model(x()))


def test_fx_takes_adapted_layers_for_leaves() -> None:
    model = adapted_net().eval()
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module" and n.target in NET_LAYERS] == NET_LAYERS
    assert torch.equal(traced(x()), model(x()))


def test_functional_call_and_gradients_per_sample() -> None:
    model = adapted_net().eval()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 8

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (sample[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x())
    for i, sample in enumerate(x()):
        model.zero_grad()
        loss(dict(model.named_parameters()), sample).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(per_sample[name][i], p.grad, rtol=1e-4, atol=1e-4)


def test_functional_call_reaches_merged_models() -> None:
    model = convlora.merge(adapted_net().eval())
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters() if name.endswith("lora_B")}
    swapped = torch.func.functional_call(model, doubled, (x(),))
    convlora.activate(model, {"default": 2.0})
    torch.testing.assert_close(swapped, model(x()))


def test_autocast_forms_the_effective_weight_in_float32() -> None:
    model = adapted_net(bias=True).eval()
    expected = [model[int(i)].weight for i in NET_LAYERS]
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x())
        assert all(torch.equal(model[int(i)].weight, w) for i, w in zip(NET_LAYERS, expected, strict=True))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in convlora.parameters(model))
    plain = convlora.remove(convlora.merge(copy.deepcopy(model)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x()), y)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = adapted_net(rank_dropout=0.5, rank=2)
    model[1].eval()
    given = x().requires_grad_()
    grads = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        y = checkpoint(model, given, use_reentrant=reentrant) if wrapped else model(given)
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in convlora.parameters(model) if p.grad is not None])
    assert len(grads[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_averaged_model() -> None:
    model = adapted_net().eval()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    first = [p.detach().clone() for p in convlora.parameters(model)]
    randomise(model)
    averaged.update_parameters(model)
    for mean, a, b in zip(convlora.parameters(averaged.module), first, convlora.parameters(model), strict=True):
        torch.testing.assert_close(mean, (a + b) / 2)
    averaged.eval()(x())


def test_data_parallel_replicas_read_their_own_factors() -> None:
    """What nn.DataParallel makes of a module on each device: parameters become plain attributes."""
    layer = adapted_net(bias=True)[0]
    replicas = {module: module._replicate_for_data_parallel() for module in layer.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, p in module._parameters.items():
            setattr(replica, name, None if p is None else p.detach() + 1)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert torch.equal(replicas[layer](x()), twin(x()))
    assert not torch.equal(twin(x()), layer(x()))


def test_threads_read_merged_weights_together() -> None:
    model = convlora.merge(adapted_net().eval())
    y, outputs = model(x()), []
    convlora.activate(model, "default")  # the fused weights are formed again, by whoever comes first
    threads = [threading.Thread(target=lambda: outputs.append(model(x()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 4
    assert all(torch.equal(output, y) for output in outputs)


def test_attention_reads_adapted_projections() -> None:
    """nn.MultiheadAttention and nn.TransformerEncoderLayer use `.weight` of their Linear layers themselves."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    tokens = torch.randn(2, 5, 8)
    plain = layer(tokens)
    randomise(convlora.inject(layer, ["out_proj", "linear?"], rank=1))
    trained = layer(tokens)
    assert not torch.allclose(trained, plain, atol=1e-2)
    with torch.no_grad():  # the fast path of inference
        torch.testing.assert_close(layer.eval()(tokens), trained)
    torch.testing.assert_close(convlora.remove(convlora.merge(layer))(tokens), trained)


def test_a_base_made_in_inference_mode_can_be_adapted() -> None:
    with torch.inference_mode():
        model = net().eval()
        y = model(x())
        convlora.inject(model, NET_LAYERS, rank=1)
        assert torch.equal(model(x()), y)
        assert torch.equal(convlora.merge(model)(x()), y)
    convlora.activate(model, {"default": 0.5})
    assert convlora.unmerge(model)[0].weight.shape == (8, 3, 3, 3)
