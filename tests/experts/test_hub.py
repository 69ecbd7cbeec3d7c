"""The hub: frozen means frozen, and attached or detached by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from tests.experts.helpers import NoisyExpert
from visexpert.errors import ConfigError
from visexpert.experts import ExpertHub, VisionExpert
from visexpert.grids import resized_once
from visexpert.networks.preprocessing import Preprocessing
from visexpert.transfer import TokenAdapter
from visexpert.types import Batch


def hub(**options: object) -> ExpertHub:
    experts: dict[str, VisionExpert] = {"a": NoisyExpert(grid=4), "b": NoisyExpert(grid=2, width=3), "c": NoisyExpert()}
    return ExpertHub(experts, **options)  # type: ignore[arg-type]


def images() -> Batch:
    return Batch(torch.rand(2, 3, 20, 20), torch.arange(2), split="")


def test_no_parameter_requires_a_gradient() -> None:
    experts = hub()
    assert list(experts.parameters())
    assert not any(parameter.requires_grad for parameter in experts.parameters())


def test_eval_mode_survives_train_of_any_module_around() -> None:
    """BatchNorm and dropout would change the tokens, and BatchNorm's statistics the expert itself."""
    experts = hub()
    around = torch.nn.ModuleDict({"hub": experts}).train()
    assert around.training and not any(module.training for module in experts.modules())
    state = {key: value.clone() for key, value in experts.state_dict().items()}
    first, second = experts(batch := images()), experts(batch)
    assert all(torch.equal(first[name].tokens_BSE, second[name].tokens_BSE) for name in "abc")
    assert all(torch.equal(value, experts.state_dict()[key]) for key, value in state.items())


def test_tokens_carry_no_graph_though_a_loss_is_built_on_them() -> None:
    experts = hub()
    for parameter in experts.parameters():
        parameter.requires_grad_(True)  # even if somebody thaws them by mistake
    images_BCHW = images().images_BCHW.requires_grad_()
    tokens = experts(Batch(images_BCHW, torch.arange(2), split=""))["a"]
    assert not tokens.tokens_BSE.requires_grad
    adapter = TokenAdapter(in_dim=5, out_dim=2, out_grid=(4, 4), zero_init=False)
    adapter(tokens).square().sum().backward()
    assert all(parameter.grad is None for parameter in experts.parameters())
    assert images_BCHW.grad is None and adapter.hidden.weight.grad is not None


def test_names_grids_and_shapes() -> None:
    experts = hub()
    out = experts(images())
    assert experts.names == experts.attached == tuple(out) == ("a", "b", "c")
    assert {name: (tuple(tokens.tokens_BSE.shape), tokens.grid_hw) for name, tokens in out.items()} == {
        "a": ((2, 16, 5), (4, 4)),
        "b": ((2, 4, 3), (2, 2)),
        "c": ((2, 16, 5), (4, 4)),
    }


def test_detach_and_attach() -> None:
    experts = hub(detached=["c"])
    assert experts.attached == ("a", "b") and experts.names == ("a", "b", "c")
    experts.detach("a")
    assert experts.attached_mask == (False, True, False)
    assert list(experts(images())) == ["b"]
    experts.attach("c")
    experts.attach("c")
    assert experts.attached == ("b", "c")
    calls = {name: getattr(experts[name], "calls", None) for name in experts.names}
    assert calls == {"a": 0, "b": 1, "c": 0}  # a detached expert is not run


def test_a_detached_expert_costs_no_weights() -> None:
    experts = hub(detached=["b"])
    experts.load_weights()
    assert [getattr(experts[name], "loads", None) for name in experts.names] == [1, 0, 1]


@pytest.mark.parametrize("act", ["attach", "detach", "__getitem__"])
def test_an_unknown_name_is_refused(act: str) -> None:
    with pytest.raises(ConfigError, match=r"no expert 'depth' in the hub; it holds \['a', 'b', 'c'\]"):
        getattr(hub(), act)("depth")


def test_an_empty_hub_is_no_expert() -> None:
    experts = ExpertHub({})
    assert experts.names == () and experts(images()) == {}


def test_the_mask_is_no_weight() -> None:
    assert not any("attached" in key for key in hub().state_dict())


@pytest.mark.parametrize("name", ["clip", "student", "teachers", "tokens", "", "a.b", "keys", "training"])
def test_a_name_that_means_something_else_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'") as refused:
        ExpertHub({"a": NoisyExpert(), name: NoisyExpert()})
    assert "rename" in str(refused.value) and "'a'" not in str(refused.value)


def test_only_experts_that_are_used_are_built_in() -> None:
    experts: dict[str, VisionExpert] = {"a": NoisyExpert(), "b": NoisyExpert(), "clip": NoisyExpert()}
    assert ExpertHub.chosen(experts, ["b", "a"], owner="ToVE").names == ("a", "b")
    with pytest.raises(ConfigError, match=r"ToVE: .*\['d'\].*\['a', 'b', 'clip'\]"):
        ExpertHub.chosen(experts, ["d", "a"], owner="ToVE")


def test_images_are_resized_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    together, batch = hub(), images()
    alone = {name: expert(batch.images_01()).tokens_BSE for name, expert in together.attached_experts().items()}
    sizes: list[tuple[int, int]] = []
    interpolate = torch.nn.functional.interpolate

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        sizes.append(kwargs["size"])
        return interpolate(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "interpolate", counted)
    found = together(batch)
    assert sorted(sizes) == [(16, 16), (32, 32)]  # two of the three experts read 32 px
    assert all(torch.equal(found[name].tokens_BSE, tokens) for name, tokens in alone.items())
    together(batch)
    assert len(sizes) == 4  # nothing is kept from one call to the next
    together(Batch(torch.rand(2, 3, 20, 20), torch.arange(2), split=""))
    assert len(sizes) == 6


def test_experts_of_one_preprocessing_share_what_it_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
    mean = torch.full((1, 3, 1, 1), 0.5)
    calls: list[object] = []
    resize = tv.resize

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return resize(*args, **kwargs)

    monkeypatch.setattr(tv, "resize", counted)
    images_BCHW = torch.rand(2, 3, 20, 24)
    alone = own.prepare(images_BCHW, mean, mean)
    calls.clear()
    with resized_once():
        assert torch.equal(own.prepare(images_BCHW, mean, mean), alone)
        own.prepare(images_BCHW, mean, mean / 2)
        assert len(calls) == 1
        replace(own, interpolation="bilinear").prepare(images_BCHW, mean, mean)
        assert len(calls) == 2
