# make install   the environment, in .venv, from pinned versions
# make demo      compress a digit classifier without data (about a minute after the install)
# make test      the whole test-suite
# make faults    kills, damage, hostile files, mutated recipes: the long version, under an hour on two cores
# make soak      20 minutes of synthesis and distillation under a memory limit (SOAK_SECONDS=...)
# make lint      ruff and mypy

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo

SOAK_SECONDS ?= 1200

.PHONY: install demo test faults soak lint clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/zskd-nni demo --out $(OUT)

test: install
	$(BIN)/python -m pytest

faults: install
	ZSKD_NNI_FAULTS=long OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -v -rA --durations=20

soak: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py $(SOAK_SECONDS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out build dist
