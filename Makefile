# Everything is set up by the target that needs it; every target may be run again.
PYTHON ?= python3
PORT ?= 8000
ENGINE ?= transformers
MODEL ?= steer-demo
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: serve test check bench demo-model oracles clean

serve: $(READY)
	$(BIN)/steer serve --model $(MODEL) --engine $(ENGINE) --port $(PORT)

test: $(READY) oracles
	$(BIN)/pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -m "not slow" -x

bench: $(READY) oracles
	$(BIN)/python -m benchmarks

demo-model: $(READY)
	$(BIN)/python -m steer_vectors.demo.recipe
	$(BIN)/python -m steer_vectors.demo.recipe.vectors
	$(BIN)/python -m steer_vectors.demo.recipe.sae

# The CPU build of torch is enough for the demo; set TORCH to install another one.
TORCH ?= torch==2.13.0
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $(READY)

# Peers' packages, each in an environment of its own: they are compared with, never depended on.
oracles: $(READY)
	bash tests/oracle/setup.sh

clean:
	rm -rf $(VENV) .venvs build dist *.egg-info
