"""A trainer of BasicSR's kind: `net_g` and `net_g_ema`, wrapped by `model_to_device`, saved as `params`, `params_ema`.

The recipe is that of docs/trainers.md: inject before wrapping; average a copy of the injected network; save merged
networks, which anybody's code reads, and adapters beside them, from which a run is resumed. The trap is an average that
was built plain: there is nothing in it that could be averaged but the frozen base.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import convlora
from convlora import ConvLoRAError, ConvLoRAWarning
from convlora.integrations.averages import take_base

DECAY = 0.9


def build_network() -> nn.Module:
    torch.manual_seed(1)
    body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU())
    return nn.Sequential(OrderedDict(body=body, conv_last=nn.Conv2d(16, 3, 3, padding=1)))


class Trainer:
    """What BasicSR's `SRModel` does, with its names: full fine-tuning; `Adapting` has the recipe's changes."""

    def __init__(self, opt: dict[str, Any]) -> None:
        self.opt = opt
        self.net_g = self.model_to_device(self.load_network(build_network(), opt["pretrain_network_g"]))
        self.net_g_ema = self.build_average()
        self.optimizer_g = torch.optim.Adam([p for p in self.net_g.parameters() if p.requires_grad], lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer_g, [3], 0.5)
        self.iteration = 0
        if opt.get("resume_state"):
            self.resume_training(torch.load(opt["resume_state"], weights_only=True))

    def model_to_device(self, net: nn.Module) -> nn.Module:
        return DistributedDataParallel(net, find_unused_parameters=False)

    def build_average(self) -> nn.Module:
        return self.load_network(build_network(), self.opt["pretrain_network_g"]).eval()

    def get_bare_model(self, net: nn.Module) -> nn.Module:
        return net.module if isinstance(net, DistributedDataParallel) else net

    def load_network(self, net: nn.Module, path: Path) -> nn.Module:
        net.load_state_dict(torch.load(path, weights_only=True)["params"], strict=True)
        return net

    def step(self) -> None:
        generator = torch.Generator().manual_seed(self.iteration)
        lq = torch.rand(2, 3, 8, 8, generator=generator)
        self.optimizer_g.zero_grad()
        (self.net_g(lq) - lq.flip(1)).abs().mean().backward()
        self.optimizer_g.step()
        self.scheduler.step()
        self.model_ema(DECAY)
        self.iteration += 1

    def model_ema(self, decay: float) -> None:
        net_g_params = dict(self.get_bare_model(self.net_g).named_parameters())
        for name, average in self.net_g_ema.named_parameters():
            average.data.mul_(decay).add_(net_g_params[name].data, alpha=1 - decay)

    def save_network(self) -> None:
        states = {"params": self.get_bare_model(self.net_g).state_dict(), "params_ema": self.net_g_ema.state_dict()}
        torch.save(states, self.file("net_g", "pth"))

    def save_training_state(self) -> None:
        state = {
            "iter": self.iteration,
            "optimizers": [self.optimizer_g.state_dict()],
            "schedulers": [self.scheduler.state_dict()],
        }
        torch.save(state, self.file("training", "state"))

    def resume_training(self, state: dict[str, Any]) -> None:
        self.iteration = state["iter"]
        self.optimizer_g.load_state_dict(state["optimizers"][0])
        self.scheduler.load_state_dict(state["schedulers"][0])

    def file(self, stem: str, kind: str) -> Path:
        return Path(self.opt["folder"], f"{stem}_{self.iteration}.{kind}")

    def run(self, steps: int) -> Trainer:
        for _ in range(steps):
            self.step()
        self.save_network()
        self.save_training_state()
        return self


class Adapting(Trainer):
    def model_to_device(self, net: nn.Module) -> nn.Module:
        if self.opt.get("resume_adapter"):
            convlora.load(net, self.opt["resume_adapter"])
        else:
            convlora.inject(net, ["body.*", "conv_last"], rank=2, factors="locon")
        return super().model_to_device(net)

    def build_average(self) -> nn.Module:
        average = copy.deepcopy(self.get_bare_model(self.net_g)).eval().requires_grad_(False)
        return convlora.load(average, self.opt["resume_average"]) if self.opt.get("resume_average") else average

    def save_network(self) -> None:
        net_g = self.get_bare_model(self.net_g)
        take_base(self.net_g_ema, net_g)
        states = {"params": convlora.merged_state_dict(net_g), "params_ema": convlora.merged_state_dict(self.net_g_ema)}
        torch.save(states, self.file("net_g", "pth"))
        convlora.save(net_g, self.file("adapter", "safetensors"))
        convlora.save(self.net_g_ema, self.file("adapter_ema", "safetensors"))


class AveragingAPlainNetwork(Adapting):
    """The trap: BasicSR's own average, beside an injected network."""

    build_average = Trainer.build_average


