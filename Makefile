# One target per thing a person does. `make` alone lists them.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(if $(shell command -v $(p)),$(p))))
VENV := .venv
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo serve test check compile golden clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## set up .venv with pinned dependencies and the hrnn command

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python found; install Python 3.11 (apt install python3.11 python3.11-venv)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { echo "error: $(PYTHON) is not Python 3.11 or 3.12; set PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: this Python cannot make virtual environments; apt install python3-venv"; exit 1; }
	@echo "Setting up $(VENV) (about two minutes the first time)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "  installing $$(grep -c == requirements.lock) pinned packages"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@echo "  installing hrnn"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(DEV): $(STAMP) requirements-dev.lock
	@echo "  installing $$(grep -c == requirements-dev.lock) pinned packages for the tests"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	@touch $@

demo: $(STAMP) ## the whole main job on MovieLens-100K, from log to recommendations over HTTP
	@$(VENV)/bin/hrnn demo

serve: $(STAMP) ## serve the deployed model on port 8080 until Ctrl-C
	@$(VENV)/bin/hrnn serve

test: $(DEV) ## run the tests, by file in two processes
	$(VENV)/bin/python -m pytest --numprocesses=$(TEST_PROCESSES) --dist=loadfile --no-loadscope-reorder

check: $(DEV) ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

compile: $(STAMP) ## compile the pipelines to build/*.yaml
	$(VENV)/bin/hrnn compile -o build

golden: $(STAMP) ## write the golden files anew, to be reviewed with git diff
	HRNN_CODE_DIGEST=golden $(VENV)/bin/hrnn compile -o tests/golden
	$(VENV)/bin/python -c 'from pipelines.settings_text import to_page; print(to_page(), end="")' > docs/settings.md

clean: ## remove everything that was generated
	rm -rf $(VENV) workspace build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
