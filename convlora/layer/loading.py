"""What `load_state_dict` does with the tensors of adapters."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from convlora.config import AdapterConfig


class AdapterTensors(nn.Module):
    """Tensors of one adapter in one module of the model: factors of an update, or copies.

    Loading a base checkpoint passes over them; a checkpoint with half an adapter is reported.
    """

    config: AdapterConfig
    strength: float
    # The paths of all modules that got the adapter together, and the one of this module among them.
    _place: tuple[dict[str, None], str] | None = None
    was_loaded = False  # whether the last checkpoint that was loaded had its tensors

    def tensor_names(self) -> Iterable[str]:
        """The names of its tensors in a checkpoint."""
        raise NotImplementedError

    def updates(self, kind: str) -> bool:
        """Whether it adds something to the weight, or to the bias."""
        return False

    def set_strength(self, strength: float) -> None:
        raise NotImplementedError

    def follow(self) -> None:
        """What is to be done once other tensors were loaded."""

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = [prefix + name for name in self.tensor_names()]
        passed_over = _loading.of(missing_keys).setdefault(self.config.name, ([], []))
        found, absent = passed_over
        self.was_loaded = any(key in state_dict for key in own)
        if self.was_loaded:
            found.append(prefix)
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            self.follow()
        else:
            absent.extend(own)
        if found:  # other modules of this adapter are in the checkpoint: then these should be, too
            missing_keys.extend(absent)
            absent.clear()


class _Loading(threading.local):
    """What the running `load_state_dict` call has found of each adapter.

    A call is recognised by its `missing_keys` list, which every module it visits is handed.
    """

    missing_keys: list[str] | None = None
    adapters: dict[str, tuple[list[str], list[str]]]

    def of(self, missing_keys: list[str]) -> dict[str, tuple[list[str], list[str]]]:
        if self.missing_keys is not missing_keys:
            self.missing_keys, self.adapters = missing_keys, {}
        return self.adapters


_loading = _Loading()
