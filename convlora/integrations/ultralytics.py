"""Ultralytics: callbacks with which its trainers adapt a network instead of training all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from convlora.config import AdapterConfig
from convlora.errors import ConvLoRAError
from convlora.integrations import averages
from convlora.integrations.common import MissingPackageError, write_checkpoint
from convlora.model.inject import inject, remove
from convlora.model.outside import freeze
from convlora.model.storage import save
from convlora.model.traversal import adapters

try:
    import ultralytics as ultralytics
except ImportError as error:
    raise MissingPackageError("ultralytics", error) from None

STATE = "resume.state"  # beside the weights while a run lasts


def callbacks(config: AdapterConfig, *, merged: str | Path | None = None) -> dict[str, Callable[[Any], Any]]:
    """Event -> callback, for `YOLO.add_callback`: the trainer adapts its network, and trains the adapter alone.

    The adapter goes in before the trainer makes optimizer and average (EMA); all else is frozen again once the trainer
    has unfrozen it, and what its `freeze=` names. Beside each `.pt` lies the average's adapter as `.safetensors`. The
    `.pt` hold adapted networks; at the end plain merged ones, original keys, in the trainer's half precision. For
    `resume=True`, with the callbacks added again, `resume.state` keeps exact values. One process: those that the
    trainer starts for several devices know no callbacks, and would train everything.

    Args:
        config: what to inject. A head for other classes, which the trainer makes anew, belongs in `modules_to_save`.
        merged: file for the best merged checkpoint in full precision (`.safetensors`, or as `torch.save` writes it).

    Example:
        >>> from ultralytics import YOLO
        >>> yolo = YOLO("yolov8n.yaml")
        >>> for event, callback in callbacks(AdapterConfig(targets="*.conv", rank=4)).items():
        ...     yolo.add_callback(event, callback)
    """

    def start(trainer: Any) -> None:
        if getattr(trainer, "world_size", 1) > 1:
            raise ConvLoRAError(f"callbacks: {trainer.world_size} processes; train in one, device=0")
        describe, evaluate = trainer.set_model_attributes, trainer.final_eval

        def set_model_attributes() -> None:  # comes after making the network, and before all that is made of it
            describe()
            if adapters(trainer.model):
                remove(trainer.model)  # the trainer has copied the head of an adapted network
            if trainer.resume:
                trainer.model.load_state_dict(averages.read_training_state(trainer.wdir / STATE)["base"], strict=False)
            for p in inject(trainer.model, config=config).parameters():
                p.requires_grad_(p.is_floating_point())  # the trainer would, with a warning for each

        def final_eval() -> None:  # fuses the network of a file
            for file in trainer.wdir.glob("*.pt"):
                averages.merge_in_file(file, trainer.ema.ema)
            evaluate()

        trainer.set_model_attributes, trainer.final_eval = set_model_attributes, final_eval

    def end(trainer: Any) -> None:
        if merged is not None:
            plain = averages.merged_copy(trainer.ema.ema, trainer.best.with_suffix(".safetensors"))
            write_checkpoint(merged, plain.state_dict())
        (trainer.wdir / STATE).unlink(missing_ok=True)

    return {
        "on_pretrain_routine_start": start,
        "on_pretrain_routine_end": _freeze,
        "on_train_epoch_start": lambda trainer: getattr(trainer, "nan_recovery_attempts", 0) and _restore(trainer),
        "on_train_epoch_end": lambda trainer: averages.take_base(trainer.ema.ema, trainer.model),
        "on_model_save": lambda trainer: _save(trainer, config.name),
        "on_train_end": end,
    }


def _freeze(trainer: Any) -> None:
    for name, p in freeze(trainer.model).named_parameters():
        if any(part in name for part in trainer.freeze_layer_names):
            p.requires_grad_(False)
    if trainer.resume:
        _restore(trainer)


def _restore(trainer: Any) -> Any:  # what the trainer has just read from rounded averages
    averages.restore_training_state(trainer.wdir / STATE, trainer.model, trainer.ema.ema, trainer.optimizer)


def _save(trainer: Any, name: str) -> None:  # the average's adapter beside each file that was just written
    is_due = trainer.save_period > 0 and trainer.epoch % trainer.save_period == 0
    for stem in ("last", *["best"] * (trainer.best_fitness == trainer.fitness), *[f"epoch{trainer.epoch}"] * is_due):
        save(trainer.ema.ema, trainer.wdir / f"{stem}.safetensors", name)
    averages.write_training_state(trainer.wdir / STATE, trainer.model, trainer.ema.ema, trainer.optimizer)
