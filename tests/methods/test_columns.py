"""Columns of a gate follow the names of its experts, whatever the order in which a checkpoint has them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.methods.helpers import bare_trainer, noise_batch, shake, tiny_experts, tiny_tove
from tests.methods.movekd.helpers import tiny_movekd
from visexpert.errors import WeightsError
from visexpert.methods import Method, ToVE
from visexpert.methods.columns import NAMES, experts_in

GATES: dict[str, dict[str, Any]] = {
    "linear": {},
    "two layers, as wide as there are experts": {"hidden": 3},
    "learned noise": {"noise": "learned"},
}


def reversed_experts() -> dict[str, Any]:
    return dict(reversed(tiny_experts().items()))


def checkpoint(model: Method, folder: Path, *, named: bool = True) -> str:
    """Written as a run writes it; without names as earlier versions did."""
    written: dict[str, Any] = {"state_dict": dict(model.state_dict()), "global_step": 3}
    model.on_save_checkpoint(written)
    if not named:
        del written[NAMES]
    torch.save(written, folder / "run.ckpt")
    return str(folder / "run.ckpt")


def gates(model: ToVE) -> dict[str, Tensor]:
    """What each expert gets, by its name, the gate's noise drawn alike for all."""
    gates_BTK = model.eval().encode(noise_batch()).gates_BTK
    assert gates_BTK is not None
    return dict(zip(model.hub.names, gates_BTK.unbind(-1), strict=True))


def columns(model: Method) -> dict[tuple[str, str], Tensor]:
    """Each column of each tensor, by the tensor and the expert."""
    state, owned = model.state_dict(), model.columns()
    return {(key, name): row for key in owned.keys for name, row in zip(owned.names, state[key], strict=True)}


def assert_equal(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, msg=str(key))


@pytest.mark.parametrize("named", [True, False], ids=["named", "of an earlier version"])
@pytest.mark.parametrize("kind", GATES)
def test_another_order_leaves_each_expert_its_column(tmp_path: Path, kind: str, named: bool) -> None:
    donor = shake(tiny_tove(**GATES[kind]))
    path = checkpoint(donor, tmp_path, named=named)
    started = tiny_tove(experts=reversed_experts(), init_from=path, **GATES[kind])
    started.setup("fit")
    opened = tiny_tove(experts=reversed_experts(), **GATES[kind])
    content = torch.load(path, weights_only=True)
    opened.on_load_checkpoint(content)
    opened.load_state_dict(content["state_dict"])
    assert started.hub.names == opened.hub.names == ("edges", "depth", "semantic")
    for model in (started, opened):
        assert_equal(columns(model), columns(donor))
        assert_equal(gates(model), gates(donor))
    assert gates(donor)["semantic"].std() > 0.01


def test_fewer_experts_are_weighed_as_if_the_others_were_detached(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    donor = shake(tiny_tove())
    model = tiny_tove(experts=reversed_experts(), use=["semantic", "edges"], init_from=checkpoint(donor, tmp_path))
    with caplog.at_level(logging.INFO):
        model.setup("fit")
    assert "left out: ['depth']" in caplog.text and "start fresh" not in caplog.text
    donor.hub.detach("depth")
    assert_equal(gates(model), {name: gates(donor)[name] for name in ("edges", "semantic")})


def test_more_experts_keep_what_was_learned_and_the_fresh_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    donor = shake(tiny_tove(use=["semantic", "edges"], noise="learned"))
    path = checkpoint(donor, tmp_path)
    model = tiny_tove(experts=reversed_experts(), noise="learned", init_from=path)
    before = columns(model)
    with caplog.at_level(logging.INFO):
        model.setup("fit")
    assert "Experts that start fresh" in caplog.text and "['depth']" in caplog.text
    wanted = {key: row for key, row in before.items() if key[1] == "depth"} | columns(donor)
    assert len(wanted) == len(before) == 12
    assert_equal(columns(model), wanted)
    copies = [part.adapters["edges"].get_parameter("out.weight") for part in (model, donor)]
    assert torch.equal(*copies)


@pytest.mark.parametrize("names", [3, "edges", [1, 2, 3], None])
def test_names_that_are_none_are_read_from_the_parts(names: object) -> None:
    state = dict(tiny_tove().state_dict())
    assert experts_in({"state_dict": state, NAMES: names}) == ("semantic", "depth", "edges")


def test_a_start_without_experts_leaves_the_gate_fresh(tmp_path: Path) -> None:
    model = tiny_tove(init_from=checkpoint(tiny_tove(use=[]), tmp_path))
    before = columns(model)
    model.setup("fit")
    assert_equal(columns(model), before)


def test_a_file_that_does_not_say_whose_columns_it_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for use, names in ((["edges"], None), (None, r"3 columns, .*\['semantic', 'depth', 'edges'\]")):
        model = tiny_tove(use=use)
        save_file({key: value for key, value in model.state_dict().items() if key.startswith(("gate.", "ad"))}, path)
        model.init_from = str(path)
        if names is None:
            model.setup("fit")  # one column can only be that of the one expert
        else:
            with pytest.raises(WeightsError, match=names):
                model.setup("fit")


@pytest.mark.parametrize("make", [tiny_tove, tiny_movekd])
def test_a_training_does_not_go_on_in_another_order(tmp_path: Path, make: Any) -> None:
    """The state of the optimizer is by place, so that it would go to other experts' adapters."""
    path = checkpoint(make(), tmp_path)
    content = torch.load(path, weights_only=True)
    rest = {"optimizer_states": [], "lr_schedulers": [], "epoch": 0, "pytorch-lightning_version": L.__version__}
    torch.save(content | rest, path)
    with pytest.raises(WeightsError, match=r"\['semantic', 'depth', 'edges'\], here .*\['edges', .* init_from instead"):
        bare_trainer(tmp_path, steps=4).fit(
            make(experts=reversed_experts()), [noise_batch()], ckpt_path=path, weights_only=True
        )


def test_the_gate_that_weighs_teachers_follows_their_names_too(tmp_path: Path) -> None:
    donor = shake(tiny_tove())
    path = checkpoint(donor, tmp_path)
    model = tiny_movekd(depth=2, experts=reversed_experts(), teachers="gate", init_from=path)
    model.setup("fit")
    assert_equal(columns(model), columns(donor))
    content = torch.load(checkpoint(model, tmp_path), weights_only=True)
    again = tiny_movekd(depth=2, teachers="gate")
    again.on_load_checkpoint(content)
    again.load_state_dict(content["state_dict"])
    assert_equal(columns(again), columns(donor))
    assert content[NAMES] == ["edges", "depth", "semantic"]
