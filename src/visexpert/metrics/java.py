"""Metrics that need Java: the official PTB tokenizer, METEOR and SPICE. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from visexpert.errors import ConfigError, WeightsError
from visexpert.metrics.ptb import PUNCTUATION, one_line

References = dict[int, list[str]]
"""Tokenized texts by image, as pycocoevalcap expects them."""


def has_java() -> bool:
    """Return whether a ``java`` program is on the PATH."""
    return shutil.which("java") is not None


def require_java(purpose: str) -> str:
    """Return the path of ``java``.

    Raises:
        ConfigError: There is none.
    """
    java = shutil.which("java")
    if java is None:
        raise ConfigError(
            f"{purpose} needs Java, and no java program is on the PATH: install one (8 or later) or leave it out"
        )
    return java


def tokenize_with_java(texts: Sequence[str]) -> list[list[str]]:
    """Tokenize captions with the Stanford tokenizer that pycocoevalcap ships, with the options it uses.

    This differs from pycocoevalcap's own call in three ways: the encoding is UTF-8 in every locale; line breaks of all
    kinds count as spaces; and a separator line between captions keeps the lexer, which looks past the end of a line,
    from letting one caption change the tokens of the previous one ("vitamin b." before a caption that starts with
    "The").

    Args:
        texts: Captions.

    Returns:
        The tokens of each caption, in lower case, without punctuation.

    Raises:
        ConfigError: There is no Java, or the tokenizer failed.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    java = require_java("the official PTB tokenizer")
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captions.txt"
        lines = "".join(f"{_plain(one_line(text))}\n{_NEUTRAL}\n" for text in texts)
        file.write_text(lines, encoding="utf-8", newline="\n")
        command = [java, "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        done = subprocess.run([*command, "-preserveLines", "-lowerCase", str(file)], capture_output=True, check=False)
    rows = done.stdout.decode("utf-8").split("\n")
    if done.returncode or rows[1 : 2 * len(texts) : 2] != [_NEUTRAL] * len(texts):
        reason = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise ConfigError(f"the Java PTB tokenizer failed ({java}: {reason or 'no message'}): use tokenizer: python")
    # Tokens may contain no-break spaces, so split at plain spaces only.
    return [[token for token in line.split(" ") if token and token not in PUNCTUATION] for line in rows[:-1:2]]


def meteor_score(references: References, predictions: References) -> float:
    """Return METEOR 1.5 of tokenized texts, in [0, 1].

    Raises:
        ConfigError: There is no Java, or METEOR failed.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    require_java("METEOR")
    # "|||" separates fields in METEOR's protocol.
    clean = {image: [_plain(text.replace("|||", "")) for text in texts] for image, texts in references.items()}
    written = {image: [_plain(text) for text in texts] for image, texts in predictions.items()}
    scorer = Meteor()
    try:
        score, _ = scorer.compute_score(clean, written)
    except (OSError, ValueError) as error:
        raise ConfigError(f"METEOR failed ({error}): leave it out with meteor: false") from error
    return float(score)


def require_spice() -> None:
    """Check that SPICE has what it needs, because pycocoevalcap would download 500 MB if its models were missing.

    Raises:
        ConfigError: There is no Java.
        WeightsError: A model file is missing.
    """
    from pycocoevalcap.spice import get_stanford_models as stanford

    require_java("SPICE")
    folder = Path(stanford.__file__).parent / stanford.SPICELIB
    missing = [name for name in (f"{stanford.JAR}.jar", f"{stanford.JAR}-models.jar") if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"SPICE needs {' and '.join(missing)} in {folder}: take them from {stanford.CORENLP}.zip at "
            "https://nlp.stanford.edu/software, or leave SPICE out"
        )


def spice_score(references: References, predictions: References) -> float:
    """Return SPICE of tokenized texts, in [0, 1]; see :func:`require_spice`.

    Raises:
        ConfigError: SPICE failed.
    """
    from pycocoevalcap.spice.spice import Spice

    require_spice()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            score, _ = Spice().compute_score(references, predictions)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"SPICE failed ({error}); it is built for Java 8; use that or leave SPICE out") from error
    return float(score)


def _plain(text: str) -> str:
    """Return a text that can be sent to a program: a lone surrogate becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


_NEUTRAL = "x"  # a line that no lexer rule looks ahead for
