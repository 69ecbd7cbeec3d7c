"""Language models from folders and the hub: real file formats, dtypes, freezing, LoRA, quantization."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.language.helpers import item, llama, one_item, vision
from tests.language.llava_models import randomize
from visexpert.errors import ConfigError, WeightsError
from visexpert.language import LoRASettings, PrefixLM
from visexpert.language import causal_lm as causal_lm_module

LORA = LoRASettings(rank=2, alpha=4, dropout=0.0)


def saved(folder: Path, **changes: Any) -> LlamaForCausalLM:
    """A random Llama, written as transformers writes it."""
    fields = {name: value for name, value in {**llama(), **changes}.items() if name != "model_type"}
    model: LlamaForCausalLM = randomize(LlamaForCausalLM(LlamaConfig(**fields)))
    model.save_pretrained(folder)
    return model


def same(side: PrefixLM, state: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in side.model.state_dict().items())


def loaded(source: Path | str, **options: Any) -> PrefixLM:
    side = PrefixLM(source=str(source), **options)
    side.load_weights()
    return side.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(tmp_path / "llama")
    return tmp_path / "llama"


# -- Formats ----------------------------------------------------------------------------------------------------------


def test_sharded_safetensors(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole")
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert same(loaded(tmp_path), model.state_dict())
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(WeightsError, match="no model-.*safetensors in"):
        loaded(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_files(folder: Path, sharded: bool) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(state)
    parts = {"pytorch_model.bin": keys}
    if sharded:
        parts = {"pytorch_model-00001-of-00002.bin": keys[:5], "pytorch_model-00002-of-00002.bin": keys[5:]}
        index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    for name, part in parts.items():
        torch.save({key: state[key] for key in part}, folder / name)
    assert same(loaded(folder), state)


def test_a_torch_file_that_would_run_code_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(nn.Linear(1, 1), folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="the weights in .* cannot be read"):
        loaded(folder)


def test_a_list_of_parts_stays_in_its_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(WeightsError, match=r".'../model.safetensors'..*its own folder"):
        loaded(folder)


def test_missing_damaged_and_unfit_weights(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    torch.save({key: value for key, value in state.items() if "q_proj" not in key}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"do not fit its config.json: missing \['model.layers.0.self_attn.q_proj"):
        loaded(folder)
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match="cannot be read"):
        loaded(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(WeightsError, match="no model.safetensors, .* or pytorch_model.bin.index.json in "):
        loaded(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(WeightsError, match="no model that transformers supports without remote code"):
        PrefixLM(source=str(folder))
    with pytest.raises(WeightsError, match="there is no .*nowhere"):
        PrefixLM(source=str(tmp_path / "nowhere"))


def test_a_hub_id_that_is_not_here_says_how_to_fetch_it() -> None:
    with pytest.raises(WeightsError) as caught:
        PrefixLM(source="lmsys/vicuna-7b-v9")
    message = str(caught.value)
    assert "'lmsys/vicuna-7b-v9'" in message and "config.json of " in message
    assert "`hf download lmsys/vicuna-7b-v9`" in message


def test_a_hub_id_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `hf download` lays it out: a snapshot by commit, named by a ref."""
    repository = tmp_path / "models--some--llama"
    snapshot = repository / "snapshots" / ("a" * 40)
    state = saved(snapshot).state_dict()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert same(loaded("some/llama"), state)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="model.safetensors, .* is not in the cache .*`hf download some/llama`"):
        loaded("some/llama")


def test_a_big_model_takes_no_memory_until_its_weights_come(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm_module, "META_FROM", 1000)
    side = PrefixLM(source=str(folder), lora=LORA)
    assert all(parameter.is_meta for parameter in side.parameters())
    assert {name for name, _ in side.named_parameters()} == {
        name for name, _ in loaded(folder, lora=LORA).named_parameters()
    }
    side.load_weights()
    assert not any(tensor.is_meta for tensor in [*side.parameters(), *side.buffers()])
    assert bool(side(vision(1), one_item(*item(6, 2))).logits_MV.isfinite().all())


def test_vicuna_7b_from_its_configuration_alone(tmp_path: Path) -> None:
    """6,738 M parameters, QLoRA's kind of LoRA of LLaVA-1.5 beside them, in no memory."""
    LlamaConfig(vocab_size=32000, max_position_embeddings=4096).save_pretrained(tmp_path)  # the class's own defaults
    side = PrefixLM(source=str(tmp_path), lora=LoRASettings(), dtype="bfloat16")
    trained = sum(p.numel() for module in side.trained_modules() for p in module.parameters())
    assert sum(p.numel() for p in side.parameters()) - trained == 6_738_415_616
    # Rank 128 on q, k, v, o (4096 to 4096) and gate, up, down (4096 and 11008) of 32 blocks.
    assert trained == 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert all(parameter.is_meta for parameter in side.parameters()) and side.width == 4096


