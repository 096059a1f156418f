# make demo | make test | make test-all | make check | make test-long | make chaos | make gpu (on a machine with one)
# Needs Linux, Python >= 3.11 and make; everything else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-process test-long check chaos gpu install
.DEFAULT_GOAL := demo

install: .venv/installed

# uv is many times faster than pip; where it cannot be had, pip does the same
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 || echo "uv cannot be had: using pip"
	if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -r requirements.txt; \
	else $(BIN)/python -m pip install --quiet -r requirements.txt; fi
	touch $@

demo: install
	$(BIN)/python tools/demo.py

# the tiers, and when to run which: docs/testing.md
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test: install
	$(PYTEST) -n 2

test-all: install
	$(PYTEST) -n 2 -m "not long" --hypothesis-profile=all

test-process: install
	$(PYTEST) -n 2 -m "process and not long"

test-long: install
	$(PYTEST) -m long -s

# random faults for so many minutes, on 1 and 2 processes; the same seed repeats them
MINUTES ?= 10
SEED ?= 0
chaos: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos minutes=$(MINUTES) seed=$(SEED)

gpu: install
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python tools/benchmark.py step preset=gpu round_steps=30
	$(BIN)/torchrun --standalone --nproc_per_node gpu tools/benchmark.py engines recipe=mpp_vit_b16 \
		batch=512 micro_batch=64 rounds=2 round_steps=50

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
