"""Shared base of wrapped transformers models: building, loading weights, freezing, LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import Self

from visexpert.errors import ConfigError
from visexpert.io.source import ModelSource
from visexpert.io.weights import fill_module, read_source
from visexpert.language.base import LanguageModel
from visexpert.language.causal_lm import Dtype, build_config, build_model, read_model, torch_dtype
from visexpert.language.lora import PACKED, LoRASettings, Quantization, add_lora, lora_modules, quantized


class PretrainedSide(LanguageModel):
    """Holds a causal language model of transformers as ``model``; the arguments are those of its subclasses."""

    fresh: tuple[str, ...] = ()
    """Fragments of weight names that a source may lack."""

    def __init__(
        self,
        *,
        config: dict[str, Any] | None,
        source: str | None,
        weights: str | None,
        dtype: Dtype,
        frozen: bool,
        lora: LoRASettings | None,
        quantization: Quantization | None,
        gradient_checkpointing: bool,
    ) -> None:
        self.owner = type(self).__name__
        if (config is None) == (source is None):
            raise ConfigError(
                f"{self.owner} takes either config (a random model) or source (a folder or Hugging Face id)."
            )
        settings = self.adapt(build_config(config, source, owner=self.owner))
        super().__init__(width=int(settings.hidden_size))
        self.settings, self.source = settings, source
        self._dtype = torch_dtype(dtype, owner=self.owner)
        self._weights, self._lora, self._quantization = weights, lora, quantization
        self._is_frozen, self._checkpointing = frozen or lora is not None, gradient_checkpointing
        self._check()
        self.model: Any = None
        self._take(build_model(settings, dtype=self._dtype, weights_follow=source is not None, owner=self.owner))
        if self._is_frozen:
            leave_out_of_checkpoints(self, self._frozen_names)

    def adapt(self, settings: Any) -> Any:
        """Adapt a configuration to this class."""
        return settings

    def read(self, source: str) -> nn.Module:
        """Read the model with the weights of a source."""
        return read_model(
            source,
            self.settings,
            dtype=self._dtype,
            quantization=self._quantization,
            owner=self.owner,
            fresh=self.fresh,
        )

    def added_modules(self) -> tuple[nn.Module, ...]:
        """Return the modules trained beside the model, whether it is frozen or not."""
        return ()

    def load_weights(self) -> None:
        """Load the model's weights from ``source`` or ``weights``, if any.

        Raises:
            WeightsError: They are missing or do not fit.
        """
        if self.source is not None:
            self._take(self.read(self.source))
        elif self._weights is not None:
            found = read_source(ModelSource.parse(self._weights), owner=self.owner)
            state = dict(found.tensors)
            for copied, original in self.model._tied_weights_keys.items():  # tied weights are stored only once
                state.setdefault(copied, state.get(original, torch.empty(0)))
            fill_module(self.model, state, owner=self.owner, path=found.path)

    @property
    def vocab_size(self) -> int | None:
        """See :attr:`LanguageModel.vocab_size`."""
        return getattr(self.model.get_input_embeddings(), "num_embeddings", None)

    @property
    def weights_from(self) -> str | None:
        """See :attr:`LanguageModel.weights_from`."""
        return self.source if self.source is not None else self._weights

    @property
    def has_source(self) -> bool:
        """Whether ``source`` or ``weights`` is set."""
        return self.source is not None or self._weights is not None

    def packed_weights(self) -> dict[int, float]:
        """See :meth:`LanguageModel.packed_weights`: frozen linear layers, except the output layer."""
        if self._quantization is None:
            return {}
        added = {module for part in lora_modules(self.model) for module in part.modules()}
        left_out = {self.model.get_output_embeddings(), *added}
        layers = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear | Conv1D)]
        return {id(layer.weight): PACKED[self._quantization] for layer in layers if layer not in left_out}

    def trained_modules(self) -> tuple[nn.Module, ...]:
        """Return the modules that train: all, or those added to a frozen model."""
        return (*lora_modules(self.model), *self.added_modules()) if self._is_frozen else (self,)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of any module, except that a frozen model stays frozen."""
        if not self._is_frozen:
            return super().requires_grad_(requires_grad)
        for module in self.trained_modules():
            module.requires_grad_(requires_grad)
        return self

    def plain_model(self) -> Any:
        """Return the language model alone; if it has LoRA, a float32 copy with the updates added to its weights.

        Raises:
            ConfigError: Its weights are quantized.
        """
        if self._lora is None:
            return self.model
        if self._quantization is not None:
            raise ConfigError(
                f"{self.owner}: updates cannot be added to weights in {self._quantization}; load the run with "
                "quantization null (the checkpoint holds the updates alone)."
            )
        copied: Any = copy.deepcopy(self)
        copied.model.float()  # bfloat16 would round away most of an update
        return copied._tuner.merge_and_unload()

    def _check(self) -> None:
        if self._quantization is not None:
            quantized(self._quantization, self._dtype)
            if self.source is None or self._lora is None:
                raise ConfigError(
                    f"{self.owner}: quantization={self._quantization!r} holds the weights of a source that stay as "
                    "they are; give source, and lora for what trains."
                )
        if self._is_frozen and self.source is None and self._weights is None:
            raise ConfigError(
                f"{self.owner}: a frozen model (lora has one, too) is in no checkpoint, so its weights need a source; "
                "give one instead of config, or beside it weights."
            )

    def _take(self, model: nn.Module) -> None:
        """Take over a model."""
        if self._is_frozen:
            model.requires_grad_(False)
        if self._lora is not None:
            self.__dict__["_tuner"] = add_lora(model, self._lora)  # not a submodule: it holds the same weights
        if self._checkpointing:
            # Prefer the newer name: transformers is about to drop the older one.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})  # type: ignore[operator]
        self.model = model

    def _frozen_names(self) -> set[str]:
        """Return the names of what ``source`` holds."""
        kept = {id(parameter) for module in self.trained_modules() for parameter in module.parameters()}
        state: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        return {f"model.{name}" for name, value in state.items() if id(value) not in kept}


def leave_out_of_checkpoints(module: nn.Module, names: Callable[[], Collection[str]]) -> None:
    """Keep some of a module's weights out of its state dict, even if it is part of a larger module.

    Args:
        module: The module; these weights must be filled before a checkpoint is loaded.
        names: Returns their names in the module's own state dict.
    """
    seen: dict[str, str] = {}

    def drop(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in names():
            state.pop(prefix + name, None)

    def note(_: nn.Module, __: Any, prefix: str, *___: Any) -> None:
        seen["prefix"] = prefix

    def forgive(_: nn.Module, incompatible: Any) -> None:
        absent = {seen["prefix"] + name for name in names()}
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in absent]

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_pre_hook(note)
    module.register_load_state_dict_post_hook(forgive)
