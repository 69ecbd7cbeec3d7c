"""The trial of a language model before it trains: what no field of its configuration tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.language.helpers import VOCAB, llama
from visexpert.errors import ConfigError
from visexpert.language import PrefixLM
from visexpert.language.reading_check import check_reading


def a_llama(*, vocab_size: int, dtype: torch.dtype = torch.float32) -> tuple[Any, LlamaConfig]:
    """A model whose vocabulary no other test's has, since a configuration that passed is not tried again."""
    torch.manual_seed(0)
    settings = LlamaConfig(**{**llama(), "vocab_size": vocab_size, "model_type": "llama"})
    model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model, settings


def carry_along(module: nn.Module, given: Any, found: Any) -> Tensor:
    """A state along the row: each token adds up those before it, of whatever item."""
    states_BLD: Tensor = found
    return states_BLD + 0.3 * states_BLD.cumsum(1)


def fail(module: nn.Module, given: Any, found: Any) -> None:
    raise IndexError("list index\nout of range")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_along_the_row_is_found(dtype: torch.dtype) -> None:
    model, settings = a_llama(vocab_size=VOCAB + 1, dtype=dtype)
    hook = model.model.layers[0].mlp.register_forward_hook(carry_along)
    with pytest.raises(ConfigError, match=r"'llama' predicts other tokens in item 2 of a packed row"):
        check_reading(model, settings, owner="PrefixLM")
    hook.remove()
    check_reading(model, settings, owner="PrefixLM")


def test_what_fails_is_one_sentence_and_the_mode_stays() -> None:
    model, settings = a_llama(vocab_size=VOCAB + 2)
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(ConfigError) as refused:
        check_reading(model, settings, owner="PrefixLM")
    assert "fails on packed text (IndexError: list index out of range)" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training


def test_rows_padded_in_generation_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that reads packed rows well and takes no notice of the padding of prompts."""
    model, settings = a_llama(vocab_size=VOCAB + 3)
    given = model.generate

    def careless(**options: Any) -> Any:
        return given(**{**options, "attention_mask": torch.ones_like(options["attention_mask"])})

    monkeypatch.setattr(model, "generate", careless)
    with pytest.raises(ConfigError, match="generates different text for several prompts at once"):
        check_reading(model, settings, owner="PrefixLM")


@pytest.mark.parametrize("kind", ["roberta", "camembert", "xmod"])
def test_families_that_count_positions_from_elsewhere_are_refused(kind: str) -> None:
    config = {**llama(), "model_type": kind, "is_decoder": True, "pad_token_id": 1}
    with pytest.raises(ConfigError, match=f"'{kind}' .* of a packed row than for the item alone"):
        PrefixLM(config=config | ({"default_language": "en_XX"} if kind == "xmod" else {}))


def test_a_model_without_weights_is_passed_over() -> None:
    _, settings = a_llama(vocab_size=VOCAB + 4)
    with torch.device("meta"):
        check_reading(AutoModelForCausalLM.from_config(settings), settings, owner="PrefixLM")
