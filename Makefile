# `make` alone lists the targets. Everything is kept inside this folder, in .venv, build and the tools' own caches;
# what flowfn itself stores lies in its home and cache ($FLOW_HOME, $FLOW_CACHE; see docs/getting-started.md).

.DEFAULT_GOAL := help
.PHONY: help quickstart test docs-test contract-table lint format typecheck bench build clean distclean
.DELETE_ON_ERROR:

VENV ?= .venv
# Another interpreter: make PYTHON=/usr/bin/python3.12 test
PYTHON ?=
# Further arguments of pytest or of a benchmark: make test ARGS='-k map -x'
ARGS ?=
# How many processes run the tests: a number, auto (one a core), or 0 for this one alone.
JOBS ?= auto

BIN := $(VENV)/bin
PY := $(BIN)/python

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(VENV)/.have-examples ## Install into .venv and run the main example
	@$(PY) examples/quickstart.py $(ARGS)

test: $(VENV)/.have-test ## Install the test extra and run every test that this machine can run
	@$(PY) -m pytest -n $(JOBS) $(ARGS)

docs-test: $(VENV)/.have-test ## Run the code blocks of README and docs, and the docstrings' examples
	@$(PY) -m pytest tests/docs $(ARGS)

contract-table: $(VENV)/.have-test ## Run the contract on every engine, and write docs/backends.md's table of its cases
	@$(PY) scripts/contract_table.py $(ARGS)

lint: $(VENV)/.have-test ## Check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.have-test ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

typecheck: $(VENV)/.have-test ## Check the types, strictly
	@$(BIN)/mypy
	@$(BIN)/mypy examples/*.py benchmarks/*.py

bench: $(VENV)/.have-bench ## Measure calls beside other libraries (about three minutes)
	@$(PY) benchmarks/calls.py $(ARGS)

build: $(VENV)/.have-test ## Build the wheel and the source archive into dist/
	@$(PY) -m build --installer pip .

clean: ## Remove what was built and cached here; keep .venv
	@rm -rf build dist htmlcov .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	@rm -rf '$(VENV)'

# The stamp of an extra is as new as the last installation, so a repeated `make test` installs nothing.
$(VENV)/.have-%: pyproject.toml $(PY)
	@echo "Installing flowfn[$*] into $(VENV)"
	@scripts/install '$(PY)' '.[$*]'
	@touch $@

$(PY):
	@scripts/make-venv '$(VENV)' '$(PYTHON)'
