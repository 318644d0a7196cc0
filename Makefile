# acetate. Every target sets up what it needs; `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python
# Threads that wait spin for microseconds, then sleep: asleep at once costs half the speed of small models, and
# spinning for long stalls the others where cores are shared.
export GOMP_SPINCOUNT = 20000
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help setup demo train-vae train-dit lint check test test-all failed pages bench gpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.complete ## virtual environment with the locked packages

.venv/.complete: requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(RUN) -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(RUN) --no-deps -e .
	@touch $@

demo: setup ## all the way on procedural clips: RGBA-VAE, cached latents, DoRA, four sampled clips (minutes on 2 cores)
	$(BIN)/acetate prep synthesize out=data/demo clips=280 frames=9 size=48 replace=true
	$(BIN)/acetate train experiment=vae_rgba name=demo trainer.max_steps=800 trainer.val_check_interval=400
	$(BIN)/acetate evaluate run=outputs/demo
	$(BIN)/acetate prep cache_latents shards=data/demo out=data/demo_latents rgba_vae=outputs/demo smallest=0.45 background=key \
		replace=true
	$(BIN)/acetate train experiment=dit_dora name=demo_dit trainer.max_steps=500 trainer.val_check_interval=500 \
		task.alpha_floor=0.2
	$(BIN)/acetate sample prompts=data_prep/demo_prompts.txt out=outputs/demo_samples overwrite=true guide.centre=[0.5,0.5] \
		guide.axes=[0.6,0.6] steps=30 guidance=3

train-vae: setup ## the RGBA-VAE on your shards: make train-vae ARGS="data.shards=data/mine trainer.max_steps=5000"
	$(BIN)/acetate train experiment=vae_rgba $(ARGS)

train-dit: setup ## DoRA on cached latents: make train-dit ARGS="data.latents=data/mine_latents rgba_vae=outputs/mine"
	$(BIN)/acetate train experiment=dit_dora $(ARGS)

lint: setup ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# as many processes as cores are busy already
check test test-all failed pages: export OMP_NUM_THREADS = 1

check: lint ## the above and the fast tests
	$(RUN) -m pytest -n logical --dist loadgroup -m "not slow and not gpu"

test: setup ## the tests that need no GPU, but for the long ones
	$(RUN) -m pytest -n logical --dist loadgroup -m "not gpu and not long and not pages"

test-all: setup ## with the long ones: kills, many ranks, Ray, launchers, the wheel, the README's commands
	$(RUN) -m pytest -n logical --dist loadgroup -m "not gpu and not pages"

failed: setup ## what failed in the last run of tests, once more, with the machine to itself
	$(RUN) -m pytest --last-failed --last-failed-no-failures none --tb=short -m "not gpu and not pages"

pages: setup ## the commands of docs/, as written, in a fresh copy
	$(RUN) -m pytest tests/test_documentation.py -m pages

bench: setup ## what the device gives at most, one VAE-stage step at full width against the released way, and reading clips
	$(BIN)/acetate benchmark $(ARGS)

gpu: setup ## on a machine with an NVIDIA GPU: the tests that only one can settle, then its speeds
	$(RUN) -m pytest -m gpu tests/gpu --tb=short --durations=20
	$(BIN)/acetate benchmark parts=[ceilings,step,norm,dit] device=cuda $(ARGS)

clean: ## remove what runs wrote: outputs, multirun, demo shards
	rm -rf outputs multirun data/demo data/demo_latents
