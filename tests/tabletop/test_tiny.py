"""TinyExpert: the contract of a VisionExpert, its weights file, and the shipped experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from visexpert.errors import ConfigError, WeightsError
from visexpert.tabletop.tiny import NETWORKS, ConvNetwork, TinyExpert, half_state, header_metadata, read_header
from visexpert.tabletop.zoo.ship import CARDS, encoder_facts

CONV: dict[str, Any] = {
    "kind": "conv",
    "image_size": 32,
    "network": {
        "widths": [8, 16],
        "token_dim": 24,
        "dilations": [1, 2],
        "outputs": {"colour": 3, "shape": 2},
        "upsample": 2,
        "activation": "softmax",
    },
}
VIT: dict[str, Any] = {
    "kind": "vit",
    "image_size": 32,
    "network": {
        "patch_size": 8,
        "token_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "outputs": {"normal": 3},
        "activation": "unit",
    },
}
SHIPPED = [name for name, facts in encoder_facts().items() if facts["kind"] in NETWORKS]


@pytest.mark.parametrize(("arch", "grid", "width"), [(CONV, (8, 8), 24), (VIT, (4, 4), 24)])
def test_tokens__sizes_any_input_and_batch_invariance(arch: dict[str, Any], grid: tuple[int, int], width: int) -> None:
    expert = TinyExpert(arch=arch).eval()
    assert (expert.grid_hw, expert.token_dim) == (grid, width)
    for shape in ((1, 1), (32, 32), (50, 71)):
        images_BCHW = torch.rand(3, 3, *shape)
        tokens = expert(images_BCHW)
        assert tokens.tokens_BSE.shape == (3, grid[0] * grid[1], width)
        assert tokens.grid_hw == grid
        torch.testing.assert_close(expert(images_BCHW).tokens_BSE, tokens.tokens_BSE, rtol=0, atol=0)
        torch.testing.assert_close(expert(images_BCHW[1:2]).tokens_BSE, tokens.tokens_BSE[1:2], rtol=1e-4, atol=1e-5)


def test_tokens__row_major() -> None:
    expert = TinyExpert(arch=CONV).eval()
    pixels_BCHW = torch.rand(2, 3, 32, 32)
    map_BEHW = expert.network.features(pixels_BCHW)
    tokens_BSE = expert.encode(pixels_BCHW)
    torch.testing.assert_close(tokens_BSE[:, 3 * 8 + 5], map_BEHW[:, :, 3, 5])


def test_preprocess__is_mean_and_deviation_of_the_header() -> None:
    expert = TinyExpert(arch={**CONV, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 0.2]})
    pixels = expert.preprocess(torch.full((1, 3, 64, 64), 0.6))
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([1.0, 1.6, 1.5]))


def test_prediction__conv_softmax_sums_to_one_per_output() -> None:
    expert = TinyExpert(arch=CONV, tokens="prediction").eval()
    assert (expert.grid_hw, expert.token_dim) == ((16, 16), 5)
    tokens_BSE = expert(torch.rand(2, 3, 32, 32)).tokens_BSE
    assert tokens_BSE.shape == (2, 256, 5)
    torch.testing.assert_close(tokens_BSE[..., :3].sum(-1), torch.ones(2, 256))
    torch.testing.assert_close(tokens_BSE[..., 3:].sum(-1), torch.ones(2, 256))


def test_prediction__vit_unit_vectors() -> None:
    tokens_BSE = TinyExpert(arch=VIT, tokens="prediction").eval()(torch.rand(2, 3, 32, 32)).tokens_BSE
    torch.testing.assert_close(tokens_BSE.norm(dim=-1), torch.ones(2, 16))


def test_head__is_linear_in_the_tokens() -> None:
    network = TinyExpert(arch=CONV).network
    a, b = torch.randn(1, 24, 8, 8), torch.randn(1, 24, 8, 8)
    bias = network.predict(torch.zeros(1, 24, 8, 8))
    torch.testing.assert_close(network.predict(a + b) + bias, network.predict(a) + network.predict(b))


def test_residual_blocks__start_as_identity_up_to_relu() -> None:
    network = ConvNetwork(image_size=16, widths=[8], token_dim=8, dilations=[1, 2, 4])
    x_BEHW = torch.randn(2, 8, 8, 8)
    for block in list(network.trunk)[3:6]:
        torch.testing.assert_close(block(x_BEHW), F.relu(x_BEHW))


def test_weights_file__round_trip(tmp_path: Path) -> None:
    trained = TinyExpert(arch=CONV).eval()
    path = tmp_path / "mine.safetensors"
    save_file(half_state(trained.network), path, metadata=header_metadata(trained.header))
    assert read_header(path) == CONV
    loaded = TinyExpert(source=str(path)).eval()
    images = torch.rand(2, 3, 32, 32)
    assert loaded.fingerprint() != trained.fingerprint()
    loaded.load_weights()
    trained.network.load_state_dict({key: value.half().float() for key, value in trained.network.state_dict().items()})
    torch.testing.assert_close(loaded(images).tokens_BSE, trained(images).tokens_BSE, rtol=0, atol=0)
    assert loaded.fingerprint() == trained.fingerprint()
    assert TinyExpert(source=str(path), tokens="prediction").fingerprint() != loaded.fingerprint()


def test_weights_file__that_does_not_fit_its_header(tmp_path: Path) -> None:
    state = half_state(TinyExpert(arch=CONV).network)
    state.pop("head.bias")
    path = tmp_path / "cut.safetensors"
    save_file(state, path, metadata=header_metadata(CONV))
    with pytest.raises(WeightsError, match=r"missing \['head.bias'\]"):
        TinyExpert(source=str(path)).load_weights()


def test_errors__are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights at .*nothing; shipped entries are .*visexpert fit"):
        TinyExpert(source="zoo:nothing")
    with pytest.raises(ConfigError, match="either source"):
        TinyExpert()
    with pytest.raises(ConfigError, match="either source"):
        TinyExpert(source="zoo:depth", arch=CONV)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not safetensors at all")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        TinyExpert(source=str(broken))
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(1)}, foreign)
    with pytest.raises(WeightsError, match="no architecture in its header"):
        TinyExpert(source=str(foreign))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "mlp"}, r"kind='mlp' is unknown; use one of \['conv', 'vit'\]"),
        ({"image_size": 30}, "image_size=30 .* 4"),
        ({"network": {**CONV["network"], "depth": 3}}, "unexpected keyword argument 'depth'"),
        ({"network": {**CONV["network"], "activation": "tanh"}}, "activation='tanh' is unknown"),
    ],
)
def test_errors__in_an_architecture(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TinyExpert(arch={**CONV, **change})


def test_errors__architecture_without_kind_or_head() -> None:
    with pytest.raises(ConfigError, match=r"lacks \['kind', 'network'\]"):
        TinyExpert(arch={"image_size": 32})
    bare = {**VIT, "network": {key: value for key, value in VIT["network"].items() if key != "outputs"}}
    with pytest.raises(ConfigError, match="has no head; use tokens='features'"):
        TinyExpert(arch=bare, tokens="prediction")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped__loads_and_matches_its_card(name: str) -> None:
    facts = json.loads((CARDS / f"{name}.json").read_text(encoding="utf-8"))
    expert = TinyExpert(source=f"zoo:{name}").eval()
    expert.load_weights()
    tokens = expert(torch.rand(2, 3, 96, 96)).tokens_BSE
    assert tokens.shape == (2, facts["grid"][0] * facts["grid"][1], facts["token_dim"])
    assert torch.isfinite(tokens).all()
    assert expert.license == facts["license"] == "Apache-2.0"


def test_shipped__widths_grids_inputs_and_kinds_differ() -> None:
    facts = [json.loads((CARDS / f"{name}.json").read_text(encoding="utf-8")) for name in SHIPPED]
    assert len(facts) >= 6
    for key in ("token_dim", "input_px", "kind"):
        assert len({entry[key] for entry in facts}) >= 2, key
    assert len({tuple(entry["grid"]) for entry in facts}) >= 3
