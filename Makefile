# Everything is set up on first use: `make demo` and `make test` work in a bare clone.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
STAMP := $(VENV)/.visexpert-installed
PY := $(BIN)/python

export HF_HUB_OFFLINE ?= 1

.PHONY: help
help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z][a-z0-9-]*:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=$(PYTHON) makes the environment, VENV=$(VENV) is where it lies, PYTEST_ARGS goes to pytest."

.PHONY: install
install: $(STAMP) ## Install the package and its tools into VENV (once; again when pyproject.toml changes)

$(STAMP): pyproject.toml
	@command -v "$(PYTHON)" > /dev/null || { echo "No '$(PYTHON)' on this machine: say which Python (3.10 or newer) with  make install PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 10) else "visexpert needs Python 3.10 or newer, and %s is %d.%d: name a newer one with  make install PYTHON=/path/to/python3" % (sys.executable, v[0], v[1]))'
	@$(PY) -m pip --version > /dev/null 2>&1 || "$(PYTHON)" -m venv "$(VENV)" || { echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu it comes with  apt-get install python3-venv" >&2; exit 1; }
	$(PY) -m pip install -e '.[dev]'
	@touch $@

.PHONY: install-lowest
install-lowest: ## Install the oldest dependencies that pyproject.toml allows, instead of the newest
	@$(PY) -m pip --version > /dev/null 2>&1 || "$(PYTHON)" -m venv "$(VENV)"
	$(PY) -m pip install uv
	$(PY) -m uv pip install --python $(PY) --resolution lowest-direct -e '.[dev]'
	@touch $(STAMP)

.PHONY: demo
demo: $(STAMP) ## Train CLIP-only and ToVE on rendered scenes, score both, write figures (minutes, CPU)
	$(BIN)/visexpert demo

.PHONY: figures
figures: $(STAMP) ## Draw the README's gate maps and captions again, from the demo's ToVE (minutes, CPU)
	$(BIN)/visexpert fit $(TABLETOP) --config configs/tove/demo.yaml --overwrite
	$(PY) -m benchmarks.docs_figures runs/demo/tove

.PHONY: test
test: $(STAMP) ## Run the tests that need no GPU, no network and no patience
	$(PY) -m pytest $(PYTEST_ARGS)

.PHONY: test-long
test-long: $(STAMP) ## Run the tests marked long: what the quick ones prove, at a larger scale (minutes)
	$(PY) -m pytest $(PYTEST_ARGS) -m "long and not gpu and not network and not browser"

.PHONY: coverage
coverage: $(STAMP) ## Run the same tests and print what lines they miss (no gate; slower before Python 3.12)
	$(PY) -m pytest $(PYTEST_ARGS) --cov --cov-report=term

.PHONY: check
check: $(STAMP) ## Lint, format, types, import law
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict src tests
	$(PY) -m pytest tests/test_imports.py

.PHONY: wheel
wheel: $(STAMP) ## Build wheel and sdist into dist/ and check what they say of themselves
	rm -rf dist
	$(PY) -m build --no-isolation # hatchling is among the tools; two environments for it alone take longer than the rest
	$(PY) -m twine check --strict dist/*

.PHONY: check-wheel
check-wheel: wheel ## Install the wheel outside the clone, and run demo, fit, export and test there
	.ci/check-wheel $(PY)

.PHONY: docs
docs: $(STAMP) ## Build the documentation into site/ (a broken link or an undocumented public name fails)
	@$(PY) -c 'import latex2mathml, material, mkdocstrings' 2> /dev/null || $(PY) -m pip install -e '.[docs]'
	$(PY) -m mkdocs build --strict

.PHONY: check-tag
check-tag: ## Check that TAG=vX.Y.Z is the version of the package, of CITATION.cff and of the newest part of CHANGELOG.md
	@version="$$(sed -n 's/^__version__ = "\(.*\)"$$/\1/p' src/visexpert/version.py)"; \
	[ "$(TAG)" = "v$$version" ] || { echo "The tag is '$(TAG)', the package $$version" >&2; exit 1; }; \
	grep -qx "version: $$version" CITATION.cff || { echo "CITATION.cff has another version than $$version" >&2; exit 1; }; \
	[ "$$(sed -n 's/^## \([^ ]*\).*/\1/p' CHANGELOG.md | head -1)" = "$$version" ] \
	    || { echo "CHANGELOG.md does not begin with a part '## $$version'" >&2; exit 1; }

.PHONY: check-quickstart
check-quickstart: $(STAMP) ## Follow the quickstart with images of one's own, from training to export, and print the times
	$(PY) -m tests.docs.follow "$(BIN)"

.PHONY: check-pages
check-pages: $(STAMP) ## Run every block of README and docs at smoke scale, to its end (minutes)
	$(PY) -m pytest tests/docs/check_pages.py -n auto --maxprocesses 2 --dist worksteal --durations=20

.PHONY: format
format: $(STAMP) ## Format the code and mend what the linter can mend
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# The zoo: configs/zoo/NAME.yaml trains what is shipped in src/visexpert/tabletop/zoo/weights; the language model needs the others.
WEIGHTS := src/visexpert/tabletop/zoo/weights
EXPERTS := $(patsubst %,$(WEIGHTS)/%.safetensors,depth edges normals segmentation selfsup semantic semantic64)
TABLETOP := --config configs/tove/tabletop.yaml

.PHONY: zoo
zoo: $(WEIGHTS)/clip/model.safetensors $(EXPERTS) $(WEIGHTS)/language.safetensors ## Train the shipped models again whose configs changed (about an hour of one core in all)
	$(PY) -m visexpert.tabletop.zoo.probe_table --write

$(WEIGHTS)/clip/model.safetensors: configs/zoo/clip.yaml | $(STAMP)
	$(BIN)/visexpert fit --config $< --overwrite

$(EXPERTS): $(WEIGHTS)/%.safetensors: configs/zoo/%.yaml | $(STAMP)
	$(BIN)/visexpert fit --config $< --overwrite

$(WEIGHTS)/language.safetensors: configs/zoo/language.yaml configs/zoo/language-2.yaml | $(WEIGHTS)/clip/model.safetensors $(EXPERTS) $(STAMP)
	$(BIN)/visexpert fit $(TABLETOP) --config configs/zoo/language.yaml --overwrite
	$(BIN)/visexpert fit $(TABLETOP) --config configs/zoo/language.yaml --config configs/zoo/language-2.yaml --overwrite

include make/results.mk
include make/ablations.mk
