# Everything a person does by hand. Each target sets up what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# idle OpenMP threads sleep: a factor of four when the cores are shared
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test check bench setup clean

demo: setup  ## answer three prompts on a real model: base, published procedure, ours
	$(BIN)/python -m demo

test: setup  ## all tests; the real model is fetched once
	$(BIN)/python -m pytest

check: setup  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup  ## whole generation on the real model, interleaved; about ten minutes
	$(BIN)/python -m bench.generation

setup: .setup-done

.setup-done: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .setup-done out build *.egg-info
