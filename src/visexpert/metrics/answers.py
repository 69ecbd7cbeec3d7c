"""Accuracy of short answers by the official rules: VQA v2, VSR and POPE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from visexpert.errors import DataError
from visexpert.metrics.records import RecordMetric, Row, check_lengths, families_or_blank, mean_by_family
from visexpert.typed import typed


@typed
class VQAAccuracy(RecordMetric):
    """Accuracy of short answers, as the VQA v2 evaluation defines it.

    With several references (ten human answers) an answer scores ``min(matches / 3, 1)``, averaged over all subsets that
    leave one human out; with a single reference it scores 1 for a match, else 0. Normalization follows
    https://github.com/GT-Vision-Lab/VQA at commit a013f00 (see :func:`normalize_answer`).

    ``compute()``: ``accuracy``, and ``family/<name>`` per family; all in [0, 1].

    Args:
        unanimous: How to score a question whose references are all the same string. The official code then compares
            the raw strings, so that ``Yes.`` scores 0 against ten times ``yes``: ``raw`` does the same and matches what
            a server would report. ``normalize`` treats such questions like all others.
    """

    higher_is_better = True

    def __init__(self, *, unanimous: Literal["raw", "normalize"] = "raw", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.unanimous = unanimous

    def update(
        self,
        predictions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        families: Sequence[str] | None = None,
    ) -> None:
        """Score a batch.

        Args:
            predictions: One answer per question.
            references: The answer to each question, or all human answers.
            families: Subcategory of each question, for the report.
        """
        families = families_or_blank(families, len(predictions))
        check_lengths(predictions=predictions, references=references, families=families)
        rows = zip(predictions, references, families, strict=True)
        self.add_rows([family, self._accuracy(answer, truth)] for answer, truth, family in rows)

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Average over questions."""
        return mean_by_family((family, value) for family, value in rows)

    def _accuracy(self, answer: str, references: str | Sequence[str]) -> float:
        truths = [references] if isinstance(references, str) else list(references)
        if not truths:
            raise ValueError(f"the question answered with {answer!r} has no reference")
        answer, truths = _one_line(answer), [_one_line(truth) for truth in truths]
        if len(truths) == 1:
            return float(normalize_answer(answer) == normalize_answer(truths[0]))
        if len(set(truths)) > 1 or self.unanimous == "normalize":
            answer, truths = normalize_answer(answer), [normalize_answer(truth) for truth in truths]
        matches = [truth == answer for truth in truths]
        return sum(min((sum(matches) - left_out) / 3, 1.0) for left_out in matches) / len(truths)


