"""What the integrations have in common: a missing package, what a checkpoint can leave out, what is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import net
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import convlora
from convlora import AdapterConfig, ConvLoRAError
from convlora.integrations.averages import (
    merge_in_file,
    read_training_state,
    restore_training_state,
    write_training_state,
)
from convlora.integrations.common import ensure_adapters, untouched_keys, write_results

pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")
CONFIG = AdapterConfig(targets=["0", "3"], rank=1)


@pytest.mark.parametrize("extra", ["lightning", "transformers", "ultralytics"])
def test_a_missing_package_is_an_import_error_that_names_the_extra(extra: str) -> None:
    code = f"""
import sys
for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers", "ultralytics"):
    sys.modules[name] = None
import convlora
try:
    import convlora.integrations.{extra}
except ImportError as error:
    assert isinstance(error, convlora.ConvLoRAError)
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.startswith(f"convlora.integrations.{extra}: ")
    assert said.endswith(f"; pip install 'convlora[{extra}]'\n")
    assert extra in said.partition(";")[0].partition(": ")[2]


def test_the_library_imports_no_integration() -> None:
    code = "import sys, convlora; print(*[name for name in sys.modules if name.startswith('convlora.integrations')])"
    assert not subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_an_adapter_that_is_there_is_not_injected_again() -> None:
    model = ensure_adapters(net(), CONFIG, "test")
    before = list(convlora.parameters(model))
    assert list(convlora.parameters(ensure_adapters(model, CONFIG, "test"))) == before
    assert set(convlora.adapters(ensure_adapters(model, CONFIG.replace(name="fog"), "test"))) == {"default", "fog"}
    with pytest.raises(ConvLoRAError, match="test: the model has no adapters; give config="):
        ensure_adapters(net(), None, "test")


def test_what_has_changed_or_trains_is_not_left_out_of_a_checkpoint() -> None:
    model = convlora.inject(net(), config=CONFIG)
    base = list(net().state_dict())
    assert untouched_keys(model) == base
    assert untouched_keys(AveragedModel(model)) == base
    model[6].weight.requires_grad_(True)
    with torch.no_grad():
        model[4].bias.add_(1)
    assert untouched_keys(model) == [key for key in base if key not in ("6.weight", "4.bias")]


def test_results_go_into_folders_that_are_made(tmp_path: Path) -> None:
    model = convlora.inject(net(), config=CONFIG)
    write_results(model, tmp_path / "a" / "adapter.safetensors", tmp_path / "b" / "merged.safetensors")
    merged = load_file(tmp_path / "b" / "merged.safetensors")
    assert merged.keys() == net().state_dict().keys()
    assert set(convlora.adapters(convlora.load(net_like(model), tmp_path / "a" / "adapter.safetensors"))) == {"default"}


def net_like(model: nn.Module) -> nn.Module:
    plain = net()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".convlora." not in k})
    return plain


def test_training_states_hold_what_half_precision_rounds_and_no_more(tmp_path: Path) -> None:
    model = convlora.inject(net().half().float(), config=CONFIG)  # a base that half precision holds …
    with torch.no_grad():
        model[6].bias.fill_(1 / 3)  # … but for this, which has changed, and for statistics below
    average = AveragedModel(model).module
    optimizer = torch.optim.Adam(convlora.parameters(model))
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    write_training_state(tmp_path / "state", model, average, optimizer)
    state = read_training_state(tmp_path / "state")
    assert state["base"] == {}
    assert set(state["model"]) == {key for key in model.state_dict() if ".convlora." in key} | {"6.bias"}
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half()).add_(1 if p.requires_grad else 0)
    optimizer.state.clear()
    restore_training_state(tmp_path / "state", model, average, optimizer)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())
    assert len(optimizer.state) == len(convlora.parameters(model))
    with pytest.raises(ConvLoRAError, match=r"resume: '.*none' is missing"):
        read_training_state(tmp_path / "none")


def test_a_file_of_another_run_is_left_as_it_is(tmp_path: Path) -> None:
    """One whose average is plain has been merged before."""
    torch.save({"ema": net(), "epoch": 3}, tmp_path / "old.pt")
    before = (tmp_path / "old.pt").read_bytes()
    merge_in_file(tmp_path / "old.pt", convlora.inject(net(), config=CONFIG))
    assert (tmp_path / "old.pt").read_bytes() == before
