# Everything runs in .venv, made on first use from the machine's python3 and the versions in requirements/lock.txt.
# `make help` says what each target does.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHECKED := $(wildcard fastvideo_grpo/sampling fastvideo_grpo/grpo fastvideo_grpo/config)

DEMO_ARGUMENTS = $(if $(REWARD),--reward $(REWARD)) $(if $(ITERATIONS),--iterations $(ITERATIONS)) $(if $(SEED),--seed $(SEED))

.PHONY: help env demo demo-video test test-all bench gpu-kit lint lock clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train a tiny FLUX with GRPO on the CPU (REWARD=name ITERATIONS=n SEED=n)"
	@echo "make demo-video  a tiny HunyuanVideo on moving shapes, in under five minutes (the same variables)"
	@echo "make test      checks and tests; test-all adds the slow ones"
	@echo "make bench     every script in benchmarks/"
	@echo "make gpu-kit   a folder for a GPU machine without a network: checkout, wheels, script (GPU_PYTHON=3.12)"
	@echo "make lint      ruff, and mypy on sampling, grpo and config"
	@echo "make env       only make .venv (PYTHON=python3.12 picks the interpreter, 3.11 or newer)"
	@echo "make lock      compile requirements/lock.txt anew (LOCK_FLAGS=--upgrade for the newest versions)"
	@echo "make clean     remove .venv, build outputs and caches; runs/ stays"

env: $(READY)

demo: $(READY)
	@$(BIN)/fastvideo-grpo demo $(DEMO_ARGUMENTS)

demo-video: $(READY)
	@$(BIN)/fastvideo-grpo demo --video $(DEMO_ARGUMENTS)

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-all: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow or not slow"

bench: $(READY)
	@set -e; for script in $$(grep -l "^if __name__" benchmarks/*.py); do echo "== $$script"; $(BIN)/python $$script; done

gpu-kit: $(READY)
	$(BIN)/python benchmarks/gpu_kit/make.py --python $(or $(GPU_PYTHON),3.12)

lint: $(READY)
	$(BIN)/ruff check .
	$(if $(CHECKED),$(BIN)/mypy $(CHECKED))

# --no-deps: the lock names everything; FastVideo's own requirements would pull packages that requirements/overrides.txt removes.
# Bytecode: where Python may not write it (PYTHONDONTWRITEBYTECODE, a read-only image), each process that imports FastVideo would
# compile for ten seconds. Packages ship files, too, that are no Python of this version.
$(READY): $(BIN)/uv requirements/lock.txt requirements/base.in requirements/dev.in setup.py $(wildcard patches/*)
	@echo "Installing the locked versions (3 minutes the first time, about 7 GB)"
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -r requirements/lock.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --quiet -e .
	$(BIN)/python -m fastvideo_grpo.cli patch apply
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m compileall -q fastvideo_grpo
	@touch $@

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true). Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "error: '$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

# A package that only the impossible platform 'never' asks for (requirements/overrides.txt) is no part of the lock.
lock: $(BIN)/uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-header --no-annotate $(LOCK_FLAGS) \
	  --override requirements/overrides.txt requirements/base.in requirements/dev.in -o requirements/lock.txt
	sed -i.bak -e "/ ; sys_platform == 'never'$$/d" -e "s/ or sys_platform == 'never'//" requirements/lock.txt
	rm -f requirements/lock.txt.bak

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find fastvideo_grpo tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
