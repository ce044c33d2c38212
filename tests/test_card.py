"""Model cards: what they say is what the file holds, and nothing of the user's is lost."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import yaml
from oracle import adapted_net

import convlora
from convlora import card


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = adapted_net(rank=2, ranks={"6": 1}, name="rain")
    convlora.save(model, tmp_path / "rain.safetensors", dtype=torch.float16)
    return tmp_path / "rain.safetensors"


def front(path: Path) -> dict[str, object]:
    _, matter, _ = path.read_text().split("---\n", 2)
    return yaml.safe_load(matter)


def test_it_says_what_the_file_holds(file: Path) -> None:
    written = card.write(file)
    text, adapter = written.read_text(), convlora.Adapter.read(file)
    assert written == file.with_name("README.md")
    assert front(written) == {"library_name": "convlora", "tags": ["convlora", "lora"]}
    for said in (
        "# rain",
        f"`{adapter.fingerprint}`",
        "| factorization | `convlora` |",
        "| targets | `0`, `3`, `4`, `6` |",
        "| layers | 4 |",
        "| rank | 1 (1 of 4 layers), 2 (3 of 4 layers) |",
        f"| parameters | {sum(t.numel() for f in adapter.layers.values() for t in f.tensors.values()):,} |",
        f"| file | `rain.safetensors`, {file.stat().st_size:,} bytes, float16 |",
        hashlib.sha256(file.read_bytes()).hexdigest(),
        'convlora.load(model, "rain.safetensors")',
    ):
        assert said in text, said
    assert "## Training data" not in text


def test_it_carries_the_words_and_figures_of_the_user(file: Path) -> None:
    written = card.write(
        file,
        title="Rain: a 'cheap' camera",
        base="someone/span",
        data="Photos of rain.\n\n- many",
        licence="mit",
        figures={"PSNR-Y (dB)": 28.302, "a|b": "1 | 2"},
        repo_id="me/rain",
    )
    text = written.read_text()
    assert front(written) == {
        "library_name": "convlora",
        "tags": ["convlora", "lora"],
        "base_model": "someone/span",
        "license": "mit",
    }
    assert "## Training data\n\nPhotos of rain.\n\n- many\n" in text
    assert "| PSNR-Y (dB) | 28.302 |\n| a\\|b | 1 \\| 2 |\n" in text
    assert 'convlora.hub.pull("me/rain", file="rain.safetensors")' in text


def test_words_cannot_break_the_front_matter(file: Path) -> None:
    licence = 'Mine: "all"\n---\ntags: [other] # é'
    written = card.write(file, licence=licence, base="a base\n---\nof mine")
    matter = front(written)
    assert matter["license"] == "other"
    assert matter["license_name"] == 'Mine: "all" --- tags: [other] # é'
    assert "base_model" not in matter


def test_only_a_card_is_written_over(file: Path) -> None:
    readme = file.with_name("README.md")
    readme.write_text("my project")
    with pytest.raises(convlora.ConvLoRAError, match="no model card; give force=True"):
        card.write(file)
    assert readme.read_text() == "my project"
    card.write(file, force=True)
    card.write(file, data="again")
    assert "again" in readme.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"data": 3}, "data .=3. must be a string"),
        ({"figures": {"PSNR": None}}, "figure 'PSNR': None"),
        ({"figures": [1]}, "must be a mapping"),
    ],
)
def test_words_of_another_type_are_one_clear_error(file: Path, words: dict[str, object], message: str) -> None:
    with pytest.raises(convlora.ConvLoRAError, match=message):
        card.write(file, **words)  # type: ignore[arg-type]
    assert not file.with_name("README.md").exists()


def test_what_is_no_adapter_gets_no_card(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no adapter")
    with pytest.raises(convlora.ConvLoRAError, match="cannot be read as an adapter"):
        card.write(tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
