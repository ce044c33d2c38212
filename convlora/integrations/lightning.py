"""Lightning: a callback that adapts a network and has checkpoints hold the adapter alone."""

from __future__ import annotations

import os
from operator import attrgetter
from typing import Any

from torch import nn

from convlora.config import AdapterConfig
from convlora.errors import ConvLoRAError, Problems
from convlora.integrations.common import MissingPackageError, ensure_adapters, takes_part, untouched_keys, write_results

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as missing:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ImportError as error:
        raise MissingPackageError("lightning", missing if error.name == "pytorch_lightning" else error) from None


class AdapterCheckpoint(Callback):  # type: ignore[misc]
    """Adapts a network of a LightningModule, and leaves the frozen base out of its checkpoints.

    The adapter goes in at `setup`: before `configure_optimizers`, which takes `convlora.parameters(self.net)` or all
    that requires a gradient, and before a strategy wraps the module. A checkpoint holds the adapters, what else of the
    network has changed or trains, all that lies outside of the network, and the state of trainer and optimizers;
    `fit(ckpt_path=…)` goes on from it to the same bits. (Lightning asks no callback for checkpoints with
    `save_weights_only=True`: those are whole.)

    Args:
        config: what to inject; None if the network has its adapters, by `inject` or `load` in `__init__`.
        network: the attribute of the LightningModule that is adapted (`"net"`, `"net.generator"`), as which adapter
            files and merged checkpoints are written; `""` is the LightningModule itself.
        adapter: file to write the adapter to when training ends; None: `adapter.safetensors` in `default_root_dir`.
        merged: file for the merged checkpoint, with the network's original keys (`.safetensors`, or as `torch.save`
            writes it); None for none.

    Raises:
        ConvLoRAError: in `setup`, what `inject` refuses; on resuming, a checkpoint with other adapters.

    Example:
        >>> from convlora import AdapterConfig
        >>> callback = AdapterCheckpoint(AdapterConfig(targets="body.*", rank=4), network="net", merged="merged.pth")
        >>> trainer = Trainer(callbacks=[callback], max_steps=100, logger=False, accelerator="cpu", devices=1)
    """

    def __init__(
        self,
        config: AdapterConfig | None = None,
        *,
        network: str = "",
        adapter: str | os.PathLike[str] | None = None,
        merged: str | os.PathLike[str] | None = None,
    ) -> None:
        self.config, self.network, self.adapter, self.merged = config, network, adapter, merged

    def _network(self, module: LightningModule) -> nn.Module:
        return attrgetter(self.network)(module) if self.network else module  # type: ignore[no-any-return]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject, and have Lightning load checkpoints that lack the base's entries."""
        ensure_adapters(self._network(pl_module), self.config, "AdapterCheckpoint")
        pl_module.strict_loading = False  # what is missing is checked in `on_load_checkpoint`

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave out of the checkpoint what the network has from elsewhere."""
        for key in self._left_out(pl_module):
            checkpoint["state_dict"].pop(key, None)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint had all that it should, and nothing else."""
        prefix = f"{self.network}." if self.network else ""
        known = {key for key in pl_module.state_dict() if key.startswith(prefix)}
        found = {key for key in checkpoint["state_dict"] if key.startswith(prefix)}
        problems = Problems(sorted(known - found - self._left_out(pl_module)), sorted(found - known))
        if problems:
            raise ConvLoRAError(f"AdapterCheckpoint: the checkpoint is of another adapter: {problems}")

    def _left_out(self, module: LightningModule) -> set[str]:
        prefix = f"{self.network}." if self.network else ""
        return {prefix + key for key in untouched_keys(self._network(module))}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter, and the merged checkpoint if one is asked for."""
        network, folder = self._network(pl_module), trainer.default_root_dir
        if takes_part(network, trainer.is_global_zero):
            path = os.path.join(folder, "adapter.safetensors") if self.adapter is None else self.adapter
            write_results(network, path, self.merged, None if self.config is None else self.config.name)
