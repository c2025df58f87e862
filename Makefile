# Everything is set up by the target that needs it; every target may be run again.
PYTHON ?= python3
PORT ?= 8000
ENGINE ?= transformers
MODEL ?= steer-demo
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Tests run in so many processes, of one thread each.
PARALLEL ?= -n 2 --dist loadfile

# vLLM has an environment of its own for each release: its requirements are narrower than Steer's.
# The newest with a CPU build serves, and runs every file. The newest of all may be ahead of its
# CPU build: its Python over the former's kernels runs those files that meet vLLM's internals.
VENVS := .venvs
VLLM_VERSION ?= 0.32.0
VLLM_AHEAD ?= 0.33.0
VLLM_BIN := $(VENVS)/vllm-$(VLLM_VERSION)/bin
VLLM_SEAMS := core/test_admission core/test_cache_keys core/test_scheduler test_contract \
  server/test_server worker/test_runner_v2

.PHONY: serve test lint check fuzz-http bench bench-vllm bench-smollm2 docs-outputs demo-model \
  demo-eval models-page oracles clients vllm vllm-$(VLLM_VERSION) vllm-$(VLLM_AHEAD) clean

ifeq ($(ENGINE),vllm)
serve: vllm-$(VLLM_VERSION)
	$(VLLM_BIN)/steer serve --model $(MODEL) --engine vllm --port $(PORT)
else
serve: $(READY)
	$(BIN)/steer serve --model $(MODEL) --engine $(ENGINE) --port $(PORT)
endif

# The environments are made two at a time: pip keeps one core busy, not two.
test: $(READY)
	$(MAKE) -j 2 oracles clients vllm
	bash deploy/postgres-for-tests.sh
	$(BIN)/pytest $(PARALLEL)
	bash tests/vllm/run.sh $(VLLM_VERSION)
	bash tests/vllm/run.sh $(VLLM_AHEAD) $(VLLM_SEAMS:%=tests/vllm/%.py)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(BIN)/pytest $(PARALLEL) -m "not slow" -x

# Requests of every kind to a server over the fake engine, held against its OpenAPI document; for
# another server ARGS="--url http://…".
fuzz-http: $(READY)
	$(BIN)/python tests/support/fuzz_http.py $(ARGS)

bench: $(READY) oracles
	$(BIN)/python -m benchmarks

# Pairs of engines that are started several times; options: ARGS="--part http --shape smollm2".
bench-vllm: vllm-$(VLLM_VERSION)
	$(VLLM_BIN)/python -m benchmarks vllm $(ARGS)

# On a real model, both engines and all peers side by side; options: ARGS="--rounds 9 --part vllm".
bench-smollm2: $(READY) oracles vllm-$(VLLM_VERSION)
	$(BIN)/python -m benchmarks smollm2 $(ARGS)

# Runs the pages whose code is run and writes what they print, and their pictures, into them.
docs-outputs: $(READY) oracles clients
	$(BIN)/python tests/support/doc_pages.py --update README.md docs/clients.md \
	  $(wildcard docs/tutorial/*.md)

# Tries every class of models that transformers has, and writes the table of docs/models.md.
models-page: $(READY)
	PYTHONPATH=tests/support $(BIN)/python tests/support/models/survey.py

# Each step can be run alone; it reads what those before it wrote.
demo-model: $(READY)
	$(BIN)/python -m steer_vectors.demo.recipe
	$(BIN)/python -m steer_vectors.demo.recipe.data --out vectors/demo/data
	$(BIN)/python -m steer_vectors.demo.recipe.sae
	$(BIN)/python -m steer_vectors.demo.recipe.sae.guided
	$(BIN)/python -m steer_vectors.demo.recipe.oracle
	$(BIN)/python -m steer_vectors.demo.recipe.vectors
	$(BIN)/python -m steer_vectors.demo.recipe.relations.library
	$(BIN)/python -m steer_vectors.demo.recipe.profiles

# Checks what is shipped; `ARGS="--only facts"` checks a part.
demo-eval: $(READY)
	$(BIN)/python -m steer_vectors.demo.recipe.evaluation $(ARGS)

# The CPU build of torch is enough for the demo; set TORCH to install another one.
TORCH ?= torch==2.13.0
export PYTHON TORCH
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $(READY)

# Peers' packages, each in an environment of its own: they are compared with, never depended on.
oracles: $(READY)
	bash tests/oracle/setup.sh

# Clients of the server, in one environment: they are run against it, never depended on.
clients:
	bash tests/clients/setup.sh

# Each does nothing when its environment is in place.
vllm: vllm-$(VLLM_AHEAD)
	bash tests/vllm/torchvision.sh $(VLLM_VERSION)

vllm-$(VLLM_AHEAD): vllm-$(VLLM_VERSION)
	bash deploy/vllm-ahead.sh $(VLLM_AHEAD) $(VLLM_VERSION)

vllm-$(VLLM_VERSION):
	bash deploy/vllm-cpu.sh $(VLLM_VERSION)

clean:
	rm -rf $(VENV) $(VENVS) build dist *.egg-info
