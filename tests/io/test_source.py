"""Where files of published models are looked for, and what is said when they are nowhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file

from tests.io.hub import put_in_cache
from visexpert.errors import WeightsError
from visexpert.io.source import SMALL_FILES, WEIGHT_FILES, ModelSource
from visexpert.io.weights import read_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (path := tmp_path / "model").mkdir()
    save_file({"a": torch.ones(2)}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("openai/clip-vit-base-patch16", "openai/clip-vit-base-patch16", None),
        ("hf:openai/clip-vit-base-patch16", "openai/clip-vit-base-patch16", None),
        ("hf:timm/vit_x.lvd142m@v1.0", "timm/vit_x.lvd142m", "v1.0"),
        ("hf:org/name.pt", "org/name.pt", None),
        ("gpt2@refs/pr/12", "gpt2", "refs/pr/12"),
        ("hf:a/b@feature--x", "a/b", "feature--x"),
    ],
)
def test_ids_of_the_hub(text: str, repo: str, revision: str | None) -> None:
    source = ModelSource.parse(text)
    assert (source.path, source.repo, source.revision, source.file) == (None, repo, revision, None)


@pytest.mark.parametrize("text", ["./org/name", "/a/b", "~/models/clip", "a/b/c", "zoo:clip", "weights/clip.pt"])
def test_paths(text: str) -> None:
    assert ModelSource.parse(text).repo is None


def test_a_folder_that_is_here_is_no_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    text = f"{folder.parent.name}/model"
    assert ModelSource.parse(text).path == Path(text)
    assert ModelSource.parse(f"hf:{text}").path is None


@pytest.mark.parametrize(
    "name", ["", "a--b/c", "../x/y", "/etc/passwd", "a/b.git", "a/b.", "-a/b", "a./b", "a-/b", "a/b@", "a/b@../c"]
)
def test_what_is_no_id_is_refused(name: str) -> None:
    with pytest.raises(WeightsError, match=r"hf:ORG/NAME"):
        ModelSource.parse(f"hf:{name}")


def test_files_of_the_cache_are_found_without_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = put_in_cache(monkeypatch, tmp_path / "cache", "org/name", folder)
    source = ModelSource.parse("org/name")
    assert source.find("nothing.bin", "config.json") == snapshot / "config.json"
    assert source.read_json("config.json", owner="Test") == {"model_type": "clip"}
    assert read_source(source, owner="Test").tensors["a"].tolist() == [1, 1]


def test_what_is_nowhere_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    put_in_cache(monkeypatch, tmp_path / "cache", "org/name", tmp_path / "empty")
    source = ModelSource.parse("hf:org/name@v2")
    assert source.find("config.json") is None
    with pytest.raises(WeightsError) as caught:
        source.fetch(*WEIGHT_FILES, owner="TimmExpert")
    message = str(caught.value)
    for part in ("TimmExpert: model.safetensors, ", "'org/name' at revision 'v2'", str(tmp_path / "cache")):
        assert part in message
    assert "`hf download org/name --revision v2`" in message and "HF_HUB_OFFLINE" in message
    assert message.count("\n") == 0
    with pytest.raises(WeightsError, match=r"there is no .*/nowhere; .*folder"):
        ModelSource.parse(str(tmp_path / "nowhere")).fetch(*WEIGHT_FILES, owner="Test")


def test_split_weights_are_read_together(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for part in ("a", "b"):
        save_file({part: torch.ones(1)}, folder / f"{part}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}), encoding="utf-8")
    assert read_source(ModelSource.parse(str(folder)), owner="Test").tensors.keys() == {"a", "b"}
    wrong: list[dict[str, Any]] = [{"weight_map": {"a": "../../secret.safetensors"}}, {"weight_map": {}}, {}]
    for listed in wrong:
        index.write_text(json.dumps(listed), encoding="utf-8")
        with pytest.raises(WeightsError, match="its own folder"):
            read_source(ModelSource.parse(str(folder)), owner="Test")


def test_torch_files_are_read_without_running_them(tmp_path: Path) -> None:
    """As open_clip's training writes them: wrapped, and with DistributedDataParallel's prefix."""
    path = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "state_dict": {"module.x": torch.ones(1)}}, path)
    assert read_source(ModelSource.parse(str(path)), owner="Test").tensors.keys() == {"x"}
    torch.save({"x": torch.ones(1), "module.y": torch.ones(1)}, path)
    assert read_source(ModelSource.parse(str(path)), owner="Test").tensors.keys() == {"x", "module.y"}
    torch.save({"state_dict": {"x": 3}}, path)
    with pytest.raises(WeightsError, match="state dict"):
        read_source(ModelSource.parse(str(path)), owner="Test")
    torch.save({"x": Path("runs code when it is unpickled")}, path)
    with pytest.raises(WeightsError, match=r"names pathlib[\w.]*.*safetensors"):
        read_source(ModelSource.parse(str(path)), owner="Test")
    path.unlink()
    with pytest.raises(WeightsError, match=r"Test: no weights at .*epoch_3.pt"):
        read_source(ModelSource.parse(str(path)), owner="Test")


@pytest.mark.parametrize(
    ("header", "license"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: other\nlicense_name: dinov3-license", "dinov3-license"),
        ("tags: [x]", None),
    ],
)
def test_the_license_is_that_of_the_card(folder: Path, header: str, license: str | None) -> None:
    assert ModelSource.parse(str(folder)).license() is None
    (folder / "README.md").write_text(f"---\n{header}\n---\n# A model\n", encoding="utf-8")
    assert ModelSource.parse(str(folder)).license() == license


@pytest.mark.parametrize("text", ["[1]", "not json"])
def test_a_broken_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(WeightsError, match=r"Test: .*config.json"):
        ModelSource.parse(str(folder)).read_json("config.json", owner="Test")


class FakeHub:
    """A Hugging Face Hub with one repository, which downloads into the cache and notes what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path, files: Path) -> None:
        self.cache, self.files, self.asked = cache, files, list[tuple[str, str | None]]()
        self.snapshot = put_in_cache(monkeypatch, cache, "org/name", cache / "none", refs=("v2",))
        monkeypatch.setattr("visexpert.io.source.hf_hub_download", self.hf_hub_download)
        monkeypatch.setattr("visexpert.io.source.snapshot_download", self.snapshot_download)

    def hf_hub_download(self, repo: str, name: str, revision: str | None = None) -> str:
        self.asked.append((name, revision))
        if repo != "org/name" or not (self.files / name).is_file():
            raise EntryNotFoundError(name)
        shutil.copyfile(self.files / name, self.snapshot / name)
        return str(self.snapshot / name)

    def snapshot_download(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((" ".join(allow_patterns), revision))
        for pattern in allow_patterns:
            for path in self.files.glob(pattern):
                shutil.copyfile(path, self.snapshot / path.name)
        return str(self.snapshot)


def test_what_is_not_here_is_fetched_once__at_its_revision(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "a.bin", "b": "b.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    for part in ("a", "b"):
        torch.save({part: torch.ones(1)}, folder / f"{part}.bin")
    hub = FakeHub(monkeypatch, tmp_path / "cache", folder)
    source = ModelSource.parse("hf:org/name@v2")
    for _ in range(2):
        assert source.folder("config.json", owner="Test") == hub.snapshot
        assert source.fetch_weights(owner="Test") == hub.snapshot / "pytorch_model.bin.index.json"
    assert hub.asked == [(" ".join(SMALL_FILES), "v2"), ("a.bin", "v2"), ("b.bin", "v2")]
    with pytest.raises(WeightsError, match="`hf download org/name --revision v3`"):
        ModelSource.parse("hf:org/name@v3").fetch("nothing.json", owner="Test")
    assert hub.asked[3:] == [("nothing.json", "v3")]
