# `make demo`, `make test`, `make check` and `make bench` set up what they need; `make help` lists the targets.
PYTHON ?= python3.11
PROFILE ?= $(if $(wildcard /proc/driver/nvidia/version),cuda,cpu)
CONFIG ?= configs/demo.yaml
BENCH ?= smoke
ADDRESS ?= http://127.0.0.1:8265
SHARED ?= /shared
UV_VERSION := 0.13.9
VENV := .venv
RACE := .venv-race
BIN := $(VENV)/bin
# One stamp per stage: a stage runs again only when what it reads has changed.
UV := $(VENV)/.uv-$(UV_VERSION)
LOCKED := $(VENV)/.locked-$(PROFILE)
EDITABLE := $(VENV)/.editable-$(PROFILE)
SLOW := $(VENV)/.slow-$(PROFILE)
TARGETS := trace workers launch tests benchmarks setup.py
INSTALL := sh launch/setup/install.sh $(BIN)

.PHONY: help setup demo check test test-kills soak test-slow bench bench-parts race build docs base-model lock clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo "  variables: PYTHON=$(PYTHON) PROFILE=$(PROFILE) (cpu|cuda) CONFIG=$(CONFIG)"

setup: $(EDITABLE)  ## make .venv with everything in it; does nothing when it is up to date

demo: setup  ## train the built-in arithmetic model with TRACE and watch it get better (CONFIG=... for another run)
	$(BIN)/trace-rl train $(CONFIG)

check: setup  ## lint, format, types, floors, and the locks against their review
	$(BIN)/ruff check $(wildcard $(TARGETS))
	$(BIN)/ruff format --check $(wildcard $(TARGETS))
	$(BIN)/python launch/setup/view.py
	cd build/view && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p trace_rl
	cd build/view && ../../$(BIN)/lint-imports
	$(BIN)/python launch/setup/audit.py

test: setup  ## every test that is not marked slow
	$(BIN)/python -m pytest -m "not slow"

test-kills: setup  ## ten kills at random moments of real runs, which must end with the weights of a run without
	$(BIN)/python benchmarks/kill_anywhere.py --kills 10 --kills-per-run 10

soak: setup  ## half an hour of the demo, whose memory, file handles and threads must not grow
	$(BIN)/python benchmarks/soak.py

test-slow: setup $(SLOW)  ## the tests marked slow; installs a real 135 M model (98 MB), a tokenizer and reasoning-gym
	$(BIN)/python -m pytest -m slow

bench: setup  ## a run stage by stage, and its distance to the roofs (BENCH=smoke|node|cluster, ARGS="--compare FILE")
ifeq ($(BENCH),cluster)
	$(BIN)/ray job submit --address $(ADDRESS) --working-dir . -- python benchmarks/bench.py cluster --shared $(SHARED) $(ARGS)
else
	$(BIN)/python benchmarks/bench.py $(BENCH) $(ARGS)
endif

bench-parts: setup  ## every other benchmark in benchmarks/, half an hour
	$(BIN)/python benchmarks/pipeline_step.py
	$(BIN)/python benchmarks/annotation_overlap.py
	$(BIN)/python benchmarks/head_loss.py
	$(BIN)/python benchmarks/learner_step.py
	$(BIN)/python benchmarks/straggler_trace.py
	$(BIN)/python benchmarks/driver_overhead.py
	$(BIN)/python benchmarks/weight_sync.py
	$(BIN)/python benchmarks/fuzz.py --inputs 5000

race: setup $(RACE)/.ready  ## the same training by us and by TRL's GRPOTrainer, in an environment of its own
	$(BIN)/python benchmarks/race.py --peer $(RACE)/bin/python $(ARGS)

$(RACE)/.ready: requirements/race.txt
	$(PYTHON) -m venv $(RACE)
	$(RACE)/bin/python -m pip install --quiet uv==$(UV_VERSION)
	sh launch/setup/install.sh $(RACE)/bin -r requirements/race.txt
	touch $@

build: setup  ## wheel and source archive in dist/
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m build --no-isolation --outdir dist .

docs: setup  ## write docs/methods.md from the presets, and docs/cost.md from the cost model
	$(BIN)/python -m trace_rl.launch.methods_page
	$(BIN)/python -m trace_rl.launch.cost_page.page

base-model: setup  ## remake the shipped base model of the arithmetic task
	$(BIN)/python -m trace_rl.launch.arithmetic_base

lock: $(UV)  ## compile requirements/*.lock again from setup.py
	sh launch/setup/lock.sh $(BIN)

clean:  ## remove .venv, build products and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find trace workers launch configs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(UV):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed, %s is %s: set PYTHON=..." % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	touch $@

$(LOCKED): $(UV) launch/setup/install.sh requirements/$(PROFILE).lock requirements/overrides-$(PROFILE).txt requirements/flash-attn.txt
	$(INSTALL) --override requirements/overrides-$(PROFILE).txt -r requirements/$(PROFILE).lock
	if [ $(PROFILE) = cuda ]; then $(INSTALL) --no-deps --no-build-isolation -r requirements/flash-attn.txt; fi
	rm -f $(VENV)/.locked-* && touch $@

$(EDITABLE): $(LOCKED) setup.py pyproject.toml
	$(INSTALL) --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/.editable-* && touch $@

$(SLOW): $(LOCKED) requirements/slow-tests.lock requirements/overrides-slow-tests.txt
	$(INSTALL) --override requirements/overrides-slow-tests.txt --override requirements/overrides-$(PROFILE).txt -r requirements/slow-tests.lock
	touch $@
