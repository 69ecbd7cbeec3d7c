"""The probe knows shapes without computing, and notices attention logits in memory."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.experts.helpers import NoisyExpert
from visexpert.errors import ConfigError
from visexpert.experts import ExpertHub
from visexpert.experts.probe import LogitsWatch, check_repeats, probe_map

PATCH = 8


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2)).softmax(-1) @ value


def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Fused, but with a bias of its own for every head: what transformers does for SAM."""
    bias = query.sum(-1)[..., :, None] + key.sum(-1)[..., None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def broadcast_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A mask that all heads share through a view holds next to nothing."""
    tokens = query.shape[-2]
    mask = torch.zeros(1, 1, 1, tokens, device=query.device).expand(1, 2, tokens, tokens)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Attends(nn.Module):
    """One layer of attention with two heads over patches, and a wide MLP."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], *, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.Linear(hidden, width))
        self.attend = attend

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        map_BEHW = self.patches(pixels_BCHW)
        tokens_BSE = map_BEHW.flatten(2).transpose(1, 2)
        query, key, value = self.qkv(tokens_BSE).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = self.mlp(self.attend(query, key, value).transpose(1, 2).flatten(2))
        out_BEHW: Tensor = attended.transpose(1, 2).reshape(map_BEHW.shape)
        return out_BEHW


@pytest.mark.parametrize("attend", [fused, broadcast_mask])
def test_fused_attention_passes_at_any_size(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    assert probe_map(Attends(attend), 1024, owner="Test") == (1, 8, 128, 128)


@pytest.mark.parametrize("attend", [eager, masked])
def test_logits_in_memory_are_refused(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ConfigError, match=r" 512 px .*\(1, 2, 4096, 4096\)"):
        probe_map(Attends(attend), 512, owner="Test")
    assert probe_map(Attends(attend), 128, owner="Test") == (1, 8, 16, 16)  # 256 tokens: not worth a word


def test_square_maps_and_wide_layers_are_no_logits() -> None:
    """4096 tokens through an MLP of 4096, and maps of 1024 x 1024 pixels in many channels."""
    assert probe_map(Attends(fused, hidden=4096), 512, owner="Test") == (1, 8, 64, 64)
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1))
    assert probe_map(convolution, 1024, owner="Test") == (1, 4, 1024, 1024)


@pytest.mark.parametrize(("attend", "seen"), [(eager, (1, 2, 1024, 1024)), (fused, ())])
def test_what_the_probe_says_holds_where_numbers_are_computed(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], seen: tuple[int, ...]
) -> None:
    with torch.no_grad(), LogitsWatch(256) as watch:
        Attends(attend)(torch.rand(1, 3, 256, 256))
    assert watch.largest == seen


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_network_is_probed_wherever_it_is_and_left_as_it_was(device: str) -> None:
    with torch.device(device):
        network = Attends(fused)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert probe_map(network, 64, owner="Test") == (1, 8, 8, 8)
    assert {key: value.device.type for key, value in network.state_dict().items()} == dict.fromkeys(before, device)
    assert device == "meta" or all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_what_stands_in_two_places_is_left_as_it_was() -> None:
    """A module in two places, and a weight in two modules."""
    network, tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Conv2d(3, 3, 1)
    tied.weight = network[0].weight  # type: ignore[assignment]
    network.extend([network[0], tied])
    assert probe_map(network, 8, owner="Test") == (1, 3, 8, 8)
    assert {key: value.device.type for key, value in network.state_dict().items()} == dict.fromkeys(
        ("0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"), "cpu"
    )
    assert network[2] is network[0] and tied.weight is network[0].weight
    assert network(torch.rand(1, 3, 8, 8)).isfinite().all()


def test_what_cannot_be_run_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"Test: .* 4 px \(.*\).* image_size"):
        probe_map(Attends(fused), 4, owner="Test")
    with pytest.raises(ConfigError, match="Test: .* 8 px"):
        probe_map(nn.Flatten(), 8, owner="Test")


def masked_at_random(tokens_BSE: Tensor) -> Tensor:
    """As MAE: a quarter of the tokens, another one each time."""
    order = torch.rand(tokens_BSE.shape[1]).argsort()
    return tokens_BSE[:, order[: len(order) // 4].sort().values]


NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda tokens: F.dropout(tokens, 0.1),
    "mask": masked_at_random,
    "torch": lambda tokens: tokens + 1e-2 * torch.rand(tokens.shape),
    "numpy": lambda tokens: tokens * float(np.random.uniform(0.5, 1.5)),  # noqa: NPY002 - what users write
    "python": lambda tokens: tokens * random.uniform(0.5, 1.5),  # noqa: S311
    "own generator": lambda tokens: tokens + torch.as_tensor(np.random.default_rng().normal(size=tokens.shape)),
    "sometimes nan": lambda tokens: tokens / (torch.rand(tokens.shape) > 0.5),
}


class Own(NoisyExpert):
    """A user's expert."""

    def __init__(self, noise: Callable[[Tensor], Tensor] = lambda tokens: tokens) -> None:
        super().__init__()
        self.noise = noise

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        return self.noise(super().encode(pixels_BCHW))


@pytest.mark.parametrize("kind", NOISES)
def test_any_expert_that_gives_other_tokens_each_time_is_refused(kind: str) -> None:
    hub = ExpertHub({"good": NoisyExpert(), "mine": Own(NOISES[kind])})
    with pytest.raises(ConfigError, match=r"'mine' \(Own\) .*largest difference (\d|inf)") as refused:
        hub.load_weights()
    assert "good" not in str(refused.value) and "\n" not in str(refused.value)


def test_the_difference_is_told() -> None:
    turn = iter((0.0, 0.25))
    with pytest.raises(ConfigError, match="largest difference 0.25,"):
        check_repeats(Own(lambda tokens: torch.ones_like(tokens) + next(turn)), "mine")


def test_experts_that_repeat_themselves_pass_and_no_generator_moves() -> None:
    def seeds(tokens_BSE: Tensor) -> Tensor:
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        random.seed(3)
        return tokens_BSE + torch.rand(tokens_BSE.shape) + float(np.random.rand()) + random.random()  # noqa: NPY002, S311

    def drawn() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002, S311

    def start() -> None:
        torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002

    hub = ExpertHub({"plain": NoisyExpert(), "seeds": Own(seeds), "nan": Own(lambda tokens: tokens * torch.nan)})
    start()
    expected = drawn()
    start()
    hub.load_weights()
    assert drawn() == expected


def test_rounding_is_no_chance() -> None:
    turn = iter((0.0, 1e-6))
    check_repeats(Own(lambda tokens: torch.ones_like(tokens) + next(turn)), "mine")


def test_an_expert_for_another_device_is_warned_of() -> None:
    def needs_gpu(tokens_BSE: Tensor) -> Tensor:
        raise NotImplementedError("only CUDA has this kernel")

    with pytest.warns(UserWarning, match=r"'mine' does not run on cpu \(only CUDA has this kernel\)"):
        ExpertHub({"mine": Own(needs_gpu)}).load_weights()


def test_nothing_is_encoded_on_meta() -> None:
    with torch.device("meta"):
        expert = Own()
    check_repeats(expert, "mine")
    assert expert.calls == 0
