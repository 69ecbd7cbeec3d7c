"""Caption scores: BLEU, ROUGE-L, CIDEr, METEOR, SPICE, by pycocoevalcap's implementations."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from visexpert.errors import ConfigError, DataError
from visexpert.metrics import java, ptb
from visexpert.metrics.records import RecordMetric, Row, check_lengths, families_or_blank
from visexpert.typed import typed

Tokenizer: TypeAlias = Literal["python", "java", "auto"]


@typed
class CaptionScores(RecordMetric):
    """BLEU-1..4, ROUGE-L, CIDEr, and, if available, METEOR and SPICE, over a corpus of captions.

    ``compute()``: ``bleu-1`` .. ``bleu-4``, ``rouge-l``, ``cider``, and, if requested, ``meteor`` and ``spice``; all in
    [0, 1] except CIDEr, which is in [0, 10]. Papers report them times 100. Note that CIDEr takes its n-gram statistics
    from the references seen since the last reset, and is 0 for a single image. If images have families,
    ``family/<name>/<score>`` scores each family as a separate corpus (NoCaps' domains).

    Args:
        tokenizer: ``python`` (:func:`visexpert.metrics.ptb.tokenize`, equal to the official one on captions),
            ``java`` (the official one), or ``auto`` (``java`` if Java is installed).
        meteor: True, False, or None: only if Java is installed.
        spice: True or False. Needs Java and 500 MB of models, which are never downloaded automatically.

    Raises:
        ConfigError: Java is needed but not installed; or ``tokenizer`` is unknown.
        WeightsError: SPICE's models are missing.
    """

    higher_is_better = True

    def __init__(
        self, *, tokenizer: Tokenizer = "python", meteor: bool | None = None, spice: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if tokenizer not in ("python", "java", "auto"):
            raise ConfigError(f"the caption tokenizer {tokenizer!r} is unknown: use python, java or auto")
        self.meteor = java.has_java() if meteor is None else meteor
        self.java_tokenizer = java.has_java() if tokenizer == "auto" else tokenizer == "java"
        self.spice = spice
        # Fail now rather than at the end of a long evaluation.
        if self.java_tokenizer:
            java.require_java("the official PTB tokenizer")
        if self.meteor:
            java.require_java("METEOR")
        if self.spice:
            java.require_spice()

    def update(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        families: Sequence[str] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            predictions: One caption per image.
            references: All reference captions of each image, at least one.
            families: Subcategory of each image, for the report.
        """
        families = families_or_blank(families, len(predictions))
        check_lengths(predictions=predictions, references=references, families=families)
        for texts in references:
            if isinstance(texts, str) or not texts:
                raise ValueError(f"each image needs a list of at least one reference caption, got {texts!r}")
        rows = zip(predictions, references, families, strict=True)
        self.add_rows([said, list(true), family] for said, true, family in rows)

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Tokenize everything, then score the corpus, and each family of it.

        Raises:
            DataError: No reference contains a word.
        """
        predictions, references = self._tokenized(rows)
        if not any(text for texts in references.values() for text in texts):
            raise DataError(f"none of the reference captions of {len(rows)} images has a word: check the annotations")
        scores = self._scores(predictions, references)
        for family in sorted({family for *_, family in rows if family}):
            images = [image for image, row in enumerate(rows) if row[2] == family]
            said, true = ({image: texts[image] for image in images} for texts in (predictions, references))
            scores.update({f"family/{family}/{name}": value for name, value in self._scores(said, true).items()})
        return scores

    def _scores(self, predictions: java.References, references: java.References) -> dict[str, float]:
        with contextlib.redirect_stdout(io.StringIO()):  # the scorers print ratios and sums
            bleu, _ = Bleu(4).compute_score(references, predictions, verbose=0)
            rouge, _ = Rouge().compute_score(references, predictions)
            cider, _ = Cider().compute_score(references, predictions)
        scores = {f"bleu-{order}": float(value) for order, value in enumerate(bleu, start=1)}
        scores |= {"rouge-l": float(rouge), "cider": float(cider)}
        if self.meteor:
            scores["meteor"] = java.meteor_score(references, predictions)
        if self.spice:
            scores["spice"] = java.spice_score(references, predictions)
        return scores

    def _tokenized(self, rows: list[Row]) -> tuple[java.References, java.References]:
        texts = [text for said, true, _ in rows for text in (said, *true)]
        tokenized = iter(tokenize(texts, use_java=self.java_tokenizer))
        predictions: java.References = {}
        references: java.References = {}
        for image, (_, true, _) in enumerate(rows):
            predictions[image] = [next(tokenized)]
            references[image] = [next(tokenized) for _ in true]
        return predictions, references


class JudgedCaptions(RecordMetric):
    """Share of captions for which each judgment of the data holds (:class:`~visexpert.types.CaptionTruth`).

    ``compute()`` gives one share in [0, 1] per name, over the captions that have a judgment of that name.
    """

    higher_is_better = True

    def update(self, judgments: Sequence[Mapping[str, bool]]) -> None:
        """Count the judgments of a batch, one mapping per caption."""
        self.add_rows([[dict(judgment)] for judgment in judgments])

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Average over captions."""
        found: dict[str, list[bool]] = {}
        for (judgment,) in rows:
            for name, holds in judgment.items():
                found.setdefault(name, []).append(holds)
        return {name: sum(held) / len(held) for name, held in sorted(found.items())}


def tokenize(texts: Sequence[str], *, use_java: bool = False) -> list[str]:
    """Tokenize captions as pycocoevalcap does: PTB tokens in lower case, joined by spaces, punctuation removed.

    Args:
        texts: Captions.
        use_java: Use the official tokenizer.
    """
    tokens = java.tokenize_with_java(texts) if use_java else [ptb.tokenize(text) for text in texts]
    return [" ".join(words) for words in tokens]
