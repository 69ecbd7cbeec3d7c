"""Scores of lmms-eval beside a run's own: in ``metrics.json``, with harness, prompt and version in ``lmms.json``."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from visexpert.errors import ConfigError, DataError
from visexpert.io.run_files import read_json, read_object, write_json
from visexpert.io.run_folder import SIDECAR
from visexpert.run_arguments import config_of

LARGEST = sys.float_info.max

BESIDE = frozenset({"alias", "samples", " "})
"""Keys of a task's results that are not scores."""


@dataclass(frozen=True)
class Provenance:
    """Where the scores of a task come from.

    Args:
        harness: Its name.
        harness_version: ``branch@commit`` as it writes itself; where it was installed without git, what was given.
        task_version: Version of the task.
        prompt: The task's own words before and after a question (``lmms_eval_specific_kwargs``).
        chat_template: The template that the harness laid over it; null where it laid none.
        system_instruction: Likewise.
        generation: The task's ``generation_kwargs``.
        shots: Examples before a question.
        dataset: Path and name of the data on the Hugging Face Hub.
        samples: Questions that were answered, and of how many.
        model: What was asked: class, arguments.
        date: When, as the harness writes it.
        task_hash: Hash of the questions; null where samples were not logged.
        file: Name of the results file.
        sha256: Of the results file.
        imported: When it was read.
    """

    harness: str
    harness_version: str
    task_version: Any
    prompt: Any
    chat_template: str | None
    system_instruction: str | None
    generation: Any
    shots: Any
    dataset: Any
    samples: Mapping[str, Any]
    model: Mapping[str, Any]
    date: str | None
    task_hash: str | None
    file: str
    sha256: str
    imported: str

    @property
    def is_whole(self) -> bool:
        """Whether all questions were answered."""
        original, effective = self.samples.get("original"), self.samples.get("effective")
        return self.model.get("limit") is None and (original is None or original == effective)


@dataclass(frozen=True)
class LmmsTask:
    """A task of a results file.

    Args:
        name: As lmms-eval names it.
        scores: By metric; of a filter other than ``none`` ``METRIC@FILTER``; standard errors as ``METRIC_stderr``.
        provenance: Where they come from.
    """

    name: str
    scores: Mapping[str, float]
    provenance: Provenance


