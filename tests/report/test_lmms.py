"""Scores of lmms-eval in a run's folder, from a results file that lmms-eval 0.7.3 has written.

The file is that of four questions to the model ``visexpert``; paths in it were shortened.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from visexpert.commands.score import run as score
from visexpert.errors import ConfigError, DataError
from visexpert.report.lmms import import_lmms, read_lmms_results

REAL = Path(__file__).parent / "data" / "20261123_222825_results.json"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "metrics.json").write_text('{"test/vqa/accuracy": 0.5}')
    return tmp_path


def changed(tmp_path: Path, **changes: Any) -> Path:
    """The real file with some of its entries replaced."""
    content = {**json.loads(REAL.read_text(encoding="utf-8")), **changes}
    path = tmp_path / "changed_results.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_scores_stand_beside_the_runs_own_and_what_is_no_number_is_left_out(run: Path) -> None:
    stored = import_lmms(REAL, run, harness_version="0.7.3")
    names = ("exact_match", "exact_match_stderr", "exact_match_stderr_clt")  # the clustered one is "N/A"
    assert stored == {f"lmms/tiny_gqa/{name}": 0.0 for name in names}
    assert read(run / "metrics.json") == {**stored, "test/vqa/accuracy": 0.5}


def test_harness_version_prompt_and_settings_are_stored(run: Path) -> None:
    import_lmms(REAL, run, harness_version="0.7.3")
    entry = read(run / "lmms.json")["tiny_gqa"]
    assert (entry["harness"], entry["harness_version"], entry["shots"]) == ("lmms-eval", "0.7.3", 0)
    assert entry["prompt"]["post_prompt"] == "\nAnswer the question using a single word or phrase."
    assert entry["generation"]["max_new_tokens"] == 16
    assert entry["samples"] == {"original": 4, "effective": 4}
    assert entry["model"]["model"] == "visexpert" and entry["file"] == REAL.name
    assert len(entry["task_hash"]) == len(entry["sha256"]) == 64


def test_the_version_is_the_files_own_where_it_has_one_and_is_needed_where_not(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="harness_version"):
        read_lmms_results(REAL)
    of_git = read_lmms_results(changed(tmp_path, lmms_eval_version="main@75571cfe", git_hash="75571cfe"))
    assert of_git["tiny_gqa"].provenance.harness_version == "main@75571cfe"
    older = read_lmms_results(changed(tmp_path, lmms_eval_version=None, git_hash="v0.5-3-gabc"))
    assert older["tiny_gqa"].provenance.harness_version == "v0.5-3-gabc"


def test_filters_lists_and_several_tasks(run: Path, tmp_path: Path) -> None:
    results = {
        "mme": {"alias": "mme", "mme_perception_score,none": 1500.5, "mme_cognition_score,none": 300, "samples": 2374},
        "gqa": {
            "alias": "gqa",
            "exact_match,flexible": 0.6,
            "exact_match_stderr,flexible": 0.01,
            "submission,none": [],
        },
    }
    path = changed(tmp_path, results=results, configs={}, **{"n-samples": {}})
    stored = import_lmms(path, run, tasks=["mme"], harness_version="x")
    assert stored == {"lmms/mme/mme_perception_score": 1500.5, "lmms/mme/mme_cognition_score": 300.0}
    stored = import_lmms(path, run, harness_version="x")
    assert stored["lmms/gqa/exact_match@flexible"] == 0.6 and "lmms/gqa/submission" not in stored
    assert set(read(run / "lmms.json")) == {"mme", "gqa"}


def test_a_part_of_the_questions_is_stored_only_when_asked_to(run: Path, tmp_path: Path) -> None:
    config = {**read(REAL)["config"], "limit": 8.0}
    part = changed(tmp_path, config=config, **{"n-samples": {"tiny_gqa": {"original": 12578, "effective": 8}}})
    with pytest.raises(ConfigError, match="8 of 12578 questions"):
        import_lmms(part, run, harness_version="x")
    assert import_lmms(part, run, harness_version="x", limited=True)
    assert read(run / "lmms.json")["tiny_gqa"]["model"]["limit"] == 8.0


def test_scores_of_another_file_are_replaced_only_when_asked_to(run: Path, tmp_path: Path) -> None:
    import_lmms(REAL, run, harness_version="0.7.3")
    import_lmms(REAL, run, harness_version="0.7.3")  # the same file again is no other
    results = {"tiny_gqa": {"alias": "tiny_gqa", "exact_match,none": 0.25}}
    other = changed(tmp_path, results=results)
    with pytest.raises(ConfigError, match="replace"):
        import_lmms(other, run, harness_version="0.7.4")
    import_lmms(other, run, harness_version="0.7.4", replace=True)
    assert read(run / "metrics.json") == {"lmms/tiny_gqa/exact_match": 0.25, "test/vqa/accuracy": 0.5}
    (run / "metrics.json").unlink()  # a fit that starts anew sets it aside
    assert import_lmms(REAL, run, harness_version="0.7.3")


@pytest.mark.parametrize(
    "content", ["[]", '{"results": {}}', "{", '{"results": {"a": {"x,none": "N/A"}}, "configs": {}}']
)
def test_other_files_are_refused(run: Path, content: str) -> None:
    path = run / "other.json"
    path.write_text(content)
    with pytest.raises(DataError, match="other.json"):
        import_lmms(path, run, harness_version="x")


def test_the_command_stores_and_prints(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    copy = shutil.copy(REAL, tmp_path / "a_results.json")
    score(["import", str(run), str(copy), "--harness_version", "0.7.3"])
    assert "lmms/tiny_gqa/exact_match: 0" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is not a run"):
        score(["import", str(run / "nowhere"), str(copy)])
    with pytest.raises(ConfigError, match="no scores of 'mme'"):
        score(["import", str(run), str(copy), "--harness_version", "1", "--task", "mme"])


DEEP = "[" * 100_000


@pytest.mark.parametrize("key", ["results", "configs", "config", "n-samples", "n-shot", "versions"])
@pytest.mark.parametrize("odd", [3, "text", [1], {"tiny_gqa": 3}, {"tiny_gqa": {"exact_match,none": 10**400}}])
def test_odd_entries_are_refused_in_one_sentence_or_left_out(run: Path, tmp_path: Path, key: str, odd: Any) -> None:
    path = changed(tmp_path, **{key: odd})
    try:
        assert import_lmms(path, run, harness_version="0.7.3", limited=True)
    except (ConfigError, DataError) as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["metrics.json", "lmms.json"])
@pytest.mark.parametrize("content", ["[]", "3", "null", DEEP])
def test_a_runs_own_files_of_another_form_are_refused_and_kept(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"{name}.*(object|JSON)"):
        import_lmms(REAL, run, harness_version="0.7.3")
    assert (run / name).read_text(encoding="utf-8") == content
