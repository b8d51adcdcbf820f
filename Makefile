# Everything runs in .venv, made on first use and reused until pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What runs a model, and what develops it: `demo` needs the first alone.
RUNTIME := $(VENV)/runtime
STAMP := $(VENV)/installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all lint docs bench clean

demo: $(RUNTIME)
	$(BIN)/tracequant demo --out demo-run

# One process for each core, each with one thread (tests/conftest.py).
test: lint
	$(BIN)/pytest -q -n auto --maxprocesses 8 --dist worksteal

test-all: lint
	$(BIN)/pytest -q -n auto --maxprocesses 8 --dist worksteal -m ""

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

# Pages that are printed from the code; a test compares them.
docs: $(STAMP)
	$(BIN)/python -m tracequant.cli.reference > docs/options.md

bench: $(STAMP)
	$(BIN)/python benchmarks/two_bit_grid.py
	$(BIN)/python benchmarks/allocation.py
	$(BIN)/python benchmarks/hutchinson_probes.py
	$(BIN)/python benchmarks/curvature.py
	$(BIN)/python benchmarks/convergence.py
	$(BIN)/python benchmarks/metrics.py
	$(BIN)/python benchmarks/without_training.py --networks ResNet20 --images 1024
	$(BIN)/python benchmarks/imagenet_small.py --mobilenet
	$(BIN)/python benchmarks/bccd_retinanet.py --check
	$(BIN)/python examples/fastestdet.py --out benchmarks/results/fastestdet.json
	$(BIN)/python benchmarks/finetuning_step.py
	$(BIN)/python benchmarks/cifar10_resnet20.py --short
	$(BIN)/python benchmarks/deployment.py
	$(BIN)/python benchmarks/end_to_end.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tracequant needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml | $(BIN)/python
	@echo "Installing torch and tracequant into $(VENV): several GB on Linux, some minutes"
	@$(PIP) -e .
	@touch $@

# The torch that is there stays, and torchvision is resolved with it in one call: another may not fit.
$(STAMP): $(RUNTIME)
	@echo "Installing what tests and checks need into $(VENV): some hundred MB, about a minute"
	@$(PIP) -e '.[vision,detection,dev]' "torch==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')"
	@touch $@

clean:
	rm -rf $(VENV) demo-run
