# The environment is .venv (aot has one of its own): made on first use by tools/make_venv.sh, with PYTHON=/path/to/python
# where it is given. ARGS goes to the command of aot, demo and test, for example: make test ARGS="-k ops -x"

.DEFAULT_GOAL := help
.PHONY: help aot demo test lint format venv clean

export PYTHON
BIN := .venv/bin

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: venv ## train two small models and show what they do (ARGS="--steps 300")
	@$(BIN)/python examples/demo.py $(ARGS)

test: venv ## run the tests (ARGS="-k ops" for some of them)
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: venv ## check format, lint rules and types
	@$(BIN)/python -m ruff format --check --quiet . || { echo "Run 'make format'; it would change:"; \
		$(BIN)/python -m ruff format --check .; exit 1; }
	@$(BIN)/python -m ruff check --quiet .
	@$(BIN)/python -m mypy

format: venv ## format the code and apply the safe fixes
	@$(BIN)/python -m ruff check --fix-only --quiet .
	@$(BIN)/python -m ruff format .

aot: ## compile the GPU kernels for an H200 without a GPU (makes .venv-aot, 4.6 GB; ARGS="--gpu h100")
	@tools/make_venv.sh .venv-aot gpu
	@.venv-aot/bin/python -m pallas_kernels.aot $(ARGS)

venv: ## make .venv, or bring it up to date (the targets above do so themselves)
	@tools/make_venv.sh

clean: ## remove caches and build products (the environments and runs/ stay)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name ".venv*" -prune -o -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
