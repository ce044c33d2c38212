"""Two processes on the CPU, DDP and FSDP2: gradients, files, resuming, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import zoo
from oracle import NET_INPUT, TORCH, adapted_net, net, randomise
from processes import in_processes
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard

import convlora
from convlora.adapter import file as adapter_file
from convlora.layer import forms

pytestmark = [
    pytest.mark.skipif(TORCH < (2, 7), reason="there fully_shard cannot run on the CPU"),
    pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),  # third-party networks call it the old way
]
NETS = ("net", "thin", "dora", *(["SwinIR"] if importlib.util.find_spec("spandrel") else []))
SHARDINGS = ("whole", "layers")  # fully_shard on the model alone, or on its layers first
STEPS = 4


def made(name: str) -> tuple[nn.Module, Tensor]:
    """An adapted network and a batch of two, the same in every process."""
    torch.manual_seed(0)
    if name != "SwinIR":
        factors = {"thin": "locon", "dora": "dora"}.get(name, "convlora")
        model, shape = adapted_net(bias=True, rank=2, factors=factors), NET_INPUT
    else:
        model, shape = randomise(zoo.adapted(name)[0], std=0.05), (2, 3, 16, 16)
    return model.eval(), torch.rand(shape, generator=torch.Generator().manual_seed(1))


def shard(model: nn.Module, sharding: str) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (2,))
    if sharding == "layers":
        for child in model.children():
            if any(True for _ in child.parameters()) and not isinstance(child, nn.ModuleList):
                fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if TORCH == (2, 8):  # there the mean over processes on the CPU is their sum
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model


def gradients(model: nn.Module, x: Tensor, name: str) -> list[Tensor]:
    thin = (
        {"LEAST_WORK": 0, "LARGEST_SHARE": 2, "HEAVY": 10**6, "WIDE": 10**6}
        if name == "thin"
        else {"HEAVY": forms.HEAVY}
    )
    with patch.multiple(forms, **thin):
        model(x).square().mean().backward()
    found = [p.grad for p in convlora.parameters(model)]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


# --- in each process -----------------------------------------------------------------------------------------------


def _of_each(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in NETS:
        model, x = made(name)
        found[f"gradients ddp {name}"] = gradients(nn.parallel.DistributedDataParallel(model), x[rank : rank + 1], name)
        for sharding in SHARDINGS:
            model, x = made(name)
            found[f"gradients {sharding} {name}"] = gradients(shard(model, sharding), x[rank : rank + 1], name)
    found["written"] = _written(folder)
    found["messages"] = _messages(rank, folder)
    found["refused"] = _refused()
    found["outputs"] = _outputs(folder)
    found["checkpoints"] = _checkpoints()
    for kind in ("ddp", "fsdp"):
        found[f"trained {kind}"] = _train(rank, kind, folder, 0, STEPS)
        _train(rank, kind, folder, 0, STEPS // 2)
    return found


def _written(folder: str) -> list[tuple[str, bool]]:
    """The files that this process writes, and for all saves of sharded models whether the file is there at once."""
    written, original = [], adapter_file.write_atomically

    def write(path: str, data: bytes) -> None:
        original(path, data)
        written.append(Path(path).stem)

    adapter_file.write_atomically = write
    model, x = made("net")
    convlora.save(nn.parallel.DistributedDataParallel(model), f"{folder}/ddp.safetensors")
    for sharding in SHARDINGS:
        model, x = made("net")
        shard(model, sharding)
        for state in ("sharded", "gathered"):
            convlora.save(model, f"{folder}/{sharding}-{state}.safetensors")
            assert Path(f"{folder}/{sharding}-{state}.safetensors").exists()
            model(x)  # without a backward the root's parameters stay gathered
    adapter_file.write_atomically = original
    return written


def _message(call: Callable[[], object]) -> str:
    with pytest.raises(convlora.ConvLoRAError) as raised:
        call()
    return str(raised.value)


def _messages(rank: int, folder: str) -> list[str]:
    """What each process says when only the other one fails."""
    model = shard(made("net")[0], "whole")
    return [
        _message(lambda: convlora.save(model, f"{folder}/none/a.safetensors")),
        _message(lambda: convlora.load(model, f"{folder}/{'other' if rank == 0 else 'none'}.safetensors")),
    ]


def _refused() -> dict[str, str]:
    plain, (model, x) = net(), made("net")
    taken = convlora.adapter(model)
    cpu = torch.device("cpu")
    replica = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    flat = FullyShardedDataParallel(copy.deepcopy(plain), device_id=cpu, use_orig_params=False)
    adapted = copy.deepcopy(model)
    shard(model, "whole")
    for network in (model, shard(plain, "whole")):
        network.eval()(x)  # gathered now: no DTensor is left to see
    return {
        "inject ddp": _message(lambda: convlora.inject(replica, "0", rank=1)),
        "inject fsdp2": _message(lambda: convlora.inject(plain, "0", rank=1)),
        "inject fsdp2 part": _message(lambda: convlora.inject(plain[0], "*", rank=1)),
        "inject fsdp1": _message(lambda: convlora.inject(flat, "0", rank=1)),
        "inject fsdp1 part": _message(lambda: convlora.inject(flat.module, "0", rank=1)),
        "fsdp1": _message(
            lambda: FullyShardedDataParallel(adapted, device_id=torch.device("cpu"), use_orig_params=True)
        ),
        "load part": _message(lambda: convlora.load(model[0], taken)),
        "remove": _message(lambda: convlora.remove(model)),
        "merge": _message(lambda: convlora.merge(model)),
        "audit": _message(lambda: convlora.audit(model, x)),
        "load new": _message(lambda: convlora.load(model, taken, name="b")),
        "allocate_ranks": _message(
            lambda: convlora.allocate_ranks(plain, "0", budget=99, batches=[x], loss=lambda m, b: m(b).mean())
        ),
    }


def _outputs(folder: str) -> list[Tensor]:
    """After a hot swap, with the parameters in shards and gathered; then after a step of training."""
    outputs = []
    for sharding in SHARDINGS:
        model, x = made("net")
        shard(model, sharding)
        for file in ("other", "third"):
            convlora.load(model, f"{folder}/{file}.safetensors")
            outputs.append(model(x).detach())
        convlora.activate(model, {"default": 0.5})
        outputs.append(model(x).detach())
    return outputs


def _checkpoints() -> tuple[Tensor, Tensor, str]:
    """Output of a model and of one that its full checkpoint was loaded into; what one of another scale says."""
    options = dcp.StateDictOptions(full_state_dict=True)
    model, x = made("net")
    state = dcp.get_model_state_dict(shard(model, "layers"), options=options)
    same, other = (adapted_net(bias=True, rank=2, alpha=alpha).eval() for alpha in (2, 8))
    dcp.set_model_state_dict(shard(same, "whole"), copy.copy(state), options=options)
    with pytest.raises(RuntimeError) as raised:
        dcp.set_model_state_dict(shard(other, "whole"), copy.copy(state), options=options)
    return model(x).detach(), same(x).detach(), str(raised.value)


def _train(rank: int, kind: str, folder: str, first: int, last: int) -> dict[str, Tensor]:
    """Steps `first` to `last` with random dropping of rank components; the files of step `first` are all it knows."""
    model, _ = made("net")
    convlora.remove(model)
    convlora.inject(model, "*", rank=2, rank_dropout=0.5)
    if first:
        randomise(model)
        convlora.load(model, f"{folder}/{kind}-run.safetensors")
    parallel = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else shard(model, "layers")
    optimizer = torch.optim.AdamW(convlora.parameters(parallel), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    torch.manual_seed(100 + rank)
    if first:
        torch.manual_seed(7)  # another state, unless it is restored
        state = torch.load(f"{folder}/{kind}-run.pt")
        dcp.set_optimizer_state_dict(parallel, optimizer, state["optimizer"], options=options)
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(torch.load(f"{folder}/{kind}-run-{rank}.pt"))
    for step in range(first, last):
        x = torch.rand(NET_INPUT, generator=torch.Generator().manual_seed(2 * step + rank))
        optimizer.zero_grad()
        (parallel.train()(x) - 1).square().mean().backward()
        optimizer.step()
        scheduler.step()
    torch.save(torch.get_rng_state(), f"{folder}/{kind}-run-{rank}.pt")
    state = {
        "optimizer": dcp.get_optimizer_state_dict(parallel, optimizer, options=options),
        "scheduler": scheduler.state_dict(),
    }
    if rank == 0:
        torch.save(state, f"{folder}/{kind}-run.pt")
    convlora.save(parallel, f"{folder}/{kind}-run.safetensors")
    layers = convlora.adapter(parallel).layers
    dist.barrier()
    return {f"{path}.{name}": t for path, layer in layers.items() for name, t in layer.tensors.items()}


def _resume(rank: int, folder: str) -> dict[str, dict[str, Tensor]]:
    return {kind: _train(rank, kind, folder, STEPS // 2, STEPS) for kind in ("ddp", "fsdp")}


# --- the laws ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes found, all in one start."""
    model, _ = made("net")
    torch.manual_seed(1)
    convlora.save(randomise(model), folder / "other.safetensors")
    torch.manual_seed(0)  # the same base, a lower rank
    convlora.save(adapted_net(bias=True, alpha=3), folder / "third.safetensors")
    return in_processes(folder, _of_each, str(folder))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("way", ["ddp", *SHARDINGS])
