"""A tiny MoVE-KD, written as its training writes files, and its forward in plain torch from those files' own names.

The forward follows the formulas of the released code (hey-cjj/MoVE-KD at c822da0); nothing of ours is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tests.language.llava_models import randomize
from tests.language.tokenizers_made import written_to

DEPTH, WIDTH, HIDDEN, HEADS, SIDE, PATCH = 3, 16, 32, 2, 32, 8
TOKENS = (SIDE // PATCH) ** 2
EXPERTS, RANK, ALPHA = 3, 4, 1.0
TEXT = 16
TOWER = "model.vision_tower.vision_tower.vision_model."
TEACHERS = {"eva": (24, 64), "convnext": (40, 16), "sam": (8, 64)}
"""Channels and tokens of each teacher."""

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


class Release:
    """Folders ``clip``, ``vicuna``, ``stage1`` and ``stage2`` under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokenizer = written_to(root / "vicuna")
        vision = CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            image_size=SIDE,
            patch_size=PATCH,
            hidden_act="quick_gelu",
        )
        clip: Any = randomize(CLIPVisionModel(vision))
        clip.save_pretrained(root / "clip")
        text = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=TEXT,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        )
        self.language: Any = randomize(LlamaForCausalLM(text))
        self.language.save_pretrained(root / "vicuna")
        self.clip = {f"{TOWER}{key}": value.clone() for key, value in clip.state_dict().items()}
        self.mole = _mole()
        self.projector = _linears({"model.mm_projector.0": (WIDTH, TEXT), "model.mm_projector.2": (TEXT, TEXT)})
        sizes = {f"{name}_adapter_1": (channels, WIDTH) for name, (channels, _) in TEACHERS.items()}
        sizes |= {f"{name}_adapter_2": (tokens, TOKENS) for name, (_, tokens) in TEACHERS.items()}
        self.adapters = _linears(sizes)

    def write_stage1(self, *, config: dict[str, Any] | None = None) -> Path:
        """Three .bin files, and ``config.json`` where one is given."""
        folder = self.root / "stage1"
        folder.mkdir()
        torch.save(self.projector, folder / "mm_projector.bin")
        torch.save({key: value.bfloat16() for key, value in self.mole.items()}, folder / "mole_encoder.bin")
        self.mole = {key: value.bfloat16().float() for key, value in self.mole.items()}
        torch.save(self.adapters, folder / "encoder_adapter.bin")
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    def write_stage2(self, *, sharded: bool = True, **config: Any) -> Path:
        """A whole checkpoint as transformers' Trainer writes it; CLIP is another than the one it began as."""
        folder = self.root / "stage2"
        folder.mkdir()
        self.clip = {key: value + 0.05 * torch.randn_like(value) for key, value in self.clip.items()}
        clip = {key.replace(".mlp.fc", ".mlp.original_module.fc"): value for key, value in self.clip.items()}
        state = {**self.language.state_dict(), **clip, **self.mole, **self.projector, **self.adapters}
        state = {key: value.contiguous() for key, value in state.items()}
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as older versions wrote it
        if sharded:
            names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
            places = {key: names[index % 3] for index, key in enumerate(sorted(state))}
            for name in names:
                save_file({key: state[key] for key in places if places[key] == name}, folder / name)
            index = {"metadata": {}, "weight_map": places}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        else:
            torch.save(state, folder / "pytorch_model.bin")
        settings = json.loads((self.root / "vicuna" / "config.json").read_text(encoding="utf-8"))
        settings |= {"model_type": "move_llava_llama", "architectures": ["MoVELlavaLlamaForCausalLM"]}
        settings |= {"mm_vision_tower": "openai/clip", "mm_vision_select_layer": -2, "mm_hidden_size": WIDTH, **config}
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        for path in (self.root / "vicuna").glob("token*"):
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    # -- The released forward -----------------------------------------------------------------------------------------

    def tokens(self, pixels_BCHW: Tensor, *, dense: bool = False) -> Tensor:
        """Hidden state -2 of the student, patches only: (B, T, D)."""
        weights = self.clip
        patches = F.conv2d(pixels_BCHW, weights[f"{TOWER}embeddings.patch_embedding.weight"], stride=PATCH)
        cls = weights[f"{TOWER}embeddings.class_embedding"].expand(len(pixels_BCHW), 1, -1)
        hidden = torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)
        hidden = _norm(
            hidden + weights[f"{TOWER}embeddings.position_embedding.weight"], weights, f"{TOWER}pre_layrnorm"
        )
        for layer in range(DEPTH - 1):
            block = f"{TOWER}encoder.layers.{layer}."
            hidden = hidden + self._attention(_norm(hidden, weights, f"{block}layer_norm1"), f"{block}self_attn.")
            hidden = hidden + self._mlp(_norm(hidden, weights, f"{block}layer_norm2"), f"{block}mlp.", dense)
        return hidden[:, 1:]

    def seen(self, pixels_BCHW: Tensor, *, dense: bool = False) -> Tensor:
        """Tokens in the language width."""
        hidden = F.gelu(_linear(self.tokens(pixels_BCHW, dense=dense), self.projector, "model.mm_projector.0"))
        return _linear(hidden, self.projector, "model.mm_projector.2")

    def write(self, image_3HW: Tensor, question: str, *, length: int) -> str:
        """Greedy text on an image in [0, 1] of CLIP's size, asked as LLaVA asks."""
        system = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions."
        )
        before, after = ([0, *self._ids(f"{system} USER: ")], self._ids(f"\n{question} ASSISTANT:"))
        embed = self.language.get_input_embeddings()
        image = self.seen(((image_3HW - MEAN) / STD)[None])[0]
        ids: list[int] = []
        for _ in range(length):
            rows = torch.cat([embed(torch.tensor(before)), image, embed(torch.tensor(after + ids))])
            token = int(self.language(inputs_embeds=rows[None]).logits[0, -1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            ids.append(token)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def adapted(self, teacher: str, tokens_BSE: Tensor) -> Tensor:
        """What an encoder adapter makes of a teacher's tokens."""
        mapped = _linear(tokens_BSE, self.adapters, f"{teacher}_adapter_1").transpose(1, 2)
        return _linear(F.gelu(mapped), self.adapters, f"{teacher}_adapter_2").transpose(1, 2)

    def _ids(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _attention(self, x: Tensor, name: str) -> Tensor:
        query, key, value = (
            _linear(x, self.clip, f"{name}{part}_proj").unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in "qkv"
        )
        weights = (query @ key.transpose(-1, -2) / (WIDTH / HEADS) ** 0.5).softmax(-1)
        return _linear((weights @ value).transpose(1, 2).flatten(2), self.clip, f"{name}out_proj")

    def _mlp(self, x: Tensor, name: str, dense: bool) -> Tensor:
        probs = _linear(x, self.mole, f"{name}router").softmax(-1)
        gates = probs if dense else F.one_hot(probs.argmax(-1), EXPERTS).float()
        for side, linear in (("moe_down", "fc1"), ("moe_up", "fc2")):
            added = torch.zeros(())
            for expert in range(EXPERTS):
                part = f"{name}{side}.{expert}."
                low = _linear(x, self.mole, f"{part}lora_A")
                added = added + gates[..., expert, None] * (ALPHA / RANK) * _linear(low, self.mole, f"{part}lora_B")
            x = _linear(x, self.clip, f"{name}{linear}") + added
            if linear == "fc1":
                x = x * torch.sigmoid(1.702 * x)
        return x


def _mole() -> dict[str, Tensor]:
    sizes: dict[str, tuple[int, int]] = {}
    for layer in range(DEPTH):
        mlp = f"{TOWER}encoder.layers.{layer}.mlp."
        sizes[f"{mlp}router"] = (WIDTH, EXPERTS)
        for expert in range(EXPERTS):
            for side, (inside, outside) in {"moe_down": (WIDTH, HIDDEN), "moe_up": (HIDDEN, WIDTH)}.items():
                sizes[f"{mlp}{side}.{expert}.lora_A"] = (inside, RANK)
                sizes[f"{mlp}{side}.{expert}.lora_B"] = (RANK, outside)
    return _linears(sizes)


def _linears(sizes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Random weights (out, in) and biases (out,), wide enough to matter."""
    state: dict[str, Tensor] = {}
    for name, (inside, outside) in sizes.items():
        state[f"{name}.weight"] = 0.6 * torch.randn(outside, inside)
        state[f"{name}.bias"] = 0.6 * torch.randn(outside)
    return state


def _linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)
