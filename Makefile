# make install     the environment, in .venv, from pinned versions
# make demo        compress a digit classifier without data (about a minute after the install)
# make test        the whole test-suite
# make test-device  tests/device on a made-up device; DEVICE=cuda on a card
# make test-versions  the tests on every Python and the oldest PyTorch that pyproject.toml names (SESSION=tests-3.12)
# make faults      kills, damage, hostile files, mutated recipes: the long version, under an hour on two cores
# make soak        20 minutes of synthesis and distillation under a memory limit (SOAK_SECONDS=...)
# make bench      the ratios of docs/benchmarks.md, some ten minutes (DEVICE=cuda)
# make rivals     the rows of docs/rivals.md that are not measured yet, seed 0; LONG=1: seeds 0 to 2
# make lint        ruff and mypy
# make notebooks   execute all: SCALE=smoke into out/, cpu or full into docs/tutorials (seconds, minutes, hours at most)
# make docs        the site, into site/; make docs-serve shows it while it is written
# make package     wheel and sdist into dist/, installed and tried in a clean environment
# make install-all the environment with what notebooks and the site need

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo
SCALE ?= smoke
ADDRESS ?= 127.0.0.1:8000
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs

SOAK_SECONDS ?= 1200
DEVICE ?= cpu
JOBS ?= 2

NOX := .nox/tools/bin/nox

.PHONY: install install-all demo test test-device test-versions faults soak bench rivals lint notebooks docs docs-serve package clean

install: $(VENV)/installed

install-all: $(VENV)/installed-all

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing PyTorch, NNI and the rest into $(VENV): this takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/installed-all: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs,notebooks]'
	touch $@

demo: install
	$(BIN)/zskd-nni demo --out $(OUT)

test: install
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test-device: install
	ZSKD_NNI_TEST_DEVICE=$(or $(filter-out cpu,$(DEVICE)),elsewhere) $(BIN)/python -m pytest tests/device

# An environment of its own: NNI holds filelock back, and virtualenv wants a newer one.
$(NOX):
	$(PYTHON) -m venv .nox/tools
	.nox/tools/bin/python -m pip install --quiet nox==2026.10.20 uv==0.13.9

test-versions: $(NOX)
	$(NOX) $(if $(SESSION),--session $(SESSION))

faults: install
	ZSKD_NNI_FAULTS=long OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -v -rA --durations=20 --numprocesses $(JOBS) --dist loadfile

soak: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py $(SOAK_SECONDS)

bench: install
	$(BIN)/python benchmarks/bench.py --device $(DEVICE)
	$(BIN)/python benchmarks/ladder.py --device $(DEVICE)

rivals: install build/rivals/torch_pruning
	PYTHONPATH=build/rivals $(BIN)/python benchmarks/compare_rivals.py $(if $(LONG),--long)

build/rivals/torch_pruning:
	$(BIN)/python -m pip install --quiet --no-deps --target build/rivals torch-pruning==1.6.1

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: install-all
	$(BIN)/python notebooks/run.py --scale $(SCALE) --device $(DEVICE)

docs: install-all
	$(MKDOCS) build

docs-serve: install-all
	$(MKDOCS) serve --dev-addr $(ADDRESS)

package: install
	rm -rf dist build/package-venv
	$(BIN)/python -m build --no-isolation
	$(PYTHON) -m venv build/package-venv
	build/package-venv/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && package-venv/bin/zskd-nni demo --out package-venv/demo --quiet
	@ls -l dist

clean:
	rm -rf $(VENV) out build dist site
