"""A model card: what an adapter is, as a README.md beside its file, in the form that the Hugging Face Hub reads."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from convlora.adapter.adapter import Adapter
from convlora.errors import ConvLoRAError
from convlora.support.atomic import write_atomically

NAME = "README.md"
_MARK = "library_name: convlora"  # in the front matter of every card


def write(
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    base: str | None = None,
    data: str | None = None,
    licence: str | None = None,
    figures: Mapping[str, float | str] | None = None,
    repo_id: str | None = None,
    force: bool = False,
) -> Path:
    """Write a model card beside an adapter file and give its path.

    What the file says (fingerprint of the base, layers, ranks, size, checksum) is read from it; the words are yours.

    Args:
        path: of the adapter file.
        title: of the card; else the file's name.
        base: what was adapted; the id of a model on the Hub (`owner/name`) is linked.
        data: what it was trained on.
        licence: of the adapter: an identifier of the Hub (`mit`) or words.
        figures: name -> value, what was measured.
        repo_id: `owner/name` of the adapter on the Hub, if it is to go there.
        force: replace a README.md that is no card.

    Raises:
        ConvLoRAError: no adapter file there, words or figures of another type, or a README.md that is no card.

    Example:
        >>> import tempfile, torch, convlora
        >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = convlora.save(model, f"{folder}/rain.safetensors")
        ...     card = write(f"{folder}/rain.safetensors", data="photos of rain", figures={"PSNR-Y (dB)": 28.3})
        ...     print(card.read_text().splitlines()[7])
        # rain
    """
    words = {"title": title, "base": base, "data": data, "licence": licence, "repo_id": repo_id}
    for name, value in words.items():
        if value is not None and not isinstance(value, str):
            raise ConvLoRAError(f"card: {name} (={value!r}) must be a string")
    rows = _figures({} if figures is None else figures)
    adapter = Adapter.read(path)
    file = Path(path)
    card = file.with_name(NAME)
    if card.exists() and not force and not is_card(card):
        raise ConvLoRAError(f"card: '{card}' is there and is no model card; give force=True to replace it")
    sections = [
        _front(base, licence),
        f"# {_line(title or file.stem)}\n\nA low-rank adapter for a PyTorch network, made with convlora.\n",
        _table(("", ""), _facts(adapter, file, base)),
        _use(file.name, repo_id),
    ]
    if data is not None:
        sections.append(f"## Training data\n\n{data.strip()}\n")
    if rows:
        sections.append("## Figures\n\n" + _table(("", "value"), rows))
    if licence is not None:
        sections.append(f"## Licence\n\n{licence.strip()}\n")
    write_atomically(card, "\n".join(sections).encode())
    return card


def is_card(path: Path) -> bool:
    """Whether a file is a card that `write` wrote, perhaps edited since."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return text.startswith("---\n") and _MARK in text.partition("\n---\n")[0].splitlines()


def _front(base: str | None, licence: str | None) -> str:
    """The YAML front matter; strings as JSON, which is YAML."""
    lines = ["---", _MARK, "tags:", "- convlora", "- lora"]
    if base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        lines.append(f"base_model: {json.dumps(base)}")
    if licence is not None and re.fullmatch(r"[a-z0-9.-]+", licence):
        lines.append(f"license: {json.dumps(licence)}")
    elif licence is not None:
        lines += ["license: other", f"license_name: {json.dumps(_line(licence))}"]
    return "\n".join([*lines, "---", ""])


def _facts(adapter: Adapter, file: Path, base: str | None) -> dict[str, str]:
    config = adapter.config
    ranks = Counter(layer.rank for layer in adapter.layers.values())
    tensors = [tensor for layer in adapter.layers.values() for tensor in layer.tensors.values()]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    content = file.read_bytes()
    facts = {
        "base": None if base is None else _cell(base),
        "fingerprint of the base's weights": adapter.fingerprint and f"`{adapter.fingerprint}`",
        "factorization": f"`{config.factors}`",
        "targets": ", ".join(_code(str(target)) for target in config.targets),  # type: ignore[union-attr]
        "layers": f"{len(adapter.layers)}",
        **({"copies of modules": f"{len(adapter.modules)}"} if adapter.modules else {}),
        "rank": ", ".join(f"{rank} ({count} of {len(adapter.layers)} layers)" for rank, count in sorted(ranks.items())),
        "parameters": f"{sum(tensor.numel() for tensor in tensors):,}",
        "file": f"{_code(file.name)}, {len(content):,} bytes, {', '.join(dtypes)}",
        "SHA-256 of the file": f"`{hashlib.sha256(content).hexdigest()}`",
    }
    return {name: value for name, value in facts.items() if value}


def _use(file: str, repo_id: str | None) -> str:
    source = json.dumps(file)
    if repo_id is not None:
        source = f"convlora.hub.pull({json.dumps(repo_id)}, file={source})"
    return (
        "## Use\n\n```python\nimport convlora\n\n"
        f"convlora.load(model, {source})  # model: the base, with its weights\n"
        "convlora.remove(convlora.merge(model))  # for deployment: a plain network again\n```\n"
    )


def _figures(figures: Mapping[str, float | str]) -> dict[str, str]:
    if not isinstance(figures, Mapping):
        raise ConvLoRAError(f"card: figures (={figures!r}) must be a mapping {{name: value}}")
    for name, value in figures.items():
        if not isinstance(name, str) or not isinstance(value, str | int | float):
            raise ConvLoRAError(f"card: figure {name!r}: {value!r} must be a name and a number or a string")
    return {_cell(name): _cell(str(value)) for name, value in figures.items()}


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`` {_cell(text)} ``" if "`" in text else f"`{_cell(text)}`"
