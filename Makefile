# Everything runs in .venv, made on first use and reused until pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test test-all lint bench clean

demo: $(STAMP)
	$(BIN)/tracequant demo --out demo-run

test: lint
	$(BIN)/pytest -q

test-all: lint
	$(BIN)/pytest -q -m ""

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/two_bit_grid.py
	$(BIN)/python benchmarks/allocation.py
	$(BIN)/python benchmarks/hutchinson_probes.py
	$(BIN)/python benchmarks/curvature.py
	$(BIN)/python benchmarks/convergence.py
	$(BIN)/python benchmarks/metrics.py
	$(BIN)/python benchmarks/imagenet_small.py --mobilenet
	$(BIN)/python benchmarks/bccd_retinanet.py --check
	$(BIN)/python examples/fastestdet.py --out benchmarks/results/fastestdet.json
	$(BIN)/python benchmarks/finetuning_step.py
	$(BIN)/python benchmarks/cifar10_resnet20.py --short
	$(BIN)/python benchmarks/deployment.py
	$(BIN)/python benchmarks/end_to_end.py

# torch and torchvision are resolved in one call: installed one after the other they may not fit each other.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tracequant needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[vision,detection,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo-run
