"""The Trainer of Hugging Face transformers: a callback whose checkpoints hold an adapter file, and no base weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from convlora.config import AdapterConfig
from convlora.errors import ConvLoRAError
from convlora.integrations.common import MissingPackageError, ensure_adapters, takes_part, untouched_keys, write_results
from convlora.model.storage import merged_state_dict, save
from convlora.model.traversal import adapters

try:
    from transformers import PreTrainedModel, TrainerCallback
except ImportError as error:
    raise MissingPackageError("transformers", error) from None

FILE = "adapter.safetensors"


class AdapterCallback(TrainerCallback):  # type: ignore[misc]
    """Adapts the model of a Trainer, and leaves the frozen base out of its checkpoints.

    The adapter goes in when the Trainer is made, so hand the callback to it then (`Trainer(callbacks=[…])`). Each
    checkpoint folder gets `adapter.safetensors`, and `train(resume_from_checkpoint=…)` goes on to the same bits. Of a
    `PreTrainedModel` the folder's `model.safetensors` holds adapters, and what else has changed or trains, alone: the
    rest is in the model's `_keys_to_ignore_on_save`, until training ends. Of other modules the Trainer writes the
    whole state dict: it has no way to leave something out.

    Args:
        config: what to inject; None if the model has its adapters, by `inject` or `load`.
        adapter: file to write the adapter to when training ends; None: `adapter.safetensors` in `output_dir`.
        merged: folder for the merged model, with the original keys, as `from_pretrained` reads it (of other modules:
            `model.safetensors` in it); None for none.

    Raises:
        ConvLoRAError: what `inject` refuses; a Trainer that was made without the callback.

    Example:
        >>> from convlora import AdapterConfig
        >>> callback = AdapterCallback(AdapterConfig(targets="*.convolution", rank=4), merged="runs/merged")
    """

    def __init__(
        self,
        config: AdapterConfig | None = None,
        *,
        adapter: str | os.PathLike[str] | None = None,
        merged: str | os.PathLike[str] | None = None,
    ) -> None:
        self.config, self.adapter, self.merged = config, adapter, merged
        self._name = None if config is None else config.name

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Inject: before the optimizer is made, the model wrapped, and a checkpoint loaded."""
        ensure_adapters(model, self.config, "AdapterCallback")
        self._ignored = getattr(model, "_keys_to_ignore_on_save", None)
        self._leave_out(model, unless="num_batches_tracked")  # loading does not count it among what is missing

    def _leave_out(self, model: Any, unless: str = "") -> None:
        if isinstance(model, PreTrainedModel):
            keys = (key for key in untouched_keys(model) if not (unless and key.endswith(unless)))
            model._keys_to_ignore_on_save = {*(self._ignored or ()), *keys}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Check that the callback was there when the Trainer was made."""
        if not hasattr(self, "_ignored") or not adapters(model):
            raise ConvLoRAError("AdapterCallback: hand it to the Trainer when that is made, Trainer(callbacks=[…])")

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Leave out of the coming checkpoint what is as before `inject`, at this step."""
        if control.should_save or control.should_evaluate:  # an evaluation may find the best model, to be saved
            self._leave_out(model)

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Put the adapter file beside what the Trainer has written."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if takes_part(model, args.should_save) and folder.is_dir():
            save(model, folder / FILE, self._name)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Write the adapter, and the merged model if one is asked for; the model's own saving is whole again."""
        whole = isinstance(model, PreTrainedModel)
        if whole:
            model._keys_to_ignore_on_save = self._ignored
        if not takes_part(model, args.should_save):
            return
        path = Path(args.output_dir, FILE) if self.adapter is None else self.adapter
        weights = None if self.merged is None or whole else Path(self.merged, "model.safetensors")
        write_results(model, path, weights, self._name)
        if self.merged is not None and whole:
            model.save_pretrained(self.merged, state_dict=merged_state_dict(model))
