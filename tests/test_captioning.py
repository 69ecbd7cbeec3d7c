"""Captions for images from anywhere: preprocessing, batches, gates, experts switched off, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tests.captioners import captioner, lively
from tests.methods.helpers import tiny_tove
from visexpert.captioning import Answer, Captioner
from visexpert.data import COCOCaptions, read_image
from visexpert.data.images import Resize
from visexpert.errors import ConfigError, DataError
from visexpert.language import Decoding
from visexpert.methods import ToVE
from visexpert.runs import SavedRun
from visexpert.tabletop.texts import tabletop_tokenizer
from visexpert.types import Batch

SIDE = 48
"""The largest input among the tiny CLIP (32) and experts (48, 32, 48)."""

PROMPT = "how many objects are there ?"


def noise(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """uint8 images (3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def gates(answer: Answer) -> NDArray[Any]:
    assert answer.gates_HWK is not None
    return answer.gates_HWK


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def test_it_says_what_the_model_says(tmp_path: Path) -> None:
    """The path of evaluation by hand, on images that need no resizing."""
    caption, images = captioner(tmp_path), noise((SIDE, SIDE), (SIDE, SIDE))
    answers = caption.answer([caption.frame(image) for image in images], PROMPT)
    model, tokenizer = caption.run.model, caption.run.tokenizer
    vision = model.encode(Batch(torch.stack(images), torch.arange(2), split=""))
    prompt = [tokenizer.bos_token_id, *tokenizer(PROMPT)["input_ids"]]
    written = model.language.generate(vision, [prompt, prompt], eos_id=tokenizer.eos_token_id)
    assert texts(answers) == [tokenizer.decode(row, skip_special_tokens=True).strip() for row in written]
    assert vision.gates_BTK is not None
    for answer, gates_TK in zip(answers, vision.gates_BTK.detach().numpy(), strict=True):
        assert answer.experts == ("semantic", "depth", "edges")
        assert gates(answer).shape == (4, 4, 3)
        np.testing.assert_allclose(gates(answer).reshape(16, 3), gates_TK, atol=1e-5)
        assert answer.shares == pytest.approx(dict(zip(answer.experts, gates_TK.mean(0), strict=True)), abs=1e-5)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (torch.rand(3, 8, 8), r"float32 \(3, 8, 8\)"),  # divided by 255 it would be black
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"uint8 \(1, 3, 8, 8\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"uint8 \(8, 8, 3\)"),
        (np.zeros((3, 8, 8), dtype=np.uint8), "ndarray"),
    ],
)
def test_images_in_another_form_are_refused(tmp_path: Path, image: Any, found: str) -> None:
    with pytest.raises(DataError, match=rf"uint8 tensor \(3, H, W\).*read_image.*got {found}"):
        captioner(tmp_path).frame(image)


def test_prompts_and_pictures_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    caption = captioner(tmp_path)
    picture: Any = caption.frame(noise((SIDE, SIDE))[0])
    assert caption.answer([], PROMPT) == []
    with pytest.raises(DataError, match="2 pictures.*got 1"):
        caption.answer([picture, picture], [PROMPT])
    for pictures in (picture, [picture.image_CHW]):
        with pytest.raises(DataError, match=r"list.*frame"):
            caption.answer(pictures, PROMPT)


def test_images_of_any_size_in_one_batch_equal_one_by_one(tmp_path: Path) -> None:
    caption = captioner(tmp_path)
    squares = [caption.frame(image) for image in noise((20, 90), (300, 7), (1, 1), (SIDE, SIDE))]
    prompts = ["list objects", PROMPT, "is there a cube ?", ""]
    together = caption.answer(squares, prompts)
    for index, (square, prompt) in enumerate(zip(squares, prompts, strict=True)):
        alone = caption.answer([square], prompt)[0]
        assert alone.text == together[index].text
        np.testing.assert_allclose(gates(alone), gates(together[index]), atol=1e-5)
    assert len(set(texts(together))) == 4
    assert caption.answer(squares[:1], ["list objects"])[0].image_HW3.shape == (SIDE, SIDE, 3)