@typed
class VSRAccuracy(RecordMetric):
    """Accuracy of statements judged true or false (VSR, https://arxiv.org/abs/2205.00363), overall and by family.

    Answers are read by :func:`parse_truth`; one that is neither true nor false counts as wrong.
    ``compute()``: ``accuracy``, ``family/<name>`` per family, and ``unparsable``, the share of answers that are
    neither; all in [0, 1].
    """

    higher_is_better = True

    def update(
        self, predictions: Sequence[str], references: Sequence[str], families: Sequence[str] | None = None
    ) -> None:
        """Score a batch.

        Args:
            predictions: What the model wrote.
            references: The truth: ``yes``/``no``, ``true``/``false`` or ``1``/``0``.
            families: Subcategory of each statement, for the report.

        Raises:
            DataError: A reference is neither true nor false.
        """
        families = families_or_blank(families, len(predictions))
        check_lengths(predictions=predictions, references=references, families=families)
        rows = zip(predictions, references, families, strict=True)
        self.add_rows([family, parse_truth(answer), reference_truth(truth)] for answer, truth, family in rows)

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Average over statements."""
        scores = mean_by_family((family, float(answer == truth)) for family, answer, truth in rows)
        scores["unparsable"] = sum(answer is None for _, answer, _ in rows) / len(rows)
        return scores


@typed
class POPEScores(RecordMetric):
    """Accuracy, precision, recall, F1 and yes-ratio of existence probes (https://arxiv.org/abs/2305.10355).

    Answers are read as the official script reads them (:func:`parse_pope`), so anything that is not a denial counts as
    "yes", even an empty answer. ``unparsable`` reveals this: the share of answers that neither deny nor say ``yes`` or
    ``true``.

    ``compute()``: ``accuracy``, ``precision``, ``recall``, ``f1``, ``yes_ratio``, ``unparsable`` over all probes, and
    ``<kind>/<score>`` for each kind (``random``, ``popular``, ``adversarial``); all in [0, 1]. "Yes" is the positive
    class. A ratio without cases (precision without a yes) is 0; the official script divides by zero there.
    """

    higher_is_better = True

    def update(self, predictions: Sequence[str], references: Sequence[str], kinds: Sequence[str] | None = None) -> None:
        """Score a batch.

        Args:
            predictions: What the model wrote.
            references: ``yes`` or ``no``.
            kinds: How the object was drawn (``random``, ``popular``, ``adversarial``), for the report.

        Raises:
            DataError: A reference is neither yes nor no.
        """
        kinds = families_or_blank(kinds, len(predictions))
        check_lengths(predictions=predictions, references=references, kinds=kinds)
        self.add_rows(
            [kind, parse_pope(answer), reference_truth(truth), parse_pope(answer) and parse_truth(answer) is not True]
            for answer, truth, kind in zip(predictions, references, kinds, strict=True)
        )

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Score all probes together, then each kind."""
        scores = _binary_scores(rows)
        for kind in sorted({kind for kind, *_ in rows if kind}):
            of_kind = _binary_scores([row for row in rows if row[0] == kind])
            scores.update({f"{kind}/{name}": value for name, value in of_kind.items()})
        return scores


def normalize_answer(text: str) -> str:
    """Normalize an answer by the official rules.

    In this order: punctuation other than ``.`` ``:`` ``'`` ``&`` ``$`` ``%`` is deleted where it touches a space
    anywhere in the answer or the answer has a number with a comma, else it becomes a space; periods not followed
    by a digit are deleted; the rest is lower-cased; number words to ten (and ``none``) become digits; articles are
    dropped; contractions without an apostrophe get it back.
    """
    has_comma_number = _COMMA_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if touches_space or has_comma_number else " ")
    cleaned = _STOP.sub("", cleaned)
    words = [_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def parse_truth(text: str) -> bool | None:
    """Read an answer by its first decisive word, ignoring case.

    Returns:
        True for ``yes``, ``true``, ``1``; False for ``no``, ``not``, ``false``, ``0`` (so ``not true`` is False);
        None if there is no such word.
    """
    for word in _WORD.findall(text.lower()):
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
    return None


def reference_truth(text: str) -> bool:
    """Read a reference, which must be decisive.

    Raises:
        DataError: It is not.
    """
    truth = parse_truth(text)
    if truth is None:
        allowed = ", ".join(sorted(_TRUE | _FALSE))
        raise DataError(f"the reference {text!r} is neither true nor false: use one of {allowed} in the annotations")
    return truth


def parse_pope(text: str) -> bool:
    """Read an answer by the official rule (https://github.com/AoiDragon/POPE, ``evaluate.py``).

    Take the text before the first period, remove commas and split at spaces: False if one of the words is ``No``,
    ``no`` or ``not``, else True. Surrounding whitespace is ignored.
    """
    words = text.strip().split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.intersection(words)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _binary_scores(rows: list[Row]) -> dict[str, float]:
    count = len(rows)
    hits = sum(said and true for _, said, true, _ in rows)
    said_yes = sum(said for _, said, _, _ in rows)
    true_yes = sum(true for _, _, true, _ in rows)
    return {
        "accuracy": sum(said == true for _, said, true, _ in rows) / count,
        "precision": hits / said_yes if said_yes else 0.0,
        "recall": hits / true_yes if true_yes else 0.0,
        "f1": 2 * hits / (said_yes + true_yes) if said_yes + true_yes else 0.0,
        "yes_ratio": said_yes / count,
        "unparsable": sum(unparsable for *_, unparsable in rows) / count,
    }


_COMMA_NUMBER = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")
_PUNCTUATION = tuple(r""";/[]"{}()=+\_-><@`,?!""")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
# The official table maps each of these, written with any one apostrophe missing, to the right form.
_WORDS_WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _WORDS_WITH_APOSTROPHES
    for place, letter in enumerate(word)
    if letter == "'"
}
# The one entry of the official table that goes the other way; kept so that scores stay comparable.
_CONTRACTIONS["somebody'd"] = "somebodyd"
_WORD = re.compile(r"[a-z]+|\d+")
_TRUE = frozenset({"yes", "true", "1"})
_FALSE = frozenset({"no", "not", "false", "0"})
