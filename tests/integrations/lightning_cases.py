"""`AdapterCheckpoint` in a Lightning trainer: what trains, what checkpoints hold, resuming, and what is left behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import NET_INPUT, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import convlora
from convlora import AdapterConfig, ConvLoRAError

try:
    import lightning.pytorch as lightning
except ImportError as missing:
    try:
        import pytorch_lightning as lightning
    except ImportError:
        pytest.skip(str(missing), allow_module_level=True)

from convlora.integrations.lightning import AdapterCheckpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning"),
]
CONFIG = AdapterConfig(targets="*", exclude="6", rank=1, modules_to_save="6")


class Fitting(lightning.LightningModule):
    """Learns random targets by a network, beside a loss network that stays as it is."""

    def __init__(self, gain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = net()
        self.judge = nn.Conv1d(6, 1, 1).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(())) if gain else None

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        scale = 1 if self.gain is None else self.gain
        return self.judge(self.net(x) * scale - y).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def batches() -> DataLoader[Any]:
    """An epoch of two steps: Lightning resumes between epochs to the bit, inside one it starts over with the data."""
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(4, *NET_INPUT[1:], generator=generator), torch.randn(4, 6, 5, generator=generator))
    return DataLoader(data, batch_size=2)


def fit(folder: Path, steps: int, resume: Path | None = None, **options: Any) -> Fitting:
    """Train up to a step; a checkpoint lies in the folder after every second one."""
    module = options.pop("module", None) or Fitting()
    settings = {"config": CONFIG, "network": "net", "merged": folder / "merged.pth", **options}
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[
            AdapterCheckpoint(**settings),
            lightning.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1),
        ],
    )  # fmt: skip
    torch.manual_seed(10)
    trainer.fit(module, batches(), ckpt_path=resume)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fitting, Path]:
    folder = tmp_path_factory.mktemp("lightning")
    return fit(folder, 4), folder


def test_exactly_the_adapter_is_trained(trained: tuple[Fitting, Path]) -> None:
    module, before = trained[0], Fitting().state_dict()
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert convlora.changed(module.net) == []
    trainable = {id(p) for p in module.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in convlora.parameters(module.net)}
    assert all(p.any() for p in convlora.parameters(module.net))  # B, too, has left zero


def test_a_checkpoint_holds_the_adapter_and_not_the_base(trained: tuple[Fitting, Path]) -> None:
    module, folder = trained
    checkpoint = torch.load(folder / "step=2.ckpt", weights_only=True)
    base = {f"net.{key}" for key in net().state_dict()}
    assert set(checkpoint["state_dict"]) == set(module.state_dict()) - base
    assert {"judge.weight", "net.0.convlora.default.lora_B", "net.6.convlora.default.weight"} <= {
        *checkpoint["state_dict"]
    }
    assert "net.1.convlora.default.running_mean" in checkpoint["state_dict"]
    assert checkpoint["optimizer_states"]
    state = checkpoint["optimizer_states"][0]["state"]
    assert len(state) == len(convlora.parameters(module.net))


def test_resuming_gives_the_bits_of_a_run_without_a_break(trained: tuple[Fitting, Path], tmp_path: Path) -> None:
    half = fit(tmp_path / "first", 2).state_dict()
    resumed = fit(tmp_path / "second", 4, tmp_path / "first" / "step=2.ckpt").state_dict()
    for name, value in trained[0].state_dict().items():
        assert torch.equal(value, resumed[name]), name
    assert not torch.equal(half["net.0.convlora.default.lora_B"], resumed["net.0.convlora.default.lora_B"])


def test_the_file_and_the_merged_checkpoint_give_the_trained_output(trained: tuple[Fitting, Path]) -> None:
    module, folder = trained
    x, live = torch.randn(NET_INPUT), module.net.eval()
    fresh = convlora.load(Fitting().net.eval(), folder / "adapter.safetensors")
    plain = Fitting().net.eval()
    state = torch.load(folder / "merged.pth", weights_only=True)
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(fresh(x), live(x))
        assert torch.equal(plain(x), live(x))
        assert not torch.equal(live(x), Fitting().net.eval()(x))


def test_a_merged_safetensors_file_has_the_same_values(trained: tuple[Fitting, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    fit(tmp_path, 4, merged=tmp_path / "merged.safetensors")
    expected = torch.load(trained[1] / "merged.pth", weights_only=True)
    found = load_file(tmp_path / "merged.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_what_trains_outside_the_adapter_is_in_the_checkpoint(tmp_path: Path) -> None:
    module = Fitting(gain=True)
    convlora.inject(module.net, config=CONFIG)
    module.net[0].bias.requires_grad_(True)
    with pytest.warns(convlora.ConvLoRAWarning, match=r"1 Parameters .* 0\.bias"):
        fit(tmp_path, 2, module=module, config=None)
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["gain"], module.gain)
    assert "net.0.bias" not in state or torch.equal(state["net.0.bias"], module.net[0].bias)
    assert "net.0.weight" not in state


def test_a_checkpoint_of_another_adapter_is_refused(trained: tuple[Fitting, Path], tmp_path: Path) -> None:
    with pytest.raises(ConvLoRAError, match=r"of another adapter: missing: .*fog.*; unexpected: .*default"):
        fit(tmp_path, 4, trained[1] / "step=2.ckpt", config=CONFIG.replace(name="fog"))


def test_a_network_without_adapters_and_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvLoRAError, match="AdapterCheckpoint: the model has no adapters; give config="):
        fit(tmp_path, 1, config=None)


def test_under_ddp_the_adapter_is_there_before_the_module_is_wrapped(tmp_path: Path) -> None:
    wrapped: list[type] = []

    class Watching(Fitting):
        def on_train_start(self) -> None:
            wrapped.append(type(self.trainer.strategy.model))

    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", devices=1, strategy="ddp", logger=False, enable_progress_bar=False,
        default_root_dir=tmp_path, callbacks=[AdapterCheckpoint(CONFIG, network="net", merged=tmp_path / "merged.pth")],
    )  # fmt: skip
    module = Watching()
    try:
        trainer.fit(module, batches())
    finally:
        torch.distributed.destroy_process_group()
    assert wrapped == [nn.parallel.DistributedDataParallel]
    assert all(p.any() for p in convlora.parameters(module.net))
    plain = Fitting().net
    plain.load_state_dict(torch.load(tmp_path / "merged.pth", weights_only=True))
    x = torch.randn(NET_INPUT)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), module.net.eval()(x))


def test_two_networks_of_one_module_have_a_callback_each(tmp_path: Path) -> None:
    class Two(Fitting):
        def __init__(self) -> None:
            super().__init__()
            self.judge.requires_grad_(True)

    def run(folder: Path, steps: int, resume: Path | None = None) -> Fitting:
        module, judge = Two(), AdapterConfig(targets="*", rank=1, name="judge")
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            default_root_dir=folder, callbacks=[
                AdapterCheckpoint(CONFIG, network="net"),
                AdapterCheckpoint(judge, network="judge", adapter=folder / "judge.safetensors"),
                lightning.callbacks.ModelCheckpoint(folder, filename="{step}"),
            ],
        )  # fmt: skip
        trainer.fit(module, batches(), ckpt_path=resume)
        return module

    first = run(tmp_path, 2)
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    assert not {"net.0.weight", "judge.weight"} & state.keys()
    assert torch.equal(state["judge.convlora.judge.lora_B"], first.judge.convlora.judge.lora_B)
    resumed = run(tmp_path / "more", 4, tmp_path / "step=2.ckpt")
    assert not torch.equal(resumed.judge.convlora.judge.lora_B, first.judge.convlora.judge.lora_B)


def test_validation_of_a_checkpoint_uses_the_adapter(trained: tuple[Fitting, Path]) -> None:
    module, folder = trained
    found: list[Tensor] = []

    class Judging(Fitting):
        def test_step(self, batch: list[Tensor]) -> None:
            found.append(self.net(batch[0]))

    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=folder,
        callbacks=[AdapterCheckpoint(CONFIG, network="net")],
    )  # fmt: skip
    trainer.test(Judging(), batches(), ckpt_path=folder / "step=4.ckpt", verbose=False)
    with torch.no_grad():
        for output, (x, _) in zip(found, batches(), strict=True):
            assert torch.equal(output, copy.deepcopy(module.net).eval()(x))
