"""What the page shows for an image and a prompt, without the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.captioners import captioner, lively
from tests.methods.helpers import tiny_experts, tiny_tove
from visexpert.app.session import Model, Session, example_prompts, gate_overlay, open_session, write_examples
from visexpert.data import read_image
from visexpert.errors import ConfigError, DataError
from visexpert.methods import ToVE
from visexpert.tabletop.datamodule import EXAMPLE_PROMPTS

ALL = ("semantic", "depth", "edges")
PROMPT = "how many objects are there ?"


def test_every_model_answers_as_it_does_alone(session: Session, picture: Path) -> None:
    reply = session.ask(picture, PROMPT, ALL)
    image = read_image(picture)
    alone = [
        model.captioner.answer([model.captioner.frame(image)], PROMPT)[0].text
        for model in (session.main, *session.others)
    ]
    assert reply.rows == (
        ("ToVE: all of its 3 experts", alone[0], "0.500"),
        ("detached: all of its 2 experts", alone[1], "0.250"),
        ("merged: encoder alone", alone[2], "not measured"),
    )
    assert reply.text == alone[0] and reply.note == ""
    assert len(set(alone)) > 1


def test_with_experts_off_the_whole_model_is_shown_beside(session: Session, picture: Path) -> None:
    whole, fewer = session.ask(picture, PROMPT, ALL), session.ask(picture, PROMPT, ["depth"])
    assert fewer.rows[0] == ("ToVE: depth", fewer.text, "below 0.500")
    assert fewer.rows[1:] == whole.rows
    nobody = session.ask(picture, PROMPT, [])
    assert nobody.rows[0][0] == "ToVE: no expert" and nobody.overlay is None
    assert session.ask(picture, PROMPT, ALL).rows == whole.rows
    assert isinstance(session.main.captioner.run.model, ToVE)
    assert session.main.captioner.run.model.hub.attached == ALL


def test_the_model_is_said_to_know_rendered_scenes_only(session: Session) -> None:
    assert "only Tabletop's rendered scenes" in session.warning


def test_unknown_words_are_named(session: Session, picture: Path) -> None:
    note = session.ask(picture, "where is the zebra ?", ALL).note
    assert note == "The vocabulary lacks: where, zebra. The model reads <unk> instead."


def test_limits_and_broken_files_are_one_sentence_without_our_folders(
    session: Session, picture: Path, tmp_path: Path
) -> None:
    small = Session([session.main], max_pixels=80 * 50 - 1)
    with pytest.raises(DataError, match="picture.png has 80 x 50 pixels, but at most 3999 are decoded") as too_large:
        small.ask(picture, PROMPT, ALL)
    assert str(tmp_path) not in str(too_large.value)
    picture.write_text("no image", encoding="utf-8")
    with pytest.raises(DataError, match="The image picture.png cannot be read") as broken:
        session.ask(picture, PROMPT, ALL)
    assert str(tmp_path) not in str(broken.value)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run: it has no config.yaml"):
        open_session(tmp_path)


def test_examples_are_scenes_of_the_world_and_prompts_that_it_knows(tmp_path: Path) -> None:
    caption = captioner(tmp_path)
    paths = write_examples(caption, tmp_path, count=3)
    pixels = [np.asarray(Image.open(path)) for path in paths]
    assert [image.shape for image in pixels] == [(96, 96, 3)] * 3
    assert not np.array_equal(pixels[0], pixels[1]) and pixels[0].std() > 5
    assert example_prompts(caption) == EXAMPLE_PROMPTS
    assert all(not caption.unknown_words(prompt) for prompt in EXAMPLE_PROMPTS)


def test_the_overlay_is_brightest_where_the_gate_is_greatest() -> None:
    image = np.full((32, 32, 3), 0.5)
    gates = np.full((4, 4, 2), 0.5)
    gates[1, 2] = (0.9, 0.1)  # the first expert counts at one patch, the second does not
    pixels = gate_overlay(image, gates, ["one", "two"])
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    width = int(pixels.shape[1] * 0.88)  # three panels in a row, then the color bar
    yellow = pixels[..., :2].astype(int).min(axis=2) - pixels[..., 2]  # the upper end of the scale
    rows, columns = np.nonzero(yellow[:, :width] > 100)
    assert width / 3 < columns.min() and columns.max() < 2 * width / 3  # in the first expert's map only
    assert 0.03 < rows.size / (width / 3) ** 2 < 0.09  # about a sixteenth of it
    assert columns.mean() / width == pytest.approx((1 + 2.5 / 4) / 3, abs=0.04)  # patch (1, 2) of 4 x 4
    flat = gate_overlay(image, np.full((4, 4, 2), 0.5), ["one", "two"])
    assert not np.array_equal(flat, pixels)


def test_an_expert_may_be_called_what_it_likes(tmp_path: Path, picture: Path) -> None:
    """Names come from the configuration of a run, which may be anyone's."""
    evil = r"$\frac{<script>"
    model = lively(tiny_tove(experts={evil: tiny_experts()["edges"]}))
    session = Session([Model("ToVE", captioner(tmp_path, model=model), None)])
    reply = session.ask(picture, "list objects", [evil])
    assert reply.overlay is not None and session.experts == (evil,)