def test_the_square_holds_the_whole_image(tmp_path: Path) -> None:
    caption = captioner(tmp_path)
    image = torch.zeros(3, 60, 300, dtype=torch.uint8)
    image[0, :, :150] = 255
    image[1, 30:] = 255
    square = caption.frame(image).image_CHW
    assert square.shape == (3, SIDE, SIDE) and 0 <= float(square.min()) and float(square.max()) <= 1
    assert square[0, :, : SIDE // 2 - 3].min() > 0.99 and square[0, :, SIDE // 2 + 3 :].max() < 0.01
    assert square[1, SIDE // 2 + 3 :].min() > 0.99 and square[1, : SIDE // 2 - 3].max() < 0.01


def test_without_experts_the_square_is_what_clip_makes_of_the_image(tmp_path: Path) -> None:
    model = tiny_tove(use=[])
    caption = captioner(tmp_path, model=model)
    image = noise((75, 40))[0]
    assert caption.side == 32 and caption.experts == ()
    own = model.clip.preprocess(image[None].float() / 255)
    torch.testing.assert_close(model.clip.preprocess(caption.frame(image).image_CHW[None]), own)
    answer = caption.answer([caption.frame(image)], PROMPT)[0]
    assert answer.gates_HWK is None and answer.shares is None and answer.experts == ()


def test_experts_switched_off_are_as_if_detached_and_come_back(tmp_path: Path) -> None:
    caption, fewer = captioner(tmp_path), captioner(tmp_path, model=lively(tiny_tove(detached=["depth"])))
    squares = [caption.frame(image) for image in noise((50, 50), (60, 60))]
    whole = caption.answer(squares, PROMPT)
    without = caption.answer(squares, PROMPT, experts=["semantic", "edges"])
    for answer, expected in zip(without, fewer.answer(squares, PROMPT), strict=True):
        assert answer.text == expected.text and answer.experts == expected.experts == ("semantic", "edges")
        np.testing.assert_allclose(gates(answer), gates(expected), atol=1e-6)
        np.testing.assert_allclose(gates(answer).sum(-1), 1, atol=1e-5)
    assert texts(without) != texts(whole)
    nobody = caption.answer(squares, PROMPT, experts=[])
    assert nobody[0].gates_HWK is None
    again = caption.answer(squares, PROMPT)
    assert texts(again) == texts(whole) and np.array_equal(gates(again[0]), gates(whole[0]))


def test_experts_come_back_after_an_error(tmp_path: Path) -> None:
    caption = captioner(tmp_path)
    square = caption.frame(noise((50, 50))[0])
    with pytest.raises(DataError, match="longer than max_tokens=48"):
        caption.answer([square], "red " * 60, experts=["edges"])
    with pytest.raises(ConfigError, match=r"uses no expert 'smell'; it has semantic, depth, edges"):
        caption.answer([square], PROMPT, experts=["edges", "smell"])
    assert isinstance(caption.run.model, ToVE)
    assert caption.run.model.hub.attached == ("semantic", "depth", "edges")
    detached = captioner(tmp_path, model=tiny_tove(detached=["depth"]))  # its weights were never loaded
    with pytest.raises(ConfigError, match="uses no expert 'depth'"):
        detached.answer([square], PROMPT, experts=["depth"])


def test_threads_do_not_mix_their_experts(tmp_path: Path) -> None:
    caption = captioner(tmp_path)
    square = caption.frame(noise((SIDE, SIDE))[0])
    choices = [["semantic"], ["depth", "edges"], [], ["semantic", "depth", "edges"]] * 5

    def shares(choice: list[str]) -> Any:
        return caption.answer([square], PROMPT, experts=choice)[0].shares

    alone = [shares(choice) for choice in choices]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(shares, choices)) == alone


def write(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        image = noise((40 + index, 60), seed=index)[0]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
    return [folder / name for name in names]


@pytest.mark.parametrize("strategy", ["greedy", "beam", "sample"])
def test_files_come_in_order_whatever_the_batch_size(tmp_path: Path, strategy: Any) -> None:
    paths = write(tmp_path / "images", "c.png", "a.png", "b.png", "d.png", "e.png")
    paths.insert(1, tmp_path / "absent.png")
    paths.append(tmp_path / "broken.jpg")
    paths[-1].write_bytes(b"\xff\xd8\xff no image")
    decoding = Decoding(strategy=strategy, temperature=5.0, max_new_tokens=6, seed=3)
    runs = []
    for batch_size in (1, 2, 16):
        entries = list(captioner(tmp_path, batch_size=batch_size).caption(paths, PROMPT, decoding=decoding))
        assert [entry.path for entry in entries] == paths
        runs.append([None if entry.answer is None else entry.answer.text for entry in entries])
        assert [entry.error is not None for entry in entries] == [False, True, False, False, False, False, True]
        assert "absent.png does not exist" in str(entries[1].error) and "cannot be read" in str(entries[-1].error)
    assert runs[0] == runs[1] == runs[2]
    assert len(set(runs[0])) > 2


def test_words_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    caption = captioner(tmp_path)
    assert caption.unknown_words("What colour is the red cube?") == []
    assert caption.unknown_words("how old is the Zebra, the zebra and Zebra") == ["old", "Zebra", ",", "zebra"]
    assert "eos" in caption.unknown_words("is there <eos> a cube ?")  # the user's words never become special tokens


def test_the_default_prompt_is_the_one_of_training(tmp_path: Path) -> None:
    caption = captioner(tmp_path)
    assert caption.default_prompt == "describe the image"
    other = LightningDataModule()
    other.tokenizer = caption.run.tokenizer  # type: ignore[attr-defined]
    stranger = Captioner(SavedRun(tmp_path, {}, caption.run.model, other, 0))
    with pytest.raises(ConfigError, match=r"trained on LightningDataModule, for which no caption prompt .* the prompt"):
        _ = stranger.default_prompt


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0, but must be at least 1"):
        captioner(tmp_path, batch_size=0)
    with pytest.raises(ConfigError, match="The device 'gpu7' cannot be used"):
        captioner(tmp_path, device="gpu7")


@pytest.mark.parametrize("resize", ["pad", "crop", "stretch"])
def test_images_are_framed_as_in_training(resize: Resize, tmp_path: Path) -> None:
    """The pixels that the model reads are those that the run's own data make of the same file."""
    (image_CHW,) = noise((20, 50))
    Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).save(tmp_path / "wide.png")
    data = COCOCaptions(root=str(tmp_path), image_size=24, resize=resize)
    data._tokenizer = tabletop_tokenizer()
    caption = Captioner(SavedRun(tmp_path, {}, captioner(tmp_path).run.model, data, 0))
    picture = caption.frame(read_image(tmp_path / "wide.png"))
    trained = data.settings.reader().read(str(tmp_path / "wide.png"), name="wide")
    torch.testing.assert_close(picture.image_CHW, trained.image_CHW / 255.0)
    assert picture.original_hw == trained.original_hw == (20, 50)


def test_what_is_printed_of_an_answer_and_a_run_is_short() -> None:
    gates = np.broadcast_to(np.array([0.25, 0.75]), (4, 4, 2))
    answer = Answer("a red cube", ("depth", "edges"), gates, np.zeros((8, 8, 3)))
    assert repr(answer) == "Answer('a red cube', image 8x8, depth 0.25, edges 0.75)"
    assert repr(replace(answer, gates_HWK=None)) == "Answer('a red cube', image 8x8, depth, edges)"
    run = SavedRun(Path("runs/tove"), {"model": {}}, tiny_tove(), LightningDataModule(), 1200)
    assert repr(run) == "SavedRun('runs/tove', ToVE, LightningDataModule, 1,200 steps)"
