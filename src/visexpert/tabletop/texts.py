"""All texts of a split, generated once and cached as JSON lines, and the tokenizer that knows their words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from visexpert.errors import DataError
from visexpert.io.files import whole_file
from visexpert.io.reading import parse_json
from visexpert.tabletop.captions import (
    DENSE_PROMPT,
    RELATION_PROMPT,
    SCORED_AS,
    dense_caption,
    object_captions,
    relation_captions,
)
from visexpert.tabletop.graph import RELATIONS, SceneGraph, facts_of
from visexpert.tabletop.questions import (
    DISTANCES,
    NUMBERS,
    SIDES,
    Balancer,
    popular_phrases,
    probes,
    questions,
    statements,
)
from visexpert.tabletop.world import COLOURS, MATERIALS, SHAPES, SIZES
from visexpert.types import TextItem

POOL_SIZES: dict[str, int] = {"dense": 1, "relation": 4, "vsr": 6, "vqa": 8, "pope": 4, "objects": 4}
"""Maximum number of items of each kind in a scene's pool; scenes with few clear facts have fewer."""
TEXT_VERSION = 1
"""Increase it whenever the same scenes and seed give other texts, so that no stale cache is used."""
Pools = list[list[TextItem]]
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
_FUNCTION_WORDS = (
    "a an the and is there in on what which how many are far side image object objects colour shape size material"
)


def ensure_pools(
    graphs: Sequence[SceneGraph], *, beside: Path, split: str, seed: int, fingerprint: str, progress: bool = True
) -> Pools:
    """Read the text pools of a split from the cache, or generate and cache them.

    Args:
        graphs: The split's scenes in order.
        beside: The rendered split; the texts lie next to it as ``<name>.text-<key>.jsonl``.
        split: Name of the split.
        seed: Seed of the split.
        fingerprint: Fingerprint of the scenes.
        progress: Show a progress bar while generating.

    Returns:
        One list of items per scene, kinds in the order of :data:`POOL_SIZES`.

    Raises:
        DataError: If the cache cannot be written.
    """
    content = json.dumps([TEXT_VERSION, split, seed, len(graphs), fingerprint, POOL_SIZES])
    path = beside.with_name(f"{beside.name}.text-{hashlib.sha256(content.encode()).hexdigest()[:12]}.jsonl")
    cached = _read(path, len(graphs))
    if cached is not None:
        return cached
    pools = generate_pools(graphs, split=split, seed=seed, progress=progress)
    _write(path, pools)
    return pools


def generate_pools(graphs: Sequence[SceneGraph], *, split: str, seed: int, progress: bool = True) -> Pools:
    """Generate the texts of a split's scenes; a pure function of its arguments.

    Answers are balanced over the split as it grows, so the first part of a split is balanced as well.

    Args:
        graphs: The split's scenes in order.
        split: Name of the split (part of the random stream).
        seed: Seed of the split.
        progress: Show a progress bar.
    """
    words = hashlib.sha256(f"{split}/{seed}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(words, dtype=np.uint32).tolist())
    popular = popular_phrases(graphs)
    balancers = {kind: Balancer() for kind in ("vsr", "vqa", "pope")}
    pools: Pools = []
    for graph in tqdm(graphs, desc=f"texts of {split}", unit="scene", disable=not progress):
        facts = facts_of(graph)
        pools.append(
            [
                dense_caption(graph),
                *relation_captions(graph, rng, POOL_SIZES["relation"], facts=facts),
                *statements(graph, rng, balancers["vsr"], POOL_SIZES["vsr"], facts=facts),
                *questions(graph, rng, balancers["vqa"], POOL_SIZES["vqa"]),
                *probes(graph, rng, balancers["pope"], popular, POOL_SIZES["pope"]),
                *object_captions(graph, rng, POOL_SIZES["objects"]),
            ]
        )
    return pools


def tabletop_tokenizer() -> PreTrainedTokenizerFast:
    """Build Tabletop's tokenizer: lower case, split at white space and punctuation, one id per word.

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


def _read(path: Path, num_scenes: int) -> Pools | None:
    """Read a cached file; a file that is unreadable or incomplete counts as missing and is written again."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        pools = [
            [
                TextItem(kind, prompt, answer, family, tuple(texts), scored_as=SCORED_AS.get(kind, ""))
                for kind, prompt, answer, family, texts in row
            ]
            for row in map(parse_json, lines)
        ]
    except (OSError, ValueError, TypeError):
        return None
    return pools if len(pools) == num_scenes else None


def _write(path: Path, pools: Pools) -> None:
    """Write the file completely or not at all: a killed run leaves no partial file under the final name."""
    try:
        with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
            for pool in pools:
                rows = [[item.kind, item.prompt, item.answer, item.family, item.references] for item in pool]
                file.write(json.dumps(rows, separators=(",", ":")) + "\n")
    except OSError as error:
        raise DataError(
            f"The texts of the embedded world could not be written to {path}: {error.strerror or error}; "
            "free some space there or choose another `root`."
        ) from error
