"""Adapters on the Hugging Face Hub: `push` and `pull`. Nothing here is called, nor connects, unless you call it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from convlora import card
from convlora.adapter.adapter import Adapter
from convlora.errors import ConvLoRAError

FILE = "adapter.safetensors"


def push(
    adapter: Adapter | str | os.PathLike[str],
    repo_id: str,
    *,
    file: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload an adapter in one commit and give its address. A repository that is not there is created.

    A model card beside the file (`convlora.card.write`) goes along; another README.md does not.

    Args:
        adapter: an adapter file or an `Adapter`.
        repo_id: `owner/name` on the Hub.
        file: its name there; else that of the file, `adapter.safetensors` for an `Adapter`.
        private: of a repository that is created; None leaves it to the owner's settings.
        revision: the branch, else the main one.
        message: of the commit.
        token: else the one that `hf auth login` stored.

    Raises:
        ConvLoRAError: `huggingface_hub` is missing, no adapter file there (nothing is sent then), or the Hub refuses.

    Example:
        >>> push("rain.safetensors", "me/rain")  # doctest: +SKIP
        'https://huggingface.co/me/rain/commit/…'
    """
    hub = _hub("push")
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(adapter, Adapter):
            source = Path(folder, FILE)
            adapter.write(source)
        else:
            Adapter.read(adapter)  # raises unless it is a whole adapter
            source = Path(adapter)
        name = file or source.name
        sent = {name: source}
        if card.is_card(beside := source.with_name(card.NAME)):
            sent[card.NAME] = beside
        try:
            api = hub.HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.create_commit(
                repo_id,
                [hub.CommitOperationAdd(path_in_repo=to, path_or_fileobj=str(path)) for to, path in sent.items()],
                commit_message=message or f"Upload {name} with convlora",
                revision=revision,
            )
        except Exception as error:
            raise _refused("push", repo_id, error) from error
    return str(commit.commit_url)


def pull(repo_id: str, *, file: str = FILE, revision: str | None = None, token: str | None = None) -> Adapter:
    """Download an adapter, or take it from the Hub's cache on this machine; `convlora.load` takes what it gives.

    Args:
        repo_id: `owner/name` on the Hub.
        file: the adapter's name there.
        revision: a branch, tag or commit, else the main branch.
        token: else the one that `hf auth login` stored.

    Raises:
        ConvLoRAError: `huggingface_hub` is missing, the Hub has no such file or is out of reach, or the file is
            damaged.

    Example:
        >>> convlora.load(model, pull("me/rain", file="rain.safetensors"))  # doctest: +SKIP
    """
    hub = _hub("pull")
    try:
        path = hub.hf_hub_download(repo_id, file, revision=revision, token=token)
    except Exception as error:
        raise _refused("pull", repo_id, error) from error
    return Adapter.read(path)


def _hub(operation: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ConvLoRAError(f"{operation}: huggingface_hub is missing; pip install 'convlora[hub]'") from None
    return huggingface_hub


def _refused(operation: str, repo_id: str, error: Exception) -> ConvLoRAError:
    return ConvLoRAError(f"{operation}: {repo_id!r}: {' '.join(str(error).split()) or type(error).__name__}")
