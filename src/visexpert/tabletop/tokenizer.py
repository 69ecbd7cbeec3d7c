"""The word-level tokenizer of the embedded world, as a Hugging Face tokenizer built without files."""

from __future__ import annotations

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from visexpert.tabletop.captions import DENSE_PROMPT, RELATION_PROMPT
from visexpert.tabletop.questions import DISTANCES, NUMBERS, SIDES
from visexpert.tabletop.relations import RELATIONS
from visexpert.tabletop.world import COLOURS, MATERIALS, SHAPES, SIZES

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")

_FUNCTION_WORDS = (
    "a an the and is there in on what which how many are far side image object objects colour shape size material"
)


def tabletop_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: lower case, split at white space and punctuation, one id a word, unknown words ``<unk>``.

    Returns:
        A tokenizer with ``<pad>`` = 0, ``<bos>`` = 1, ``<eos>`` = 2, ``<unk>`` = 3, ``<image>`` = 4.
    """
    model = WordLevel({word: index for index, word in enumerate(vocabulary())}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        clean_up_tokenization_spaces=False,
    )


def vocabulary() -> tuple[str, ...]:
    """Return the closed vocabulary in id order, special tokens first."""
    plurals = [f"{shape}s" for shape in SHAPES]
    prompts = [DENSE_PROMPT, RELATION_PROMPT, _FUNCTION_WORDS]
    groups = [*COLOURS, *SHAPES, *plurals, *SIZES, *MATERIALS, *RELATIONS, *DISTANCES, *SIDES, *NUMBERS, "yes no ?"]
    words = [word for group in (*prompts, *groups) for word in group.split()]
    return tuple(dict.fromkeys((*SPECIAL_TOKENS, *words)))
