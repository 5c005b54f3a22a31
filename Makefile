# The developer's commands, and CI's. Every one runs on a fresh clone; `make help` lists them.
#
# Two environments on purpose: the one that serves holds no torch, as the image does; the one that tests and trains
# holds everything. Both are locked by deploy/constraints.txt and installed again only when that or pyproject.toml changes.

SHELL := /bin/bash
PYTHON ?= python3
RUNTIME ?= cpu
VENV ?= .venv
SERVE_VENV ?= .venv-serve-$(RUNTIME)
LOCK_VENV ?= .venv-lock
IMAGE ?= vaeserve:$(RUNTIME)
BUILD ?= docker build
# buildah and podman write OCI images unless told otherwise, and OCI has no HEALTHCHECK.
BUILD_FORMAT = $(if $(filter buildah podman,$(notdir $(firstword $(BUILD)))),--format docker)
ENGINE ?= docker
ARGS ?=
TEST_WORKERS ?= logical
PARALLEL := --numprocesses $(TEST_WORKERS) --dist loadfile
DATA ?= digits
BASE ?=
BASE_PYTHON ?= $(BASE)/$(SERVE_VENV)/bin/python
OLDER = --base $(or $(BASE),$(error BASE=… expected: the checkout to compare with)) --base-python $(BASE_PYTHON) \
  --python $(SERVE_VENV)/bin/python

CONSTRAINTS := deploy/constraints.txt
BIN := $(VENV)/bin
DEV_READY := $(VENV)/.installed-$(RUNTIME)
SERVE_READY := $(SERVE_VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help serve test test-fast test-slow test-engines check format train bench bench-against replay chaos structure \
  lock image image-check clean distclean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  RUNTIME=gpu takes the CUDA runtime instead of the CPU one (test, train and bench: give it a VENV=… of its own);'
	@echo '  ARGS="…" is handed on to serve, train, image-check, structure, replay, chaos, every test… and every bench….'

serve: $(SERVE_READY) ## serve the bundles of exported/ on port 8000 (no torch is installed)
	$(SERVE_VENV)/bin/vaeserve serve $(ARGS)

test: check ## check, then every test but the slow ones and those of test-engines, on TEST_WORKERS processes
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-fast: $(DEV_READY) ## the tests that start no process and no server, and neither export nor train for long
	$(BIN)/python -m pytest -m 'not (slow or engines or integration)' $(PARALLEL) $(ARGS)

test-slow: $(DEV_READY) ## the long tests only
	$(BIN)/python -m pytest -m slow $(ARGS)

test-engines: $(DEV_READY) ## the tests that need a Debian package (curl), Ray or a browser; skipped where that is absent
	$(BIN)/python -m pytest -m engines $(ARGS)

check: $(DEV_READY) ## lint, formatting, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV_READY) ## let ruff format and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(DEV_READY) ## train on DATA (digits, mnist, fashion-mnist or a folder) and end with a bundle in exported/
	$(BIN)/vaetrain fit --data $(DATA) $(ARGS)

bench: $(DEV_READY) ## measure the service against the machine and other servers (docs/performance.md); with BASE=… also bench-against
	$(BIN)/python -m bench --json docs/benchmarks/serving-$$(date +%F).json --figure docs/figures/serving.png $(ARGS)
	$(if $(BASE),$(MAKE) bench-against ARGS=)

bench-against: $(DEV_READY) $(SERVE_READY) ## measure against an older checkout: BASE=… BASE_PYTHON=… (11 minutes; ARGS=--brief: 2)
	$(BIN)/python -m bench.against $(OLDER) --to docs/benchmarks $(ARGS)

replay: $(DEV_READY) $(SERVE_READY) ## the same 3,000 random requests to an older checkout and to this one: BASE=… BASE_PYTHON=…
	$(BIN)/python -m bench.replay $(OLDER) $(ARGS)

chaos: $(DEV_READY) $(SERVE_READY) ## kill, stop and end workers under load: every answer right, none lost (2 minutes)
	$(BIN)/python -m bench.chaos --python $(SERVE_VENV)/bin/python $(ARGS)

structure: $(DEV_READY) ## lines, files a package, layers and circles of service/ (ARGS="checkout …" to compare)
	$(BIN)/python -m bench.structure $(ARGS)

# The local wheels and extra indexes of this machine are switched off: the lock describes the registry's own releases,
# so that torch is pinned together with the CUDA packages that it wants elsewhere. pip-tools has an environment of its
# own, because a lock that no longer fits pyproject.toml must not stand in the way of a new one.
lock: $(LOCK_VENV)/bin/pip-compile ## write deploy/constraints.txt from pyproject.toml (LOCK=--upgrade for newest versions)
	env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE=/dev/null \
	  $< --quiet --all-extras --strip-extras --allow-unsafe --no-header --no-emit-options \
	  --annotation-style line $(LOCK) --output-file $(CONSTRAINTS) pyproject.toml
	sed -i '1i # Exact versions of everything that any extra installs. Written by `make lock`; not edited by hand.' $(CONSTRAINTS)

image: ## build the container image (BUILD="podman build" or "buildah bud" where there is no docker)
	$(BUILD) $(BUILD_FORMAT) --tag $(IMAGE) --target $(RUNTIME) .

image-check: ## run the built image read-only, score with each model, look for what must not be in it (ENGINE=podman|buildah)
	$(PYTHON) deploy/check_image.py --engine $(ENGINE) $(ARGS) $(IMAGE)

clean: ## remove caches and build products, not the environments
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find service training tests bench deploy -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the environments that make created
	rm -rf $(VENV) $(SERVE_VENV) $(LOCK_VENV)

# Extras cpu and gpu bring two packages that own the same files, so an environment only ever gets one of them.
$(DEV_READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(RUNTIME),train,dev,parquet]'
	touch $@

$(SERVE_READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(RUNTIME)]'
	touch $@

$(LOCK_VENV)/bin/pip-compile:
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) pip-tools
