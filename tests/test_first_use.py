"""Parts from Python: read on first use, images checked, short to print, opened by load_run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import visexpert as vx
from tests.methods.helpers import noise_batch, tiny_tove
from visexpert.experts import hub as hub_module

IMAGES = torch.rand(2, 3, 64, 64)


def tokens_of(given: Any) -> Tensor:
    return given.tokens_BTD if hasattr(given, "tokens_BTD") else given.tokens_BSE  # type: ignore[no-any-return]


MAKERS: dict[str, Callable[[], Any]] = {
    "encoder": lambda: vx.ClipEncoder(source="zoo:clip"),
    "expert": lambda: vx.TinyExpert(source="zoo:edges"),
}


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_a_part_reads_its_weights_when_it_is_first_called(kind: str) -> None:
    fresh, loaded = MAKERS[kind](), MAKERS[kind]()
    loaded.load_weights()
    assert "not read yet" in repr(fresh) and "not read yet" not in repr(loaded)
    assert not fresh.weights_in_place and loaded.weights_in_place
    assert torch.equal(tokens_of(fresh(IMAGES)), tokens_of(loaded(IMAGES)))
    assert fresh.weights_in_place and fresh.fingerprint() == MAKERS[kind]().fingerprint()


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_weights_that_were_put_in_otherwise_are_kept(kind: str) -> None:
    part, other = MAKERS[kind](), MAKERS[kind]()
    other.load_weights()
    for parameter in other.parameters():
        parameter.add_(0.01)
    part.load_state_dict(other.state_dict())
    assert torch.equal(tokens_of(part(IMAGES)), tokens_of(other(IMAGES)))
    twin = copy.deepcopy(other)
    assert torch.equal(tokens_of(twin(IMAGES)), tokens_of(other(IMAGES)))


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda part: pickle.loads(pickle.dumps(part)),
    "compiled": lambda part: torch.compile(part, backend="eager"),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_copies_read_their_weights_too_and_nothing_is_left_to_do_at_later_calls(kind: str, how: str) -> None:
    part, loaded = MAKERS[kind](), MAKERS[kind]()
    loaded.load_weights()
    twin = COPIES[how](part)
    for each in (twin, part):
        torch.testing.assert_close(tokens_of(each(IMAGES)), tokens_of(loaded(IMAGES)))
    for each in (twin, part, loaded):
        assert each.weights_in_place and not each._forward_pre_hooks


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_what_a_state_lacks_is_read_and_what_it_holds_is_kept(kind: str) -> None:
    """As a checkpoint may hold a LoRA without its base."""
    part, loaded = MAKERS[kind](), MAKERS[kind]()
    loaded.load_weights()
    for parameter in loaded.parameters():
        parameter.add_(0.01)
    names = [name for name, _ in loaded.named_parameters()]
    state = loaded.state_dict()
    part.load_state_dict({name: state[name] for name in names[::2]}, strict=False)
    assert not part.weights_in_place
    part(IMAGES)
    assert part.weights_in_place
    read = dict(part.named_parameters())
    assert all(torch.equal(read[name], state[name]) for name in names[::2])
    for name in names[1::2]:
        torch.testing.assert_close(read[name], state[name] - 0.01)


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_states_that_hold_all_weights_together_leave_nothing_to_read(kind: str) -> None:
    part, other = MAKERS[kind](), MAKERS[kind]()
    names = list(other.state_dict())
    for half in (names[::2], names[1::2]):
        assert not part.weights_in_place
        part.load_state_dict({name: other.state_dict()[name] for name in half}, strict=False)
    assert part.weights_in_place


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_a_state_without_a_parts_weights_leaves_them_to_be_read(kind: str) -> None:
    """As a checkpoint leaves frozen parts out."""
    part, loaded = MAKERS[kind](), MAKERS[kind]()
    loaded.load_weights()
    whole = torch.nn.ModuleDict({"part": part, "head": torch.nn.Linear(2, 2)})
    whole.load_state_dict({f"head.{key}": value for key, value in whole["head"].state_dict().items()}, strict=False)
    assert not part.weights_in_place
    assert torch.equal(tokens_of(part(IMAGES)), tokens_of(loaded(IMAGES)))


def test_weights_that_are_nowhere_are_told_at_the_first_call() -> None:
    missing = vx.ClipEncoder(source="openai/clip-vit-base-patch16", architecture="ViT-B-16-quickgelu")
    with pytest.raises(vx.WeightsError, match="openai/clip-vit-base-patch16"):
        missing(IMAGES)


@torch.no_grad()
def test_an_expert_that_is_attached_later_is_read_then(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = vx.ExpertHub({"edges": vx.TinyExpert(source="zoo:edges")}, detached=["edges"])
    experts.load_weights()
    assert not experts["edges"].weights_in_place and "detached" in repr(experts)
    checked: list[str] = []
    monkeypatch.setattr(hub_module, "check_repeats", lambda expert, name: checked.append(name))
    experts.attach("edges")
    found = experts(vx.Batch(IMAGES, torch.arange(2), ""))["edges"].tokens_BSE
    assert checked == ["edges"] and torch.equal(found, vx.TinyExpert(source="zoo:edges")(IMAGES).tokens_BSE)


@torch.no_grad()
def test_a_language_model_is_read_before_it_writes() -> None:
    settings: dict[str, Any] = {"vocab_size": 96, "width": 64, "depth": 2, "heads": 4, "mlp_ratio": 2}
    language = vx.CrossAttentionDecoder(**settings, position_scale=0.7, source="zoo:language.safetensors")
    loaded = vx.CrossAttentionDecoder(**settings, position_scale=0.7, source="zoo:language.safetensors")
    loaded.load_weights()
    vision = vx.ClipEncoder(source="zoo:clip")(IMAGES)
    vision = replace(vision, tokens_BTD=vision.tokens_BTD[..., :64])
    asked: Any = {"prompts": [[1, 7], [1, 8]], "eos_id": 2, "max_new_tokens": 4}
    assert language.generate(vision, **asked) == loaded.generate(vision, **asked)


WRONG = {
    "bytes": (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
    "0 to 255": (torch.full((1, 3, 8, 8), 200.0), "200"),
    "normalized": (torch.randn(1, 3, 8, 8) - 3, r"\[0, 1\]"),
    "NaN": (torch.full((1, 3, 8, 8), torch.nan), "nan"),
    "no batch": (torch.rand(3, 8, 8), r"\(3, 8, 8\)"),
    "channels last": (torch.rand(1, 8, 8, 3), r"\(1, 8, 8, 3\)"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_images_are_refused_by_what_they_are(kind: str) -> None:
    images, words = WRONG[kind]
    model = tiny_tove()
    for entry in (model.clip, model.hub["semantic"]):
        with pytest.raises(vx.DataError, match=words):
            entry(images)
    if images.is_floating_point() and kind != "no batch":
        with pytest.raises(vx.DataError, match=words):
            model.encode(vx.Batch(images, torch.arange(1), ""))


def test_a_training_step_trusts_what_the_data_give() -> None:
    """A look at the values would wait for the device; see tests/methods/test_waits.py."""
    batch = noise_batch()
    assert tiny_tove().step(replace(batch, images_BCHW=batch.images_BCHW.float() * 2)).loss.isfinite()


def test_what_is_printed_is_short() -> None:
    model = tiny_tove(detached=["depth"])
    lines = repr(model).splitlines()
    assert len(lines) <= 12 and lines[0] == "ToVE(" and max(map(len, lines)) < 160
    assert any("depth: detached" in line for line in lines) and any(
        "ClipEncoder(random, layer -2" in line for line in lines
    )
    assert len(repr(noise_batch())) < 500 and "uint8[2, 3, 20, 20]" in repr(noise_batch())


def test_a_checkpoint_alone_is_refused_with_what_opens_its_run() -> None:
    with pytest.raises(vx.ConfigError, match=r"visexpert\.load_run\('runs/tove'\)"):
        vx.ToVE.load_from_checkpoint(Path("runs/tove/checkpoints/last.ckpt"))


EMPTY = {
    "no image": (torch.rand(0, 3, 8, 8), r"\(0, 3, 8, 8\)"),
    "no row": (torch.rand(1, 3, 0, 8), r"\(1, 3, 0, 8\)"),
    "no tensor": (None, "NoneType"),
    "sparse": (torch.rand(1, 3, 8, 8).to_sparse(), "sparse"),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_what_no_encoder_could_read_is_refused_at_every_entry(kind: str) -> None:
    images: Any = EMPTY[kind][0]
    model = tiny_tove()
    batch = vx.Batch(images, torch.arange(1), "")
    entries: list[tuple[Callable[[Any], Any], Any]] = [(model.clip, images), (model.hub["semantic"], images)]
    entries += [(model.hub, batch), (model.encode, batch)]
    for entry, given in entries:
        with pytest.raises(vx.DataError, match=EMPTY[kind][1]):
            entry(given)


@pytest.mark.parametrize("kind", MAKERS)
def test_images_on_another_device_are_refused(kind: str) -> None:
    with pytest.raises(vx.DataError, match="images are on cpu, .* meta"):
        MAKERS[kind]().to("meta")(IMAGES)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_a_batch_of_numbers_without_a_known_range_is_refused(dtype: torch.dtype) -> None:
    """As floats they would be 255 times too bright."""
    model, batch = tiny_tove(), replace(noise_batch(), images_BCHW=torch.ones(2, 3, 8, 8, dtype=dtype))
    for entry in (model.encode, model.step, model.hub):
        with pytest.raises(vx.DataError, match=str(dtype)):
            entry(batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_images_of_other_precision_give_the_same_tokens_as_their_values(kind: str, dtype: torch.dtype) -> None:
    part, images = MAKERS[kind](), IMAGES[:1, :, :40].to(dtype)
    torch.testing.assert_close(tokens_of(part(images)), tokens_of(part(images.float())), rtol=1e-4, atol=1e-4)


def test_images_alone_are_no_batch() -> None:
    model = tiny_tove()
    entries: list[Callable[[Any], Any]] = [model.encode, model.hub]
    for entry in entries:
        with pytest.raises(vx.ConfigError, match="batch is a Tensor, but must be a Batch"):
            entry(IMAGES)


@torch.no_grad()
def test_prompts_that_do_not_go_with_the_images_are_refused() -> None:
    model = tiny_tove()
    vision = model.encode(noise_batch())
    for prompts, told in (([[1]], "1 prompts"), ([[1], []], r"\[1, 0\]"), ([[1], [2], [3]], "3 prompts")):
        with pytest.raises(vx.DataError, match=told):
            model.language.generate(vision, prompts, eos_id=2)
    with pytest.raises(vx.ConfigError, match="prompts is a list: item 0 of item 1 of list"):
        model.language.generate(vision, [[1], ["a"]], eos_id=2)  # type: ignore[list-item]
    with pytest.raises(vx.ConfigError, match="vision is a Tensor"):
        model.language.generate(vision.tokens_BTD, [[1], [2]], eos_id=2)  # type: ignore[arg-type]


def test_a_method_called_with_a_batch_encodes_it_and_names_what_is_none() -> None:
    method = tiny_tove().eval()
    batch = noise_batch()
    with torch.no_grad():
        assert torch.equal(method(batch).tokens_BTD, method.encode(batch).tokens_BTD)
    for given in (IMAGES, None):
        with pytest.raises(vx.errors.ConfigError) as error:
            method(given)
        assert type(given).__name__ in str(error.value) and "Batch" in str(error.value)


def test_data_modules_print_in_one_line_and_read_nothing(tmp_path: Path) -> None:
    source = vx.ImageTable(root=str(tmp_path / "photos"), train="t", image_size=96, batch_size=5, train_fraction=0.5)
    modules = {
        source: ("ImageTable(", "photos", "train,", "0.5 of train", "96 px", "batches of 5", "no text"),
        vx.ImageShards(root="a", train="b.tar", val="c.tar", tokenizer="words"): ("train + val", "tokenizer words"),
        vx.MixedData(sources={"mine": source}, train={"mine": None}): ("MixedData(train: mine)",),
        vx.TabletopData(num_train=1000, num_val=2, num_test=3): ("1,000 train", "2 val", "3 test", "batches of 32"),
    }
    for module, parts in modules.items():
        assert str(module) == repr(module) and len(repr(module).splitlines()) == 1 and len(repr(module)) < 200
        assert all(part in repr(module) for part in parts), repr(module)


def test_every_public_class_that_opens_or_reads_something_prints_in_words() -> None:
    plain = [
        name
        for name in vx.__all__
        if isinstance(kind := getattr(vx, name), type)
        and not issubclass(kind, BaseException)
        and kind.__repr__ is object.__repr__
    ]
    assert plain == []