def test_gradients_are_those_of_one_process_on_the_joined_batch(two: list[dict[str, Any]], way: str, name: str) -> None:
    expected = gradients(*made(name), name)
    for found in two:
        for got, wanted in zip(found[f"gradients {way} {name}"], expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


def test_only_the_first_process_writes(two: list[dict[str, Any]]) -> None:
    saved = ["ddp", *(f"{sharding}-{state}" for sharding in SHARDINGS for state in ("sharded", "gathered"))]
    assert [found["written"] for found in two] == [saved, []]


def test_files_are_those_of_one_process_byte_for_byte(two: list[dict[str, Any]], folder: Path) -> None:
    convlora.save(made("net")[0], folder / "plain.safetensors")
    expected = (folder / "plain.safetensors").read_bytes()
    for file in two[0]["written"]:
        assert (folder / f"{file}.safetensors").read_bytes() == expected, file


def test_a_failure_in_one_process_is_raised_in_all(two: list[dict[str, Any]]) -> None:
    for found in two:
        unwritable, unreadable = found["messages"]
        assert "write: " in unwritable
        assert "none.safetensors' cannot be read" in unreadable


def test_injecting_after_wrapping_and_other_changes_are_refused(two: list[dict[str, Any]]) -> None:
    refused = two[0]["refused"]
    assert "wrapped in DistributedDataParallel; inject before wrapping" in refused.pop("inject ddp")
    assert "wrapped in FullyShardedDataParallel; inject before wrapping" in refused.pop("inject fsdp1")
    assert "shard by fully_shard (FSDP2)" in refused.pop("fsdp1")
    assert "give the whole model" in refused.pop("load part")
    for call, message in refused.items():
        operation = call.split()[0]
        assert message == f"{operation}: the model is sharded (FSDP or DTensor); {operation} before sharding", call


def test_load_swaps_the_adapter_of_a_sharded_model(two: list[dict[str, Any]], folder: Path) -> None:
    model, x = made("net")
    expected = []
    for file in ("other", "third"):
        expected.append(convlora.load(model, folder / f"{file}.safetensors")(x))
    expected.append(convlora.activate(model, {"default": 0.5})(x))
    assert not torch.equal(expected[0], expected[1])
    for found in two:
        for got, wanted in zip(found["outputs"], expected * len(SHARDINGS), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_a_full_checkpoint_of_a_sharded_model_states_its_scale(two: list[dict[str, Any]]) -> None:
    for found in two:
        saved, loaded, message = found["checkpoints"]
        torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
        assert "0.convlora.default: the checkpoint's adapter has scale 1, the model's 4" in message


def test_a_resumed_run_continues_bitwise(two: list[dict[str, Any]], folder: Path) -> None:
    resumed = in_processes(folder, _resume, str(folder))
    for found, again in zip(two, resumed, strict=True):
        for kind in ("ddp", "fsdp"):
            whole = found[f"trained {kind}"]
            assert whole.keys() == again[kind].keys()
            assert all(torch.equal(tensor, again[kind][name]) for name, tensor in whole.items()), kind
    for ddp, fsdp in zip(two[0]["trained ddp"].values(), two[0]["trained fsdp"].values(), strict=True):
        torch.testing.assert_close(ddp, fsdp, rtol=1e-3, atol=1e-4)