# -- Dtype, memory ----------------------------------------------------------------------------------------------------


def test_bfloat16(folder: Path) -> None:
    side, whole = loaded(folder, dtype="bfloat16"), loaded(folder)
    assert {parameter.dtype for parameter in side.parameters()} == {torch.bfloat16}
    images, text = vision(1), one_item(*item(6, 2))
    logits_MV, wanted_MV = side(images, text).logits_MV.detach(), whole(images, text).logits_MV.detach()
    assert logits_MV.dtype == torch.float32
    assert float((logits_MV - wanted_MV).abs().mean()) < 0.05 * float(wanted_MV.std())
    assert len(side.generate(images, [[1, 4]], eos_id=0, max_new_tokens=3)[0]) <= 3
    with pytest.raises(ConfigError, match="dtype='bf16' is unknown; use one of float32, bfloat16, float16"):
        PrefixLM(source=str(folder), dtype="bf16")  # type: ignore[arg-type]


def test_gradient_checkpointing_changes_no_gradient(folder: Path) -> None:
    text, grads = one_item(*item(7, 2)), []
    tokens_BTD = vision(1).tokens_BTD
    for checkpointing in (False, True):
        side = loaded(folder, gradient_checkpointing=checkpointing, frozen=True).train()
        images = type(vision(1))(tokens_BTD.clone().requires_grad_(), (2, 3))
        side(images, text).logits_MV.square().mean().backward()
        grads.append(images.tokens_BTD.grad)
        blocks = [block for block in side.model.modules() if hasattr(block, "gradient_checkpointing")]
        assert blocks and all(block.gradient_checkpointing is checkpointing for block in blocks)
    torch.testing.assert_close(grads[1], grads[0])


# -- Freezing, LoRA ---------------------------------------------------------------------------------------------------


class Owner(nn.Module):
    """As a method holds its language model."""

    def __init__(self, language: PrefixLM) -> None:
        super().__init__()
        self.language = language


def test_a_frozen_model_has_no_gradient_and_is_in_no_checkpoint(folder: Path) -> None:
    owner = Owner(loaded(folder, frozen=True, image_newline=True))
    owner.language.requires_grad_(True)
    assert [name for name, p in owner.named_parameters() if p.requires_grad] == ["language.image_newline.weight"]
    assert list(owner.state_dict()) == ["language.image_newline.weight"]
    fresh = Owner(loaded(folder, frozen=True, image_newline=True))
    fresh.load_state_dict(owner.state_dict(), strict=True)
    assert torch.equal(fresh.language.image_newline.weight, owner.language.image_newline.weight)  # type: ignore[union-attr]
    assert same(fresh.language, load_file(folder / "model.safetensors"))
    with pytest.raises(RuntimeError, match="image_newline"):  # what trains is still missed
        fresh.load_state_dict({}, strict=True)


def test_without_freezing_everything_is_in_the_checkpoint(folder: Path) -> None:
    side = loaded(folder)
    assert {f"model.{key}" for key in side.model.state_dict()} == set(side.state_dict())
    assert side.trained_modules() == (side,)


