# Every target sets itself up first: a fresh clone needs python3 (3.11 or newer) and make.
PYTHON ?= python3
OUT ?= runs/demo

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GGUF_STAMP := $(VENV)/.installed-gguf
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := demo
.PHONY: demo test test-vllm test-gguf docs lint format release-check clean

demo: $(STAMP)  ## The whole method on the embedded pair: CPU, offline, minutes
	$(BIN)/s2t demo --out $(OUT)

test: $(STAMP)  ## The default test run: CPU, offline
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-vllm: $(STAMP) $(VLLM_STAMP)  ## Against real vLLM servers, which run from an environment of their own
	OMP_NUM_THREADS=1 S2T_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -q -m vllm

test-gguf: $(STAMP) $(GGUF_STAMP)  ## GGUF files on llama.cpp, which is compiled first (cmake and a C++ compiler; 10 to 20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/gguf

docs: $(STAMP)  ## The site, into site/; a dead link or a page outside the navigation fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(STAMP)  ## The checks that CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

release-check: $(STAMP)  ## Wheel and sdist: built, checked, and the wheel installed with every extra into an empty environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_release.py -m "slow or not slow"

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist site src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that every later package resolves against that very build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "s2t needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	@echo "Setting up $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt $(TORCH)
	@$(PIP) -c constraints.txt -e ".[train,tensorboard,eval,plots,lm-eval,ray,remote,serve,dev]"
	@touch $@

$(GGUF_STAMP): $(STAMP)
	@echo "Compiling llama.cpp (once; 10 to 20 minutes on two cores)"
	@$(PIP) -c constraints.txt -e ".[gguf]"
	@touch $@

# vLLM pins versions that the package need not share, so its server has an environment of its own; see constraints-vllm.txt.
$(VLLM_STAMP): constraints-vllm.txt
	@echo "Setting up $(VLLM_VENV) (once; a few minutes)"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	@touch $@
