"""`AdapterCallback` in a Hugging Face Trainer: what trains, what checkpoints hold, resuming, what is left behind."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import convlora
from convlora import AdapterConfig, ConvLoRAError

try:
    import accelerate as accelerate  # the Trainer needs it
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments
except ImportError as missing:
    pytest.skip(str(missing), allow_module_level=True)

from convlora.integrations.transformers import AdapterCallback

pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")
CONFIG = AdapterConfig(targets="*.convolution", rank=1, modules_to_save="classifier", rank_dropout=0.5)
SMALL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}


class Pictures(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(i % 3)}


def network() -> ResNetForImageClassification:
    torch.manual_seed(1)
    return ResNetForImageClassification(ResNetConfig(**SMALL))


class Plain(nn.Module):
    """A module that is no PreTrainedModel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Linear(4, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(self.body(pixel_values).mean((2, 3)))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(folder: Path, steps: int, model: nn.Module, resume: str | None = None, **options: Any) -> nn.Module:
    """Train up to a step; a checkpoint is written at every second one."""
    settings = {"config": CONFIG, "merged": folder / "merged", **options}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2,
        use_cpu=True, report_to=[], disable_tqdm=True, lr_scheduler_type="constant", logging_steps=100,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Pictures(), callbacks=[AdapterCallback(**settings)])
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    folder = tmp_path_factory.mktemp("transformers")
    return train(folder, 6, network()), folder


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        pictures = torch.stack([Pictures()[i]["pixel_values"] for i in range(4)])
        return model.eval()(pixel_values=pictures)["logits"]  # type: ignore[no-any-return]


def test_exactly_the_adapter_is_trained(trained: tuple[nn.Module, Path]) -> None:
    before, after = network().state_dict(), trained[0].state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert convlora.changed(trained[0]) == []
    trainable = {id(p) for p in trained[0].parameters() if p.requires_grad}
    assert trainable == {id(p) for p in convlora.parameters(trained[0])}
    assert all(p.any() for p in convlora.parameters(trained[0]))
    assert not torch.equal(logits(trained[0]), logits(network()))


def test_a_checkpoint_holds_the_adapter_and_not_the_base(trained: tuple[nn.Module, Path]) -> None:
    model, folder = trained
    kept = set(load_file(folder / "checkpoint-2" / "model.safetensors"))
    assert kept == set(model.state_dict()) - set(network().state_dict())
    assert any(key.endswith("running_mean") for key in kept)
    assert {"optimizer.pt", "trainer_state.json", "adapter.safetensors"} <= {
        path.name for path in (folder / "checkpoint-2").iterdir()
    }


def test_the_adapter_of_a_checkpoint_is_that_of_its_step(trained: tuple[nn.Module, Path]) -> None:
    model, folder = trained
    last = convlora.load(network(), folder / "checkpoint-6" / "adapter.safetensors")
    assert torch.equal(logits(last), logits(model))
    earlier = convlora.load(network(), folder / "checkpoint-2" / "adapter.safetensors")
    assert not torch.equal(logits(earlier), logits(model))


def test_resuming_gives_the_bits_of_a_run_without_a_break(
    trained: tuple[nn.Module, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch, with random dropping of rank components: the Trainer restores data and generators."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    train(tmp_path / "first", 2, network())
    caplog.clear()
    resumed = train(tmp_path / "second", 6, network(), str(tmp_path / "first" / "checkpoint-2")).state_dict()
    for name, value in trained[0].state_dict().items():
        assert torch.equal(value, resumed[name]), name
    assert "keys in the checkpoint" not in caplog.text  # what is left out is no surprise to the Trainer


def test_the_file_and_the_merged_model_give_the_trained_output(trained: tuple[nn.Module, Path]) -> None:
    model, folder = trained
    assert torch.equal(logits(convlora.load(network(), folder / "adapter.safetensors")), logits(model))
    state = load_file(folder / "merged" / "model.safetensors")
    plain = network()
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    assert torch.equal(logits(plain), logits(model))
    read = ResNetForImageClassification.from_pretrained(folder / "merged")
    assert torch.equal(logits(read), logits(model))


def test_afterwards_the_model_saves_all_of_itself(trained: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, _ = trained
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


def test_what_moves_outside_the_adapter_is_in_the_checkpoint(tmp_path: Path) -> None:
    model = network()
    with pytest.warns(convlora.ConvLoRAWarning, match="norm_statistics='base'"):
        convlora.inject(model, config=CONFIG.replace(norm_statistics="base", rank_dropout=0.0))
    with pytest.warns(convlora.ConvLoRAWarning, match="outside the adapter have changed"):
        train(tmp_path, 2, model, config=None, merged=None)
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    moved = [key for key in network().state_dict() if key.endswith(("running_mean", "running_var"))]
    assert moved
    assert all(torch.equal(kept[key], model.state_dict()[key]) for key in moved)
    assert not any(key.endswith("convolution.weight") for key in kept)


def test_a_module_that_is_not_pretrained_is_resumed_from_a_whole_checkpoint(tmp_path: Path) -> None:
    config = AdapterConfig(targets="body.*", rank=1, modules_to_save="classifier")
    whole = train(tmp_path / "whole", 4, Plain(), config=config)
    train(tmp_path / "first", 2, Plain(), config=config)
    kept = load_file(tmp_path / "first" / "checkpoint-2" / "model.safetensors")
    assert set(kept) == set(whole.state_dict())
    assert (tmp_path / "first" / "checkpoint-2" / "adapter.safetensors").exists()
    resumed = train(tmp_path / "second", 4, Plain(), str(tmp_path / "first" / "checkpoint-2"), config=config)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    plain = Plain()
    plain.load_state_dict(load_file(tmp_path / "whole" / "merged" / "model.safetensors"))
    assert torch.equal(logits(plain), logits(whole))


def test_a_callback_that_comes_too_late_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(network(), arguments, train_dataset=Pictures())
    trainer.add_callback(AdapterCallback(CONFIG))
    with pytest.raises(ConvLoRAError, match="hand it to the Trainer when that is made"):
        trainer.train()
    with pytest.raises(ConvLoRAError, match="AdapterCallback: the model has no adapters; give config="):
        Trainer(network(), arguments, callbacks=[AdapterCallback()])
