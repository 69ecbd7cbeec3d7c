"""A source means the same to an expert, to CLIP, to a language model and to a tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tests.data.formats import tokenizer_folder
from tests.io.hub import put_in_cache
from tests.language.helpers import llama
from visexpert.data.needs import load_tokenizer
from visexpert.errors import WeightsError
from visexpert.experts import TransformersExpert
from visexpert.io import source as source_module
from visexpert.language import PrefixLM
from visexpert.vision import ClipEncoder

V2, PULL, UNKNOWN = "b" * 40, "c" * 40, "d" * 40
WIDTH = 16


def mark_weights(model: torch.nn.Module, folder: Path, place: int) -> None:
    """Write a model whose first weight says where it lies."""
    with torch.no_grad():
        next(model.parameters()).flatten()[0] = place
    model.save_pretrained(folder)  # type: ignore[operator]


def clip_folder(folder: Path, place: int) -> None:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=8,
    )
    mark_weights(CLIPVisionModel(config), folder, place)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)


def llama_folder(folder: Path, place: int) -> None:
    fields = {name: value for name, value in llama().items() if name != "model_type"}
    mark_weights(LlamaForCausalLM(LlamaConfig(**fields)), folder, place)


def marked_tokenizer(folder: Path, place: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(tokenizer_folder(folder)) / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": place}), encoding="utf-8")


def place_of_module(module: Any) -> int:
    module.load_weights()
    return int(next(module.parameters()).flatten()[0])


READERS: dict[str, tuple[Callable[[Path, int], None], Callable[[str], int]]] = {
    "expert": (clip_folder, lambda text: place_of_module(TransformersExpert(source=text))),
    "clip": (clip_folder, lambda text: place_of_module(ClipEncoder(source=text))),
    "language": (llama_folder, lambda text: place_of_module(PrefixLM(source=text))),
    "tokenizer": (marked_tokenizer, lambda text: int(load_tokenizer(text).model_max_length)),
}

FOUND = {
    "models/tiny": 1,
    "./models/tiny": 1,
    "~/models/tiny": 1,
    "local-dir:models/tiny": 1,
    "zoo:shipped": 2,
    "org/tiny": 3,
    "org/tiny/": 3,
    "hf:org/tiny": 3,
    "hf-hub:org/tiny": 3,
    "hf_hub:org/tiny": 3,
    "hf:org/tiny@main": 3,
    "hf:org/tiny@v2": 4,
    "org/tiny@v2": 4,
    f"hf:org/tiny@{V2}": 4,
    "hf:org/tiny@refs/pr/1": 5,
    "hf:single": 6,
    "single": 6,
}
"""What a source means: the number that the files there bear."""

REFUSED = {
    "org/none": "`hf download org/none`",
    "hf:org/none": "`hf download org/none`",
    "nothing": "`hf download nothing`",
    "hf:models/tiny": "`hf download models/tiny`",
    "hf:org/tiny@v9": "`hf download org/tiny --revision v9`",
    f"org/tiny@{UNKNOWN}": f"`hf download org/tiny --revision {UNKNOWN}`",
    "hf:": "ORG/NAME",
    "hf:../tiny": "ORG/NAME",
    "hf:org/tiny@": "ORG/NAME",
    "hf:org/tiny@../x": "ORG/NAME",
    "hf:a/b/c": "ORG/NAME",
    "./nowhere": "there is no nowhere",
    "local-dir:org/tiny": "there is no org/tiny",
    "no/where/at-all": "there is no no/where/at-all",
    "models": "in models",
    "zoo:nothing": "['shipped']",
    "zoo:../models": "['shipped']",
}
"""Sources that lead nowhere, and what the one sentence about them must say."""


@pytest.fixture(scope="module", params=READERS)
def read(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], int]]:
    """Ask a reader for a source, in a folder with models in all places."""
    make, ask = READERS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    make(root / "models" / "tiny", 1)
    make(root / "zoo" / "shipped", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("HOME", str(root))
        patch.setattr(source_module, "ZOO", root / "zoo")
        places: list[tuple[str, str, tuple[str, ...]]] = [
            ("org/tiny", "a" * 40, ("main",)),
            ("org/tiny", V2, ("v2",)),
            ("org/tiny", PULL, ("refs/pr/1",)),
            ("single", "e" * 40, ("main",)),
        ]
        for number, (repo, commit, refs) in enumerate(places, start=3):
            make(root / "made", number)
            put_in_cache(patch, root / "cache", repo, root / "made", commit=commit, refs=refs)
            shutil.rmtree(root / "made")
        yield ask


@pytest.mark.parametrize(("text", "place"), FOUND.items())
def test_a_source_means_the_same_to_all(read: Callable[[str], int], text: str, place: int) -> None:
    assert read(text) == place


@pytest.mark.parametrize(("text", "named"), REFUSED.items())
def test_a_source_that_leads_nowhere_is_refused_alike(read: Callable[[str], int], text: str, named: str) -> None:
    with pytest.raises(WeightsError) as caught:
        read(text)
    message = str(caught.value)
    assert named in message and message.count("\n") == 0
