"""Starting from another run's weights: what is copied, what stays, and what is refused by name."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visexpert.errors import WeightsError
from visexpert.methods.start import start_from


def model(*, width: int = 3, parts: tuple[str, ...] = ("clip", "head")) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(width, 2) for name in parts})


def checkpoint(folder: Path, state: dict[str, Tensor], name: str = "run.ckpt") -> str:
    torch.save({"state_dict": state, "global_step": 4}, folder / name)
    return str(folder / name)


def test_a_complete_start_copies_all_and_names_every_key_that_keeps_it_from_being_one(tmp_path: Path) -> None:
    donor = model()
    source = checkpoint(tmp_path, donor.state_dict())
    taker = model()
    start_from(taker, source, complete=True)
    assert all(torch.equal(value, taker.state_dict()[key]) for key, value in donor.state_dict().items())
    with pytest.raises(WeightsError) as caught:
        start_from(model(parts=("clip", "mole", "teacher")), source, complete=True, ignore=("teacher",))
    message = str(caught.value)
    assert "missing ['mole.bias', 'mole.weight'], unexpected ['head.bias', 'head.weight']" in message
    assert "teacher" not in message and "of another shape none" in message
    with pytest.raises(WeightsError, match=r"missing none, unexpected none, of another shape \['clip.weight \(2, 3\)"):
        start_from(model(width=5), source, complete=True)


def test_a_partial_start_leaves_the_rest_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    donor, taker = model(), model(parts=("clip", "mole"))
    fresh = taker["mole"].get_parameter("weight").clone()
    with caplog.at_level(logging.INFO):
        start_from(taker, checkpoint(tmp_path, donor.state_dict()))
    assert torch.equal(taker["clip"].get_parameter("weight"), donor["clip"].get_parameter("weight"))
    assert torch.equal(taker["mole"].get_parameter("weight"), fresh)
    assert "2 tensors; left as they were: ['mole']" in caplog.text


def test_needed_parts_must_come_from_there(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, model().state_dict())
    start_from(model(), source, need=("head",))
    taker = model(parts=("clip", "gate"))
    before = taker["clip"].get_parameter("weight").clone()
    with pytest.raises(WeightsError, match=r"lacks \['gate.bias', 'gate.weight'\], which must come from there"):
        start_from(taker, source, need=("gate",))
    assert torch.equal(taker["clip"].get_parameter("weight"), before)  # refused before anything was copied


def test_a_safetensors_file_is_a_start_too(tmp_path: Path) -> None:
    donor, taker = model(), model()
    save_file(donor.state_dict(), tmp_path / "weights.safetensors")
    start_from(taker, str(tmp_path / "weights.safetensors"), complete=True)
    assert torch.equal(taker["head"].get_parameter("bias"), donor["head"].get_parameter("bias"))


class Anything:
    """An object that only code can restore."""


def test_files_that_are_no_start_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError,
        match="there is no checkpoint .*absent.ckpt; let the run that it belongs to finish first, such as stage 1",
    ):
        start_from(model(), str(tmp_path / "absent.ckpt"))
    with pytest.raises(WeightsError, match="shares no tensor with the model; give a run of the same parts"):
        start_from(model(), checkpoint(tmp_path, {"other": torch.zeros(1)}))
    with pytest.raises(WeightsError, match=r"tensors of other shapes, such as \['clip.weight \(2, 3\) instead of"):
        start_from(model(width=4), checkpoint(tmp_path, model().state_dict()))
    torch.save({"state_dict": {}, "extra": Anything()}, tmp_path / "code.ckpt")
    with pytest.raises(WeightsError, match="cannot be read: it is damaged"):
        start_from(model(), str(tmp_path / "code.ckpt"))
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(WeightsError, match="holds no state_dict"):
        start_from(model(), str(tmp_path / "list.ckpt"))
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "list.ckpt").read_bytes()[:40])
    with pytest.raises(WeightsError, match="cannot be read: it is damaged"):
        start_from(model(), str(tmp_path / "cut.ckpt"))
