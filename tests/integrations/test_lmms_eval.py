"""A run as a model of lmms-eval, against the interface of its class ``lmms`` (0.6 to 0.7.3), which stands in here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.captioners import captioner
from visexpert.data import read_image
from visexpert.errors import ConfigError, DataError
from visexpert.language import Decoding

COLORS = ("red", "blue", "green", "white")
QUESTION = "<image>\nhow many objects are there ?"


class Base:
    """What lmms-eval's own base class gives a model."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}
        self.partial: list[tuple[str, Any, str]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *what: self.partial.append(what))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``visexpert.integrations.lmms_eval`` beside a stand-in of lmms-eval."""
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Base  # type: ignore[attr-defined]
    yield importlib.import_module("visexpert.integrations.lmms_eval")
    sys.modules.pop("visexpert.integrations.lmms_eval")


@pytest.fixture
def make(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Builds the model around a tiny random run."""
    run = captioner(tmp_path).run
    monkeypatch.setattr(module, "load_run", lambda folder, trust=(): run)

    def build(**options: Any) -> Any:
        model = module.VisexpertModel("runs/tove", device="cpu", **options)
        documents = [{"images": [Image.new("RGB", (40 + 8 * i, 48), name)]} for i, name in enumerate(COLORS)]
        model.task_dict["tiny"] = {"test": [*documents, {"images": []}, {"images": documents[0]["images"] * 2}]}
        return model

    return build


def ask(*numbers: int, settings: dict[str, Any] | None = None) -> list[Any]:
    """Requests as lmms-eval makes them of a task of the simple kind."""
    kwargs: dict[str, Any] = {
        "max_new_tokens": 16,
        "temperature": 0.0,
        "top_p": 1.0,
        "num_beams": 1,
        "do_sample": False,
    }
    kwargs |= {"until": ["\n\n"]} if settings is None else settings
    visuals: Callable[[Any], list[Any]] = lambda document: document["images"]  # noqa: E731
    return [SimpleNamespace(args=(QUESTION, dict(kwargs), visuals, number, "tiny", "test")) for number in numbers]


def test_it_answers_as_the_run_does_in_the_order_of_the_questions(make: Callable[..., Any], tmp_path: Path) -> None:
    model = make(batch_size="2")
    answers = model.generate_until(ask(2, 0, 3, 1, 0))
    own = captioner(tmp_path)
    images = [Image.new("RGB", (40 + 8 * i, 48), COLORS[i]) for i in (2, 0, 3, 1, 0)]
    path = tmp_path / "image.png"
    expected = []
    for image in images:
        image.save(path)
        said = next(own.caption([path], "how many objects are there ?", decoding=Decoding(max_new_tokens=16)))
        assert said.answer is not None
        expected.append(said.answer.text)
    assert answers == expected and len(set(answers)) > 1
    assert [entry[2] for entry in model.partial] == answers and model.partial[0][0] == "generate_until"
    assert model.device.type == "cpu" and model.is_simple


def test_it_reads_images_as_caption_does(make: Callable[..., Any], tmp_path: Path) -> None:
    model = make()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    clear = Image.new("RGBA", (40, 48), (255, 0, 0, 0))
    deep = Image.fromarray(np.full((40, 48), 40_000, dtype=np.uint16))
    turned = Image.fromarray(np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    clear.save(tmp_path / "0.png")
    deep.save(tmp_path / "1.png")
    turned.save(tmp_path / "2.png", exif=exif)
    images = [Image.open(tmp_path / f"{number}.png") for number in range(3)]
    model.task_dict["odd"] = {"test": [{"images": [image]} for image in images]}
    for number in range(3):
        torch.testing.assert_close(model._image(ask_of("odd", number)), read_image(tmp_path / f"{number}.png"))
    assert int(model._image(ask_of("odd", 0)).min()) == 255


def ask_of(task: str, number: int) -> Any:
    (request,) = ask(number)
    request.args = (*request.args[:4], task, "test")
    return request


def test_settings_of_tasks_mean_what_they_say(module: ModuleType) -> None:
    decoding_of, until = module.decoding_of, module.until
    assert decoding_of({"until": ["ASSISTANT:"]}, max_new_tokens=7) == (Decoding(max_new_tokens=7), ("ASSISTANT:",))
    beams, _ = decoding_of({"num_beams": 3, "max_new_tokens": 5}, max_new_tokens=7)
    assert beams == Decoding(strategy="beam", num_beams=3, max_new_tokens=5)
    drawn, _ = decoding_of({"temperature": 0.7, "top_p": 0.9, "do_sample": True}, max_new_tokens=7)
    assert drawn == Decoding(strategy="sample", temperature=0.7, top_p=0.9, max_new_tokens=7)
    with pytest.raises(ConfigError, match="'repetition_penalty'"):
        decoding_of({"repetition_penalty": 2}, max_new_tokens=7)
    assert until("two\n\nthree", ["\n\n", "hr"]) == "two" and until("two", []) == "two"


@pytest.mark.parametrize(("number", "count"), [(4, 0), (5, 2)])
def test_questions_without_one_image_are_refused(make: Callable[..., Any], number: int, count: int) -> None:
    with pytest.raises(DataError, match=f"Question {number} of tiny has {count} visuals"):
        make().generate_until(ask(number))


def test_what_a_run_cannot_do_is_refused_in_a_sentence(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="no argument 'pretrained'"):
        make(pretrained="x")
    assert make(max_batch_size=4, batch_size="auto").batch_size == 1
    for refused in (make().loglikelihood, make().generate_until_multi_round):
        with pytest.raises(ConfigError, match="choose tasks"):
            refused(ask(0))


def test_each_process_takes_its_own_gpu(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.own_device("cpu") == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    assert module.own_device("cuda:0") == "cuda:2"


def test_the_manifest_names_a_class_that_exists(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lmms_eval.models", ModuleType("lmms_eval.models"))
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", registry)
    from visexpert.integrations import lmms_manifest

    found = lmms_manifest()
    home, _, name = found.simple_class_path.rpartition(".")
    assert found.model_id == "visexpert" and getattr(importlib.import_module(home), name) is module.VisexpertModel
