"""`push` and `pull` against a Hub that is a folder: nothing here connects anywhere."""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import NET_INPUT, adapted_net, net

import convlora
from convlora import card, hub


class FakeHub:
    """What `huggingface_hub` offers, with a folder for each repository."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.failure: Exception | None = None

    def HfApi(self, token: str | None = None) -> FakeHub:
        self.calls.append(("HfApi", {"token": token}))
        return self

    def CommitOperationAdd(self, path_in_repo: str, path_or_fileobj: str) -> tuple[str, str]:
        return path_in_repo, path_or_fileobj

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        self.calls.append(("create_repo", {"private": private, "exist_ok": exist_ok}))
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def create_commit(
        self, repo_id: str, operations: list[tuple[str, str]], *, commit_message: str, revision: str | None
    ) -> SimpleNamespace:
        if self.failure:
            raise self.failure
        self.calls.append(("create_commit", {"message": commit_message, "revision": revision}))
        for name, source in operations:
            shutil.copyfile(source, self.root / repo_id / name)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None, token: str | None) -> str:
        self.calls.append(("download", {"revision": revision, "token": token}))
        if not (self.root / repo_id / filename).exists():
            raise FileNotFoundError(f"404 Client Error.\n\nEntry Not Found: {filename}")
        return str(self.root / repo_id / filename)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)  # type: ignore[arg-type]
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    convlora.save(adapted_net(), tmp_path / "rain.safetensors")
    return tmp_path / "rain.safetensors"


def test_what_is_pushed_is_what_is_pulled(fake: FakeHub, file: Path) -> None:
    assert hub.push(file, "me/rain", private=True, token="t") == "https://hub/me/rain/commit/1"
    assert fake.calls == [
        ("HfApi", {"token": "t"}),
        ("create_repo", {"private": True, "exist_ok": True}),
        ("create_commit", {"message": "Upload rain.safetensors with convlora", "revision": None}),
    ]
    model, expected, x = net().eval(), net().eval(), torch.rand(NET_INPUT)
    expected.load_state_dict(model.state_dict())
    pulled = hub.pull("me/rain", file="rain.safetensors", revision="v1")
    for network, source in ((model, pulled), (expected, file)):
        with pytest.warns(convlora.ConvLoRAWarning, match="another base"):
            convlora.load(network, source)
    assert torch.equal(model(x), expected(x))
    assert fake.calls[-1] == ("download", {"revision": "v1", "token": None})


def test_an_adapter_without_a_file_is_pushed_and_pulled_by_the_usual_name(fake: FakeHub, file: Path) -> None:
    hub.push(convlora.Adapter.read(file), "me/rain", message="first", revision="dev")
    assert [path.name for path in (fake.root / "me/rain").iterdir()] == [hub.FILE]
    assert fake.calls[-1] == ("create_commit", {"message": "first", "revision": "dev"})
    assert list(hub.pull("me/rain").layers) == list(convlora.Adapter.read(file).layers)


def test_a_card_goes_along_and_no_other_readme(fake: FakeHub, file: Path) -> None:
    file.with_name("README.md").write_text("my diary")
    hub.push(file, "me/rain")
    assert [path.name for path in (fake.root / "me/rain").iterdir()] == ["rain.safetensors"]
    written = card.write(file, force=True)
    hub.push(file, "me/rain", file="adapter.safetensors")
    names = sorted(path.name for path in (fake.root / "me/rain").iterdir())
    assert names == ["README.md", "adapter.safetensors", "rain.safetensors"]
    assert (fake.root / "me/rain/README.md").read_bytes() == written.read_bytes()


def test_what_is_no_adapter_is_not_sent(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with pytest.raises(convlora.ConvLoRAError, match=r"secret\.txt' cannot be read as an adapter file"):
        hub.push(tmp_path / "secret.txt", "me/rain")
    assert fake.calls == []


def test_a_damaged_download_is_refused(fake: FakeHub, file: Path) -> None:
    hub.push(file, "me/rain")
    held = fake.root / "me/rain/rain.safetensors"
    held.write_bytes(held.read_bytes()[:-4])
    with pytest.raises(convlora.ConvLoRAError, match="cannot be read as an adapter file"):
        hub.pull("me/rain", file="rain.safetensors")


def test_what_the_hub_refuses_is_one_line(fake: FakeHub, file: Path) -> None:
    with pytest.raises(convlora.ConvLoRAError) as raised:
        hub.pull("me/none")
    assert str(raised.value) == "pull: 'me/none': 404 Client Error. Entry Not Found: adapter.safetensors"
    fake.failure = PermissionError("401\nUnauthorized")
    with pytest.raises(convlora.ConvLoRAError, match=r"^push: 'me/rain': 401 Unauthorized$"):
        hub.push(file, "me/rain")


def test_without_the_extra_it_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: hub.push(file, "me/rain"), lambda: hub.pull("me/rain")):
        with pytest.raises(convlora.ConvLoRAError, match=r"huggingface_hub is missing; pip install 'convlora\[hub\]'"):
            call()


def test_the_real_library_has_what_is_called(tmp_path: Path, file: Path) -> None:
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is not installed")
    import huggingface_hub

    def takes(function: Any, *names: str) -> bool:
        return set(names) <= set(inspect.signature(function).parameters)

    assert takes(huggingface_hub.HfApi.create_repo, "repo_id", "private", "exist_ok")
    assert takes(huggingface_hub.HfApi.create_commit, "repo_id", "operations", "commit_message", "revision")
    assert takes(huggingface_hub.hf_hub_download, "repo_id", "filename", "revision", "token")
    operation = huggingface_hub.CommitOperationAdd(path_in_repo="a.safetensors", path_or_fileobj=str(file))
    assert operation.upload_info.size == file.stat().st_size
    assert "commit_url" in inspect.signature(huggingface_hub.CommitInfo).parameters
