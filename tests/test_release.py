"""What a release is made with: workflows, templates, the citation, the check of a tag."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from visexpert import __version__

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):.*?## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def commands(workflow: Any) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("name", ["ci", "release"])
def test_a_workflow_runs_targets_of_the_makefile(name: str) -> None:
    workflow = loaded(GITHUB / "workflows" / f"{name}.yml")
    found = [re.fullmatch(r"make ([a-z-]+)(?: [A-Z]+=\S+)?", command) for command in commands(workflow)]
    assert found and all(found), commands(workflow)
    assert {match[1] for match in found if match} <= TARGETS
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60 and job["runs-on"] == "ubuntu-latest"
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@[\w/.]+", step["uses"]) for step in job["steps"] if "uses" in step)


def test_ci_covers_the_python_versions_of_the_package_and_both_ends_of_its_dependencies() -> None:
    matrix = loaded(GITHUB / "workflows" / "ci.yml")["jobs"]["tests"]["strategy"]["matrix"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)", project)
    assert all(isinstance(version, str) for version in matrix["python"])  # 3.10 is no number
    (lowest,) = matrix["include"]
    assert lowest == {"python": matrix["python"][0], "dependencies": "lowest"}
    assert f'requires-python = ">={lowest["python"]}"' in project


def test_only_a_tag_publishes_and_only_what_was_checked() -> None:
    release = loaded(GITHUB / "workflows" / "release.yml")
    assert release[True] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+"]}}  # YAML 1.1 reads the key `on` as true
    build, publish = release["jobs"]["build"], release["jobs"]["publish"]
    assert "make check-wheel" in commands(release) and "permissions" not in build
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in str(release)
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")


def test_a_tag_must_be_the_version() -> None:
    def check(tag: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", "check-tag", f"TAG={tag}"], cwd=ROOT, capture_output=True, text=True)

    wrong = check("v9.9.9")
    assert wrong.returncode != 0 and "v9.9.9" in wrong.stderr and __version__ in wrong.stderr
    right = check(f"v{__version__}")
    newest = next(line.split()[1] for line in (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines() if "## " in line)
    assert (right.returncode == 0) is (newest == __version__), right.stderr
    assert right.returncode == 0 or "CHANGELOG.md" in right.stderr


def test_the_citation_names_both_papers() -> None:
    citation = loaded(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["version"] == __version__
    assert citation["license"] == "Apache-2.0" and citation["authors"] and citation["message"]
    papers = {each["identifiers"][0]["value"]: each for each in citation["references"]}
    assert set(papers) == {"arXiv:2504.00691", "arXiv:2501.01709"}
    for paper in papers.values():
        assert set(paper) <= {"type", "title", "authors", "year", "identifiers", "url", "repository-code", "notes"}
        assert all(set(author) == {"family-names", "given-names"} for author in paper["authors"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(value.partition(":")[2] in readme for value in papers)


def test_templates_of_issues_ask_for_what_is_needed() -> None:
    forms = [loaded(path) for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
    assert len(forms) == 2
    for form in forms:
        assert {"name", "description", "body"} <= set(form)
        names = [field["id"] for field in form["body"]]
        assert len(set(names)) == len(names) and all(field["attributes"]["label"] for field in form["body"])
    page = (GITHUB / "pull_request_template.md").read_text(encoding="utf-8")
    assert set(re.findall(r"make ([a-z-]+)", page)) <= TARGETS
