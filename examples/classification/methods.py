"""The methods that classify.py compares an adapter with: linear probe, full fine-tuning, PEFT."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from classification.data import Task
from classification.network import SmallResNet
from classification.training import Training, accuracy, equal_states, outputs, train

RATES = {"base": 3e-3, "probe": 0.3, "full": 8e-3, "adapter": 1e-2}  # the last three by search.py


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One method on one task: what was reached, and what its file is worth in a network that has only the base."""

    method: str
    task: str
    seed: int
    live: float  # accuracy of the network that was trained
    reloaded: float  # accuracy of a fresh base with the file
    difference: float  # the largest, between the logits of the two
    trained: int  # parameters
    file_bytes: int
    base_back: bool  # whether, with what was trained taken off, the base is bitwise there again


def judge_file(
    method: str,
    task: Task,
    seed: int,
    live: Tensor,
    reloaded: Tensor,
    trained: Iterable[nn.Parameter],
    file: Path,
    base_back: bool,
) -> Outcome:
    """An `Outcome` from the logits of held-out images, live and of a fresh base with the file."""
    return Outcome(
        method=method,
        task=task.name,
        seed=seed,
        live=accuracy(live, task.test),
        reloaded=accuracy(reloaded, task.test),
        difference=float((live - reloaded).abs().max()),
        trained=count_parameters(trained),
        file_bytes=file_size(file),
        base_back=base_back,
    )


def file_size(path: Path) -> int:
    """Bytes of a file, or of a folder's files that are needed to load it: weights and configuration."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in {".safetensors", ".json"}]
    return sum(file.stat().st_size for file in files)


def with_new_head(base: SmallResNet, task: Task) -> SmallResNet:
    """The network with a head for the task's classes in the place of its own."""
    base.fc = nn.Linear(base.fc.in_features, len(task.classes))
    return base


def linear_probe(
    fresh_base: Callable[[], SmallResNet], task: Task, training: Training, file: Path, *, rate: float = RATES["probe"]
) -> Outcome:
    """A new head on frozen features; BatchNorm stays as it is. The file has the head alone."""
    torch.manual_seed(training.seed)
    model = with_new_head(fresh_base().requires_grad_(False), task)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, model.fc.parameters(), task, training, rate, frozen_statistics=True)
    live = outputs(model, task.test.images)
    save_file(model.fc.state_dict(prefix="fc."), file)
    loaded = with_new_head(fresh_base(), task)
    loaded.load_state_dict(load_file(file), strict=False)
    reloaded = outputs(loaded, task.test.images)
    features = [
        {key: value for key, value in state.items() if "fc" not in key} for state in (model.state_dict(), before)
    ]
    return judge_file(
        "linear probe", task, training.seed, live, reloaded, model.fc.parameters(), file, equal_states(*features)
    )


def full_fine_tuning(
    fresh_base: Callable[[], SmallResNet], task: Task, training: Training, file: Path, *, rate: float = RATES["full"]
) -> Outcome:
    """Every weight, so that nothing of the base stays. The file is another whole network."""
    torch.manual_seed(training.seed)
    model = with_new_head(fresh_base(), task)
    train(model, model.parameters(), task, training, rate)
    live = outputs(model, task.test.images)
    save_file(model.state_dict(), file)
    loaded = with_new_head(fresh_base(), task)
    loaded.load_state_dict(load_file(file))
    reloaded = outputs(loaded, task.test.images)
    return judge_file("full fine-tuning", task, training.seed, live, reloaded, model.parameters(), file, False)


def peft_lora(
    fresh_base: Callable[[], SmallResNet],
    task: Task,
    training: Training,
    folder: Path,
    *,
    targets: str,
    rank: int,
    modules_to_save: Sequence[str],
    rate: float = RATES["adapter"],
) -> Outcome:
    """PEFT's LoRA on the convolutions that a regular expression selects; the folder is that of `save_pretrained`.

    A fresh base needs a head of the task's size before it can take the folder.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(training.seed)
    config = LoraConfig(target_modules=targets, r=rank, lora_alpha=rank, modules_to_save=[*modules_to_save])
    model = get_peft_model(with_new_head(fresh_base(), task), config)
    with model.disable_adapter():
        before = outputs(model, task.test.images)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(model, trained, task, training, rate)
    live = outputs(model, task.test.images)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(with_new_head(fresh_base(), task), folder)
    reloaded = outputs(loaded, task.test.images)
    with model.disable_adapter():
        base_back = torch.equal(outputs(model, task.test.images), before)
    method = "PEFT" if [*modules_to_save] == ["fc"] else "PEFT, BatchNorms saved"
    return judge_file(method, task, training.seed, live, reloaded, trained, folder, base_back)


def has_peft() -> bool:
    """Whether PEFT can be imported; `pip install -e '.[examples,peft]'` brings it."""
    return importlib.util.find_spec("peft") is not None


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers."""
    return sum(parameter.numel() for parameter in parameters)