@pytest.fixture(autouse=True, scope="module")
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    dist.destroy_process_group()


@pytest.fixture
def opt(tmp_path: Path) -> dict[str, Any]:
    torch.save({"params": build_network().state_dict()}, tmp_path / "base.pth")
    return {"pretrain_network_g": tmp_path / "base.pth", "folder": tmp_path}


def output(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(9)))  # type: ignore[no-any-return]


def read(path: Path, key: str) -> nn.Module:
    """As anybody's inference code does: a plain network, strict."""
    net = build_network()
    net.load_state_dict(torch.load(path, weights_only=True)[key], strict=True)
    return net


def test_exactly_the_adapter_is_trained_and_averaged(opt: dict[str, Any]) -> None:
    trainer = Adapting(opt).run(4)
    for net in (trainer.get_bare_model(trainer.net_g), trainer.net_g_ema):
        state = net.state_dict()
        assert all(torch.equal(state[key], value) for key, value in build_network().state_dict().items())
        assert convlora.changed(net) == []
        assert all(p.any() for name, p in net.named_parameters() if ".convlora." in name)


def test_the_merged_networks_are_read_strictly_and_give_the_trained_output(opt: dict[str, Any]) -> None:
    trainer = Adapting(opt).run(4)
    file = trainer.file("net_g", "pth")
    trained, average = output(trainer.get_bare_model(trainer.net_g)), output(trainer.net_g_ema)
    assert torch.equal(output(read(file, "params")), trained)
    assert torch.equal(output(read(file, "params_ema")), average)
    base = output(build_network())
    assert (trained - base).abs().max() > (average - base).abs().max() > 1e-3


def test_resuming_gives_the_bits_of_a_run_without_a_break(opt: dict[str, Any]) -> None:
    whole = Adapting(opt).run(5)
    first = Adapting(opt).run(2)
    resume = {
        "resume_state": first.file("training", "state"),
        "resume_adapter": first.file("adapter", "safetensors"),
        "resume_average": first.file("adapter_ema", "safetensors"),
    }
    resumed = Adapting({**opt, **resume}).run(3)
    assert resumed.iteration == whole.iteration
    for again, net in ((resumed.net_g, whole.net_g), (resumed.net_g_ema, whole.net_g_ema)):
        for key, value in net.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key


def test_the_files_of_the_average_belong_to_the_base(opt: dict[str, Any]) -> None:
    """An average over all names rounds the frozen base, which is told; `take_base` undoes it before it is written."""
    trainer = Adapting(opt)
    for _ in range(4):
        trainer.step()
    assert convlora.changed(trainer.net_g_ema) == list(build_network().state_dict())
    with pytest.warns(ConvLoRAWarning, match="6 Parameters or buffers outside the adapter have changed"):
        convlora.save(trainer.net_g_ema, trainer.file("drifted", "safetensors"))
    trainer.save_network()
    assert convlora.changed(trainer.net_g_ema) == []
    loaded = convlora.load(build_network(), trainer.file("adapter_ema", "safetensors"))
    assert torch.equal(output(loaded), output(trainer.net_g_ema))
    drifted = convlora.load(build_network(), trainer.file("drifted", "safetensors"))  # within rounding: no alarm
    torch.testing.assert_close(output(drifted), output(trainer.net_g_ema))


def test_an_average_that_was_built_plain_stays_the_base_and_is_refused_when_it_is_saved(opt: dict[str, Any]) -> None:
    trainer = AveragingAPlainNetwork(opt)
    for _ in range(4):
        trainer.step()
    assert convlora.adapters(trainer.net_g_ema) == {}
    torch.testing.assert_close(output(trainer.net_g_ema), output(build_network()))
    with pytest.raises(ConvLoRAError, match="merged_state_dict: the model has no adapters"):
        convlora.merged_state_dict(trainer.net_g_ema)
    with pytest.raises(ConvLoRAError, match="the model has no adapters; inject or load one first"):
        convlora.save(trainer.net_g_ema, trainer.file("average", "safetensors"))


def test_injecting_after_wrapping_is_refused(opt: dict[str, Any]) -> None:
    with pytest.raises(ConvLoRAError, match="wrapped in DistributedDataParallel; inject before wrapping"):
        convlora.inject(Trainer(opt).net_g, "body.*", rank=1)


def test_a_trainer_that_unfreezes_everything_is_told(opt: dict[str, Any]) -> None:
    trainer = Adapting(opt)
    net_g = trainer.get_bare_model(trainer.net_g).requires_grad_(True)
    with pytest.warns(
        ConvLoRAWarning, match="6 Parameters or buffers outside the adapter have changed since inject, or train"
    ):
        convlora.merged_state_dict(net_g)
    assert convlora.changed(convlora.freeze(net_g)) == []
