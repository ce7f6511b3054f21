# Everything runs in .venv, which is made on first use. Another Python: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# For pytest, as in: make test ARGS="-k replay -x"
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo study-smoke test faults check format docs release-check bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-base ## Train a small network by forward passes only
	$(BIN)/zo-lightning fit
	@echo "The curves: $(BIN)/tensorboard --logdir lightning_logs"

study-smoke: $(VENV)/.installed-base ## Run a small study and write its report, in lightning_logs/smoke/report
	$(BIN)/zo-lightning study -c study/smoke
	$(BIN)/zo-lightning report lightning_logs/smoke

test: $(VENV)/.installed-test ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

faults: $(VENV)/.installed-test ## Kill runs, damage their files, fill their disks, at length
	FAULTS=long OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/faults $(ARGS)

check: $(VENV)/.installed-dev ## Check style and types, change nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(VENV)/.installed-dev ## Format the code, and fix what can be fixed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed-docs ## Build the documentation, in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The documentation: build/docs/index.html"

release-check: $(VENV)/.installed-dev ## Build the packages, install each by itself, and train outside of the repository
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	for package in dist/*; do .ci/installed $$package || exit 1; done

bench: $(VENV)/.installed-bench ## Measure what a training step and observing it cost
	$(BIN)/python -m benchmarks.step_cost --threads 2 --json benchmarks/results/cpu.json
	$(BIN)/python benchmarks/observe_cost.py --root data

clean: ## Remove builds and caches; .venv and the runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find zo_lightning tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp for each set of extras, and for those that it contains: installs are repeated only when their lists change.
CONTAINED_base := base
CONTAINED_test := base test
CONTAINED_bench := base bench
CONTAINED_docs := base docs
CONTAINED_dev := base docs test dev
$(VENV)/.installed-%: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --no-input --editable '.$(if $(filter base,$*),,[$*])'
	@touch $(addprefix $(VENV)/.installed-,$(CONTAINED_$*))

# Debian's Python has no venv unless python3-venv is installed, and then leaves half an environment behind.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "zo_lightning needs Python 3.10 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV) && $(PYTHON) -m virtualenv $(VENV); } || { rm -rf $(VENV); \
		echo "'$(PYTHON)' cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install" \
			"python3-venv) or virtualenv, or choose another one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
