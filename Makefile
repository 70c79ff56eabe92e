# The environment is .venv, made on first use by tools/make_venv.sh, with PYTHON=/path/to/python if that is given.
# The targets aot, test-oldest, test-triton and aot-triton have separate environments. ARGS goes to the command of a
# target, for example: make test ARGS="-k ops -x"

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-oldest test-triton lint format docs aot aot-triton venv clean

export PYTHON
BIN := .venv/bin
PYTEST := -m pytest -n logical --dist worksteal
TRITON_VENV := tools/make_venv.sh .venv-triton triton,train,test-tools newest "jax-cuda13-plugin jax-cuda13-pjrt"

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: venv ## train two small models and show what they do (ARGS="--steps 300")
	@$(BIN)/python examples/demo.py $(ARGS)

test: venv ## run the tests on all cores (ARGS="-k ops" for some of them, ARGS="-n 2" for two cores)
	@$(BIN)/python $(PYTEST) $(ARGS)

test-fast: venv ## run the tests that are not marked slow
	@$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-oldest: ## run the tests on the oldest versions supported, of JAX and all others (makes .venv-oldest)
	@tools/make_venv.sh .venv-oldest test oldest
	@.venv-oldest/bin/python $(PYTEST) $(ARGS)

# The interpreter has to be chosen before Triton is imported, so there are two runs. Status 5: no test is selected.
test-triton: ## run the tests of the Triton kernels, without a GPU (makes .venv-triton, 2.3 GB)
	@$(TRITON_VENV)
	@TRITON_INTERPRET=1 .venv-triton/bin/python $(PYTEST) tests/triton_kernels -m "not compiles" $(ARGS) || [ $$? = 5 ]
	@TRITON_INTERPRET=0 .venv-triton/bin/python $(PYTEST) tests/triton_kernels -m compiles $(ARGS) || [ $$? = 5 ]

lint: venv ## check format, lint rules and types
	@$(BIN)/python -m ruff format --check --quiet . || { echo "Run 'make format'; it would change:"; \
		$(BIN)/python -m ruff format --check .; exit 1; }
	@$(BIN)/python -m ruff check --quiet .
	@$(BIN)/python -m mypy

format: venv ## format the code and apply the safe fixes
	@$(BIN)/python -m ruff check --fix-only --quiet .
	@$(BIN)/python -m ruff format .

docs: venv ## build the documentation as a site in site/ (ARGS="--site-dir DIR" for another folder)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)

aot: ## compile the GPU kernels for an H200 without a GPU (makes .venv-aot, 4.6 GB; ARGS="--gpu h100")
	@tools/make_venv.sh .venv-aot gpu
	@.venv-aot/bin/python -m pallas_kernels.aot $(ARGS)

aot-triton: ## compile the Triton kernels for an A100 without a GPU (makes .venv-triton, 2.3 GB; ARGS="--gpu rtx4090")
	@$(TRITON_VENV)
	@.venv-triton/bin/python -m triton_kernels.aot $(ARGS)

venv: ## make .venv, or bring it up to date (the targets above do so themselves)
	@tools/make_venv.sh

clean: ## remove caches and build products (the environments and runs/ stay)
	@rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name ".venv*" -prune -o -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