def read_lmms_results(path: Path, *, harness_version: str | None = None) -> dict[str, LmmsTask]:
    """Read ``DATE_results.json`` of lmms-eval.

    Args:
        path: The file.
        harness_version: Version of lmms-eval, where the file does not say (it was installed by pip).

    Raises:
        ConfigError: Neither the file nor ``harness_version`` says the version.
        DataError: It cannot be read, is no such file, or has no score that is a number.
    """
    content = read_json(path)
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict) or not isinstance(content.get("configs"), dict):
        raise DataError(
            f"{path} is not a results file of lmms-eval (it has no results and configs); give the "
            "DATE_results.json that lmms-eval wrote."
        )
    version = _version(content) or harness_version
    if not version:
        raise ConfigError(
            f"{path} does not say its version of lmms-eval, which was installed without git; give it as "
            "harness_version (`pip show lmms_eval` tells it)."
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    tasks = {}
    for name, entry in results.items():
        scores = _scores(entry) if isinstance(entry, dict) else {}
        if scores:
            tasks[name] = LmmsTask(name, scores, _provenance(content, name, version, path.name, digest))
    if not tasks:
        raise DataError(
            f"{path} has no score that is a number; let lmms-eval score the answers (`--predict_only` does not)."
        )
    return tasks


def import_lmms(
    path: Path,
    run: Path,
    *,
    tasks: Collection[str] = (),
    harness_version: str | None = None,
    limited: bool = False,
    replace: bool = False,
) -> dict[str, float]:
    """Store the scores of a results file in a run's folder.

    Args:
        path: Results file of lmms-eval.
        run: The run that was evaluated.
        tasks: Those to store; empty for all.
        harness_version: See :func:`read_lmms_results`.
        limited: Also store scores of a part of the questions (lmms-eval's ``--limit``).
        replace: Also store scores of tasks that the run has from another file.

    Returns:
        What was stored, by key of ``metrics.json``: ``lmms/TASK/METRIC``.

    Raises:
        ConfigError: ``run`` is not a run, a task is not in the file, was answered in part, or is there already.
        DataError: The file cannot be read, or the folder not written.
    """
    config_of(run)
    found = read_lmms_results(path, harness_version=harness_version)
    if absent := sorted(set(tasks) - found.keys()):
        raise ConfigError(f"{path} has no scores of {absent[0]!r}; it has {', '.join(found)}.")
    chosen = {name: task for name, task in found.items() if not tasks or name in tasks}
    metrics = read_object(run / "metrics.json") if (run / "metrics.json").is_file() else {}
    noted = read_object(run / SIDECAR) if (run / SIDECAR).is_file() else {}
    known = {name: entry for name, entry in noted.items() if any(key.startswith(f"lmms/{name}/") for key in metrics)}
    for name, task in chosen.items():
        _check(task, known.get(name), run, limited=limited, replace=replace)
    stored = {f"lmms/{name}/{key}": value for name, task in chosen.items() for key, value in task.scores.items()}
    kept = {key: value for key, value in metrics.items() if not key.startswith(tuple(f"lmms/{n}/" for n in chosen))}
    write_json(run / "metrics.json", dict(sorted({**kept, **stored}.items())))
    write_json(run / SIDECAR, {**known, **{name: asdict(task.provenance) for name, task in chosen.items()}})
    return stored


def _check(task: LmmsTask, known: Mapping[str, Any] | None, run: Path, *, limited: bool, replace: bool) -> None:
    samples = task.provenance.samples
    if not task.provenance.is_whole and not limited:
        raise ConfigError(
            f"{task.name} was answered for {samples.get('effective')} of {samples.get('original')} questions, so its "
            "scores are not comparable; evaluate without lmms-eval's `--limit`, or store them anyway with limited."
        )
    if known is not None and known.get("sha256") != task.provenance.sha256 and not replace:
        raise ConfigError(
            f"'{run}' has scores of {task.name} from {known.get('file')} ({known.get('harness_version')}); set "
            "replace to store these instead."
        )


def _scores(entry: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a task by name; what is handed in for a server to score (lists, files) is left out."""
    scores: dict[str, float] = {}
    for key, value in entry.items():
        if key in BESIDE or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not abs(value) <= LARGEST:  # infinite, NaN, or an integer that no float holds
            continue
        metric, _, kind = key.partition(",")
        scores[metric if kind in ("", "none") else f"{metric}@{kind}"] = float(value)
    return scores


def _version(content: Mapping[str, Any]) -> str | None:
    """``branch@commit``; lmms-eval writes ``unknown`` where it has no git."""
    written = str(content.get("lmms_eval_version") or "")
    commit = content.get("git_hash")
    return written if written and not written.endswith("@unknown") else str(commit) if commit else None


def _object(value: Any, name: str) -> Mapping[str, Any]:
    """A JSON object, empty where there is none.

    Raises:
        DataError: Something else lies there.
    """
    if not isinstance(value or {}, dict):
        raise DataError(f"The results file has {value!r:.80} under {name}, where an object belongs; is it lmms-eval's?")
    return value or {}


def _provenance(content: Mapping[str, Any], task: str, version: str, file: str, sha256: str) -> Provenance:
    def of_task(key: str) -> Any:
        return _object(content.get(key), key).get(task)

    settings = _object(of_task("configs"), f"configs of {task}")
    model = _object(content.get("config"), "config")
    return Provenance(
        harness="lmms-eval",
        harness_version=version,
        task_version=settings.get("metadata") or of_task("versions"),
        prompt=settings.get("lmms_eval_specific_kwargs"),
        chat_template=content.get("chat_template"),
        system_instruction=content.get("system_instruction"),
        generation=settings.get("generation_kwargs"),
        shots=of_task("n-shot"),
        dataset={key: settings.get(key) for key in ("dataset_path", "dataset_name", "test_split")},
        samples=_object(of_task("n-samples"), f"n-samples of {task}"),
        model={key: model.get(key) for key in ("model", "model_args", "model_backend", "batch_size", "limit")},
        date=content.get("date"),
        task_hash=of_task("task_hashes"),
        file=file,
        sha256=sha256,
        imported=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
