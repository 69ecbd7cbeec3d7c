"""ToVE: its start, its limit cases, what trains, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.methods.helpers import (
    WIDTH,
    bare_trainer,
    logits_of,
    noise_batch,
    shake,
    tiny_experts,
    tiny_tove,
    trained_names,
)
from visexpert.data import pack
from visexpert.errors import ConfigError
from visexpert.language.base import ProjectorSettings
from visexpert.methods import ToVE
from visexpert.tabletop import TabletopData
from visexpert.transfer import GateSettings
from visexpert.types import Batch, VisionTokens

Space = Literal["language", "clip"]

ADAPTER = {"norm.weight", "norm.bias", "hidden.weight", "hidden.bias", "out.weight", "out.bias"}
STEM = {f"stem.layers.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
PROJECTOR = {f"projector.{part}.{kind}" for part in ("norm", "layers") for kind in ("weight", "bias")}
GATE = {f"gate.{part}.{kind}" for part in ("norm", "logits") for kind in ("weight", "bias")}
LANGUAGE = {"language.embed_tokens.weight", "language.embed_positions.weight"} | {
    f"language.{part}.{kind}"
    for part in (
        "memory_norm",
        "norm",
        *(f"blocks.0.{norm}" for norm in ("self_norm", "cross_norm", "mlp_norm")),
        *(
            f"blocks.0.{attention}.{layer}"
            for attention in ("attention", "cross")
            for layer in ("query", "key_value", "out")
        ),
        "blocks.0.mlp.0",
        "blocks.0.mlp.2",
    )
    for kind in ("weight", "bias")
}  # the head is the embedding, by the same parameter


def adapters(*names: str) -> set[str]:
    return {f"adapters.{name}.{part}" for name in names for part in ADAPTER | (STEM if name == "depth" else set())}


def twin(model: ToVE, **options: Any) -> ToVE:
    """CLIP-only, with the weights that both have."""
    other = tiny_tove(seed=7, use=[], **options)
    shared = {key: value for key, value in model.state_dict().items() if key in other.state_dict()}
    other.load_state_dict(shared, strict=True)
    return other


@pytest.mark.parametrize("space", ["language", "clip"])
@pytest.mark.parametrize("training", [True, False])
def test_at_step_0_it_equals_its_clip_only_twin_to_the_bit(space: Space, training: bool) -> None:
    model = tiny_tove(fusion_space=space, noise="learned")
    clip_only, batch = twin(model, fusion_space=space), noise_batch()
    model.train(training), clip_only.train(training)
    assert torch.equal(logits_of(model, batch), logits_of(clip_only, batch))
    torch.nn.init.ones_(model.get_parameter("adapters.depth.out.bias"))  # which is not so for just any adapter
    assert not torch.allclose(logits_of(model, batch), logits_of(clip_only, batch))


@pytest.mark.parametrize("space", ["language", "clip"])
def test_a_detached_expert_equals_a_gate_of_zero_with_the_rest_renormalized(space: Space) -> None:
    model = shake(tiny_tove(fusion_space=space)).eval()
    batch = noise_batch()
    assert model.gate is not None
    images_BCHW = batch.images_BCHW.float() / 255
    clip = model.clip(images_BCHW).tokens_BTD
    gates_BTK = model.gate(clip, (True,) * 3).gates_BTK.clone()
    gates_BTK[..., 1] = 0.0
    gates_BTK = gates_BTK / gates_BTK.sum(-1, keepdim=True)
    fused = clip if space == "clip" else model.projector(clip)
    for column, (name, tokens) in enumerate(model.hub(batch).items()):
        fused = fused + gates_BTK[..., column, None] * model.adapters[name](tokens)
    expected = fused if space == "language" else model.projector(fused)
    before = logits_of(model, batch)
    model.hub.detach("depth")
    encoded = model.encode(batch)
    torch.testing.assert_close(encoded.tokens_BTD, expected, atol=1e-5, rtol=1e-5)
    assert encoded.gates_BTK is not None
    torch.testing.assert_close(encoded.gates_BTK, gates_BTK, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(logits_of(model, batch), before)
    model.hub.attach("depth")
    assert torch.equal(logits_of(model, batch), before)


@pytest.mark.parametrize("transfer", ["residual", "replacement"])
def test_with_every_expert_detached_it_is_clip_only(transfer: Literal["residual", "replacement"]) -> None:
    model = shake(tiny_tove(transfer=transfer))
    clip_only, batch = twin(model), noise_batch()
    for name in model.hub.names:
        model.hub.detach(name)
    assert torch.equal(logits_of(model, batch), logits_of(clip_only, batch))
    assert model.encode(batch).gates_BTK is None


def test_the_loss_is_the_text_loss_plus_the_weighted_balance() -> None:
    model, batch = shake(tiny_tove(balance_weight=0.3, noise="none")), noise_batch()
    output = model.step(batch)
    assert batch.text is not None
    targets_M = batch.text.labels_BN[batch.text.labels_BN >= 0]
    text = torch.nn.functional.cross_entropy(logits_of(model, batch), targets_M)
    gates_BTK = model.encode(batch).gates_BTK
    assert gates_BTK is not None
    importance_K = gates_BTK.sum((0, 1))
    load_K = torch.nn.functional.one_hot(gates_BTK.argmax(-1), 3).sum((0, 1)).float()
    balance = sum(values.var(unbiased=False) / values.mean() ** 2 for values in (importance_K, load_K))
    torch.testing.assert_close(output.parts["text_loss"], text)
    torch.testing.assert_close(output.parts["balance_loss"], torch.as_tensor(balance))
    torch.testing.assert_close(output.loss, text + 0.3 * torch.as_tensor(balance))
    assert output.batch_size == 2


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_smooth_load_is_that_of_samples_with_an_image(top_k: int | None) -> None:
    """A sample of text alone changes neither the balance loss nor its gradient, noise being equal."""

    def gradient(batch: Batch) -> tuple[Tensor, Tensor]:
        model = shake(tiny_tove(noise="fixed", top_k=top_k)).train()
        torch.manual_seed(7)
        balance = model.step(batch).parts["balance_loss"]
        balance.backward()
        slope = dict(model.named_parameters())["gate.logits.weight"].grad
        assert slope is not None
        return balance.detach(), slope

    both = noise_batch()
    alone = replace(both, images_BCHW=both.images_BCHW[:1], index_B=both.index_B[:1], text=pack([[([5, 6, 7], 1)]], 0))
    mixed = replace(both, has_image_B=torch.tensor([True, False]))
    (found, found_grad), (expected, expected_grad) = gradient(mixed), gradient(alone)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_grad, expected_grad)


def test_what_trains_is_exactly_this() -> None:
    everything = PROJECTOR | GATE | LANGUAGE | adapters("semantic", "depth", "edges")
    assert trained_names(tiny_tove()) == everything
    assert trained_names(tiny_tove(language_lr=0.0)) == everything - LANGUAGE
    assert trained_names(tiny_tove(use=[])) == PROJECTOR | LANGUAGE
    assert trained_names(tiny_tove(use=["edges"])) == PROJECTOR | GATE | LANGUAGE | adapters("edges")
    assert trained_names(tiny_tove(detached=["depth"])) == everything - adapters("depth")
    alone = tiny_tove(use=["depth"], transfer="replacement")
    assert trained_names(alone) == LANGUAGE | adapters("depth")  # neither CLIP nor a choice among one
    uniform = tiny_tove(gate=GateSettings(kind="uniform"))
    assert trained_names(uniform) == everything - GATE


@pytest.mark.parametrize("space", ["language", "clip"])
@pytest.mark.parametrize("noise", ["none", "learned"])
def test_a_gradient_reaches_all_that_trains_and_nothing_else(space: Space, noise: Any) -> None:
    model = shake(tiny_tove(fusion_space=space, noise=noise))
    model.setup("fit")
    model.train()
    model.step(noise_batch()).loss.backward()
    reached = {
        name for name, value in model.named_parameters() if value.grad is not None and value.grad.abs().max() > 0
    }
    # A constant added to every gate logit or key changes no softmax; those biases get rounding noise or nothing.
    vacuous = {name for name in trained_names(model) if name in ("gate.logits.bias",)}
    assert reached | vacuous == trained_names(model)
    assert all(value.grad is None for value in (*model.clip.parameters(), *model.hub.parameters()))


def test_frozen_parts_stay_in_eval_mode_without_gradient() -> None:
    model = tiny_tove()
    model.setup("fit")
    model.train()
    assert model.training and model.language.training
    frozen = [*model.clip.modules(), *model.hub.modules()]
    assert not any(module.training for module in frozen)
    assert not any(value.requires_grad for module in frozen for value in module.parameters())


def test_grey_levels_and_fractions_are_the_same_image() -> None:
    model, batch = shake(tiny_tove()).eval(), noise_batch()
    fractions = replace(batch, images_BCHW=batch.images_BCHW.float() / 255)
    assert torch.equal(logits_of(model, batch), logits_of(model, fractions))


def test_blind_reads_no_pixel() -> None:
    model = shake(tiny_tove(blind=True)).eval()
    first, other = noise_batch(), noise_batch(seed=5)
    vision = model.encode(first)
    assert torch.count_nonzero(vision.tokens_BTD) == 0 and vision.tokens_BTD.shape == (2, 16, WIDTH)
    assert vision.gates_BTK is None and vision.balance is None
    assert torch.equal(logits_of(model, first), logits_of(model, replace(first, images_BCHW=other.images_BCHW)))
    seeing = shake(tiny_tove()).eval()
    assert not torch.equal(logits_of(seeing, first), logits_of(seeing, replace(first, images_BCHW=other.images_BCHW)))


def test_an_expert_alone_needs_no_clip() -> None:
    model = shake(tiny_tove(use=["edges"], transfer="replacement")).eval()
    batch = noise_batch()
    ran: list[bool] = []
    model.clip.register_forward_hook(lambda *_: ran.append(True))
    vision = model.encode(batch)
    tokens = model.hub(batch)["edges"]
    torch.testing.assert_close(vision.tokens_BTD, model.adapters["edges"](tokens))
    assert not ran


def test_the_output_names_gates_and_grid() -> None:
    vision = shake(tiny_tove()).eval().encode(noise_batch())
    assert isinstance(vision, VisionTokens)
    assert vision.grid_hw == (4, 4) and vision.tokens_BTD.shape == (2, 16, WIDTH)
    assert vision.gates_BTK is not None and vision.gates_BTK.shape == (2, 16, 3)
    torch.testing.assert_close(vision.gates_BTK.sum(-1), torch.ones(2, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use": ["semantic", "dept"]}, r"use names \['dept'\], .* among the experts \['depth', 'edges', 'semantic'\]"),
        ({"detached": ["dept"]}, r"no expert 'dept' in the hub; it holds \['semantic', 'depth', 'edges'\]"),
        ({"fusion_space": "pixel"}, "fusion_space='pixel' is unknown; use one of language, clip"),
        ({"transfer": "sum"}, "transfer='sum' is unknown; use one of residual, replacement"),
        ({"top_k": 4}, r"top_k=4 is outside 1..3"),
        ({"projector": ProjectorSettings(kind="identity")}, "cannot map width 16 to 8"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_tove(**options)


def test_use_keeps_the_order_of_the_experts() -> None:
    assert tiny_tove(use=["edges", "semantic"]).hub.names == ("semantic", "edges")


def test_a_checkpoint_holds_what_trains_and_loads_strictly(tmp_path: Path, data: Callable[..., TabletopData]) -> None:
    model = shake(tiny_tove())
    trainer = bare_trainer(tmp_path, steps=1)
    trainer.fit(model, datamodule=data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    assert set(state) == trained_names(model) | {"language.head.weight"}
    other = shake(tiny_tove(seed=9), seed=4)
    frozen = {key: value.clone() for key, value in other.state_dict().items() if key.startswith(("clip.", "hub."))}
    other.on_load_checkpoint({**checkpoint, "state_dict": (full := dict(state))})
    other.load_state_dict(full, strict=True)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in state.items())
    assert frozen and all(torch.equal(other.state_dict()[key], value) for key, value in frozen.items())
    for damage in ({"gate.logits.bias"}, {"language.norm.weight"}, set()):
        partial = {key: value for key, value in state.items() if key not in damage}
        partial |= {} if damage else {"adapters.edges.extra": torch.zeros(1)}
        other.on_load_checkpoint({**checkpoint, "state_dict": partial})
        with pytest.raises(RuntimeError, match=next(iter(damage), "adapters.edges.extra")):
            other.load_state_dict(partial, strict=True)


def test_the_gate_has_its_own_rate() -> None:
    groups = {group.name: group for group in tiny_tove(lr=0.3, gate_lr=0.1).trained_groups()}
    assert (groups["fusion"].lr, groups["gate"].lr) == (0.3, 0.1)
    model = tiny_tove(lr=0.3)
    groups = {group.name: group for group in model.trained_groups()}
    assert groups["gate"].lr == 0.3 and groups["gate"].modules == (model.gate,)


def test_no_expert_takes_the_name_of_clip() -> None:
    """Its tokens once took the place of CLIP's own in the feature cache, without a word."""
    with pytest.raises(ConfigError, match="'clip'.*rename"):
        tiny_tove(experts={"clip": tiny_experts()["edges"]})
    assert tiny_tove(experts={"clip": tiny_experts()["edges"], **tiny_experts()}, use=["depth"]).hub.names == ("depth",)
