# `make demo` and `make test` do all the set-up that they need, in .venv, on a machine with only Python.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# Only pip uses the network.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench docs release clean

help:  ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/python.stamp:
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, found " + sys.version)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch on its own and first: with its version given, pip takes the CPU wheel that lies at hand, if any.
$(VENV)/torch.stamp: constraints.txt | $(VENV)/python.stamp
	@echo "Installing torch (the largest download)"
	@$(PIP) torch
	@touch $@

$(VENV)/%.stamp: pyproject.toml constraints.txt $(VENV)/torch.stamp
	@echo "Installing spectune[$*]"
	@$(PIP) --editable '.[$*]'
	@touch $@

demo: $(VENV)/demo.stamp  ## Fine-tune a small real model, look at the report (about two minutes)
	@$(BIN)/spectune demo --output spectune-demo --overwrite

test: $(VENV)/test.stamp  ## Format, lint, types, then all tests
	@$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 PYTHONUTF8=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/test.stamp  ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/test.stamp  ## Format and sort imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/test.stamp  ## Rerun the small speed suite and compare its ratios with the committed ones
	@$(BIN)/python benchmarks/guard.py

docs: $(VENV)/test.stamp  ## Write the reference from the code and build the pages into site/
	@$(BIN)/python docs/make_reference.py
	@$(BIN)/python docs/make_public.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

$(VENV)-release/release.stamp: release/requirements.txt
	@$(PYTHON) -m venv $(VENV)-release
	@$(VENV)-release/bin/python -m pip install -qq --disable-pip-version-check --requirement $<
	@touch $@

release: $(VENV)-release/release.stamp  ## Build wheel and sdist twice, check them, try each extra alone (EXTRAS=train,llm or none)
	@$(VENV)-release/bin/python release/make_release.py $(if $(EXTRAS),--extras $(EXTRAS))

clean:  ## Remove the environment and the caches
	rm -rf $(VENV) $(VENV)-release .pytest_cache .mypy_cache .ruff_cache .hypothesis
