"""A tokenizer as language models have them: sub-words after a word mark (Llama's manner), special tokens, offsets."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'<>/[]()-_\n"


def llama_like() -> PreTrainedTokenizerFast:
    """Letters and some joined pairs; ``<s>`` = 0, ``</s>`` = 1, ``<unk>`` = 2."""
    merges = [("A", "S"), ("S", "I"), ("U", "S"), ("E", "R"), ("US", "ER"), ("▁", "USER"), ("▁", "r"), ("e", "d")]
    letters = ["<s>", "</s>", "<unk>", "▁", *LETTERS]
    vocab = {token: index for index, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def written_to(folder: Path) -> PreTrainedTokenizerFast:
    """The same, saved."""
    tokenizer = llama_like()
    tokenizer.save_pretrained(folder)
    return tokenizer
