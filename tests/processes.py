"""Processes that gloo connects, on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(folder: Path, work: Callable[..., Any], *arguments: Any, count: int = 2) -> list[Any]:
    """What `work(rank, *arguments)` gives in each of some new processes; `folder` is for what they exchange.

    An exception in one of them ends all and is raised here, with its traceback.
    """
    own = Path(tempfile.mkdtemp(dir=folder))
    mp.spawn(_run, (str(own), count, work, arguments), nprocs=count)  # type: ignore[no-untyped-call]
    return [torch.load(own / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _run(rank: int, folder: str, count: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", rank=rank, world_size=count, store=store, timeout=timedelta(seconds=300))
    torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