def test_lora_starts_as_the_model_and_trains_alone(folder: Path) -> None:
    images, text = vision(1), one_item(*item(7, 2))
    owner, plain = Owner(loaded(folder, lora=LORA)), loaded(folder)
    side = owner.language.requires_grad_(True)
    assert torch.equal(side(images, text).logits_MV, plain(images, text).logits_MV)
    trained = {name for name, parameter in owner.named_parameters() if parameter.requires_grad}
    layers = [f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")]
    assert {name.split(".")[-4] for name in trained} == set(layers) and len(trained) == 2 * 2 * len(layers)
    assert set(owner.state_dict()) == trained
    listed = {id(p) for module in side.trained_modules() for p in module.parameters()}
    assert listed == {id(p) for name, p in owner.named_parameters() if name in trained}
    optimizer = torch.optim.SGD([p for p in owner.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        side(images, text).logits_MV.square().mean().backward()
        optimizer.step()
    moved = side(images, text).logits_MV
    assert not torch.allclose(moved, plain(images, text).logits_MV, atol=1e-3)
    again = Owner(loaded(folder, lora=LORA))
    again.load_state_dict(owner.state_dict(), strict=True)
    torch.testing.assert_close(again.language(images, text).logits_MV, moved)
    unread = Owner(PrefixLM(source=str(folder), lora=LORA).eval())
    unread.load_state_dict(owner.state_dict(), strict=True)  # which has no base: it is read now
    torch.testing.assert_close(unread.language(vision=images, text=text).logits_MV, moved)
    merged = side.plain_model()
    plain.model.load_state_dict(merged.state_dict(), strict=True)
    torch.testing.assert_close(plain(images, text).logits_MV, moved, atol=1e-4, rtol=1e-4)
    assert set(merged.state_dict()) == set(load_file(folder / "model.safetensors"))
    torch.testing.assert_close(side(images, text).logits_MV, moved)  # the run's own model is as it was


def test_lora_on_named_layers_stays_float32_beside_bfloat16(folder: Path) -> None:
    side = loaded(folder, dtype="bfloat16", lora=LoRASettings(rank=2, alpha=2, targets=["q_proj"]))
    side.requires_grad_(True)
    trained = {name: p.dtype for name, p in side.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and set(trained.values()) == {torch.float32} and all("q_proj" in name for name in trained)
    side(vision(1), one_item(*item(6, 2))).logits_MV.square().mean().backward()
    down, up = (p for name, p in side.named_parameters() if p.requires_grad and "layers.0" in name)
    nn.init.constant_(up, 1e-4)  # too small a step for bfloat16
    own = side.model.model.layers[0].self_attn.q_proj.base_layer.weight
    merged = side.plain_model().model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.float32 and own.dtype == torch.bfloat16
    torch.testing.assert_close(merged, own.float() + up @ down)
    with pytest.raises(
        ConfigError, match=r"targets \['query'\] name no linear layer of the model; use some of .*'q_proj'"
    ):
        PrefixLM(source=str(folder), lora=LoRASettings(targets=["query"]))
    with pytest.raises(ConfigError, match="rank=0, .* are invalid"):
        LoRASettings(rank=0)


def test_a_frozen_random_model_is_refused() -> None:
    """No checkpoint would hold it, so it could never be read again."""
    for options in ({"frozen": True}, {"lora": LORA}):
        with pytest.raises(ConfigError, match="so its weights need a source"):
            PrefixLM(config=llama(), **options)


# -- Quantization -----------------------------------------------------------------------------------------------------

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def test_quantization_without_bitsandbytes_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visexpert.language.lora.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'nf4' needs bitsandbytes, which is not installed: pip install"):
        PrefixLM(source=str(folder), lora=LORA, quantization="nf4")


def test_impossible_quantization(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visexpert.language.lora.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="quantization='int4' is unknown; use one of nf4, int8"):
        PrefixLM(source=str(folder), lora=LORA, quantization="int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'nf4' holds the weights of a source that stay as they are; give source"):
        PrefixLM(source=str(folder), quantization="nf4")


def test_packed_weights_are_the_linear_layers_of_the_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visexpert.language.pretrained.quantized", lambda kind, dtype: None)
    assert PrefixLM(source=str(folder), lora=LORA).packed_weights() == {}
    for kind, size in (("nf4", 0.52), ("int8", 1.0)):
        side = PrefixLM(source=str(folder), lora=LORA, quantization=kind)  # type: ignore[arg-type]
        packed = side.packed_weights()
        names = {name for name, weight in side.model.named_parameters() if id(weight) in packed}
        kinds = {name.split(".layers.")[1].removesuffix(".weight").removesuffix(".base_layer")[2:] for name in names}
        attention = {f"self_attn.{letter}_proj" for letter in "qkvo"}
        assert kinds == attention | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
        assert len(names) == 7 * side.settings.num_hidden_layers == len(packed)
        assert set(packed.values()) == {size}


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
def test_qlora_trains_beside_four_bits(tmp_path: Path) -> None:
    """On the CPU kernels of bitsandbytes, in shapes that they take."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    saved(tmp_path, **wide)
    side = loaded(tmp_path, lora=LORA, quantization="nf4")
    kinds = {type(module).__name__ for module in side.modules()}
    assert "Linear4bit" in kinds
    images = type(vision(1))(torch.randn(1, 6, 64), (2, 3))
    text = one_item(*item(7, 2))
    plain = loaded(tmp_path)
    found_MV, plain_MV = side(images, text).logits_MV.detach(), plain(images, text).logits_MV.detach()
    error = (found_MV - plain_MV).abs().mean() / plain_MV.std()
    assert 0 < float(error) < 0.5
    side.requires_grad_(True)
    side(images, text).logits_MV.square().mean().backward()
    trained = [p for module in side.trained_modules() for p in module.parameters()]
    assert trained and all(p.grad is not None for p in trained)
    owner, again = Owner(side), Owner(loaded(tmp_path, lora=LORA, quantization="nf4"))
    assert all(".lora_" in key for key in owner.state_dict())
    again.load_state_dict(owner.state_dict(), strict=True)
    with pytest.raises(ConfigError, match="updates cannot be added to weights in nf4"):
        side.plain_model()
