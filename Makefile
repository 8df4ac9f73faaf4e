# What people and CI run. Needs Python >= 3.11 and make: the first call sets up .venv, later ones find it ready.
# TORCH=2.9.1 (or TORCH=newest) does the same on another torch, in an environment of its own (.venv-2.9.1).
# ARGS=... is handed on: make test ARGS="-k resume", make bench ARGS=--json.

.DEFAULT_GOAL := help
.NOTPARALLEL:
SHELL := /bin/sh

TORCH ?=
VENV := .venv$(addprefix -,$(TORCH))
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
READY := $(VENV)/.ready

# The first interpreter that is new enough and can make environments; make PYTHON=/path/to/python3 names another.
NAMES := python3 python3.13 python3.12 python3.11
PROBE := import ensurepip, sys, venv; sys.version_info >= (3, 11) and print(sys.executable)
PYTHON ?= $(firstword $(foreach name,$(NAMES),$(shell $(name) -c '$(PROBE)' 2>/dev/null)))

# The torch to install: the one given, the newest, or the tested one.
PINNED_TORCH = $(shell grep '^torch==' constraints.txt)
TORCH_SPEC = $(if $(TORCH),$(if $(filter newest,$(TORCH)),--upgrade torch,torch==$(TORCH)),$(PINNED_TORCH))

.PHONY: help setup demo test test-full check format docs bench bench-text bench-federation bench-rounds bench-large bench-cluster bench-scaling bench-shrink clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{printf "%-23s %s\n", $$1, $$2}'

setup: $(READY) ## set up .venv (the other commands do it when they need it)

# Torch goes in first, so that nothing pulls another one; the rest follows the constraints without their torch line.
$(READY): pyproject.toml constraints.txt
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
		python="$(PYTHON)"; \
		if [ -z "$$python" ]; then \
			echo "make: no Python >= 3.11 with its venv module found as $(NAMES); install one, or name it: make PYTHON=/path/to/python3" >&2; \
			exit 2; \
		fi; \
		echo "Setting up $(VENV) with $$python (once; a minute or two)"; \
		"$$python" -m venv --clear $(VENV); \
	}
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(PIP) install -c $(VENV)/constraints.txt $(TORCH_SPEC)
	@$(PIP) install -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## train, resume, federate and report on real handwritten digits
	@$(VENV)/bin/anyfit demo $(ARGS)

test: $(READY) ## all tests that are not slow, files two at a time
	@$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

test-full: $(READY) ## all tests; then the quick ones on the oldest torch that is accepted, and on the newest
	@$(PY) -m pytest -m "" $(ARGS)
	@$(MAKE) test TORCH=2.9.1
	@rm -f .venv-newest/.ready
	@$(MAKE) test TORCH=newest

check: $(READY) ## format, lint and types
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

format: $(READY) ## put the format right, and the lint that can mend itself
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

docs: $(READY) ## the pages, into docs/_build/html; a warning is an error
	@$(PY) -m sphinx -q -E -W --keep-going -b html docs docs/_build/html

bench: $(READY) ## the engine against raw loops and other trainers (ARGS=--json for figures)
	@$(PY) benchmarks/engine.py $(ARGS)

bench-text: $(READY) ## text models against raw loops and other trainers
	@$(PY) benchmarks/text.py $(ARGS)

bench-federation: $(READY) ## rounds of a federation against loops by hand and Flower
	@$(PY) benchmarks/federation.py $(ARGS)

bench-rounds: $(READY) ## rounds to 0.97 on MNIST over sites of two digits each
	@$(PY) benchmarks/mnist_rounds.py $(ARGS)

bench-large: $(READY) ## memory on a CSV of 5 GB
	@$(PY) benchmarks/large.py $(ARGS)

bench-cluster: $(READY) ## unequal ranks against equal shares and DDP; drift, deaths
	@$(PY) benchmarks/cluster.py $(ARGS)

bench-scaling: $(READY) ## up to 1,024 unequal GPUs, simulated from what is measured here
	@$(PY) benchmarks/scaling.py $(ARGS)

bench-shrink: $(READY) ## a tiny network in C on MNIST, pruning and int8 against dense, floats and torch-pruning
	@$(PY) benchmarks/shrink.py $(ARGS)

clean: ## remove what builds and tests leave; environments and runs stay
	@rm -rf build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
