"""Tokenizers of each kind that language models have, made without files: what of a text becomes one token differs."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.language.tokenizers_made import LETTERS

SPECIAL = ["<unk>", "<s>", "</s>"]
MERGES = [("U", "S"), ("E", "R"), ("US", "ER"), ("▁", "USER"), ("▁", "R"), ("▁R", "e"), ("e", "d")]


def llama(*, legacy: bool) -> PreTrainedTokenizerBase:
    """Llama's with byte fallback: digits and unknown letters stand behind a word mark of their own."""
    return LlamaTokenizer(vocab=_sentencepiece_vocab(), merges=MERGES, legacy=legacy)


def llama_converted() -> PreTrainedTokenizerBase:
    """As older tokenizer.json files of Llama have it: a normalizer puts the word mark before every stretch."""
    backend = Tokenizer(BPE(vocab=_sentencepiece_vocab(), merges=MERGES, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def byte_level() -> PreTrainedTokenizerBase:
    """GPT-2's: a word and the space before it are one token; there is no <bos>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "R"), ("ĠR", "e"), ("ĠRe", "d"), ("U", "S"), ("Ġ", "3")]
    vocab = {token: index for index, token in enumerate(["<|endoftext|>", *letters, *map("".join, merges)])}
    backend = Tokenizer(BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )


def bert() -> PreTrainedTokenizerBase:
    """BERT's: no <bos> and no <eos>, but [CLS] and [SEP]."""
    pieces = [*LETTERS.strip(), *(f"##{letter}" for letter in LETTERS.strip())]
    vocab = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces])}
    backend = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        clean_up_tokenization_spaces=False,
    )


GENERATIVE: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "llama, legacy": lambda: llama(legacy=True),
    "llama, not legacy": lambda: llama(legacy=False),
    "llama, converted": llama_converted,
    "byte level": byte_level,
}
"""By name; each takes text behind a special token, or a digit behind a space, in its own way."""


def _sentencepiece_vocab() -> dict[str, int]:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", *(letter for letter in LETTERS if letter != "\n")]
    return {token: index for index, token in enumerate([*SPECIAL, *bytes_, *letters, *map("".join, MERGES)])}
