# `make` lists the targets. Each target runs the set-up first, which takes a fraction of a second if it is complete.
.DEFAULT_GOAL := help
.PHONY: help setup demo test soak fake-gpu docs lint check wheel clean

PYTHON_IN_VENV := .venv/bin/python
# One pytest worker per usable core, up to 8 (each loads torch and compiles kernels).
# OMP_NUM_THREADS is unset for the count, since nproc uses it.
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); [ $$n -le 8 ] && echo $$n || echo 8)
# Additional options of pytest, such as --cpu-bf16=yes, which simulates a CPU with bf16.
TEST_OPTIONS ?=

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST)

setup: ## system libraries (apt) and .venv with pinned packages; PYTHON=... chooses the interpreter
	@./setup.sh

demo: setup ## train on Fashion-MNIST with and without pruning, and print times and accuracies
	$(PYTHON_IN_VENV) -m fastkd.bench savings recipes/quickstart.yaml --no-breakdown

# One torch thread per worker, so that the workers do not compete for cores. Numba keeps its threads: FFCV's loaders need two.
# worksteal gives each worker a sequence of neighbouring tests, so most fixtures and kernels of a file are built once. At the
# end it balances the load; with one file per worker (loadfile), cores would be idle while the longest file runs.
test: ## the tests that need no GPU, on all cores
	@./setup.sh tests
	OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -n $(WORKERS) --dist worksteal -m 'not gpu and not soak' $(TEST_OPTIONS)

soak: ## long tests: interrupted epochs, killed trainings, compiling for GPUs; more than an hour; prints its figures
	@./setup.sh tests
	OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -m soak -s

fake-gpu: ## compile the steps of all recipes for NVIDIA GPUs, and run them on one that computes nothing; half an hour
	@./setup.sh tests
	OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -s -m 'soak or not soak' tests/engine/test_fake_gpu.py

docs: setup ## regenerate the generated parts of docs/, and build site/index.html
	$(PYTHON_IN_VENV) docs/generate.py
	$(PYTHON_IN_VENV) -m zensical build --strict

lint: setup ## ruff (rules and format) and mypy
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy

check: lint test ## lint and tests; run it before a commit

wheel: setup ## dist/: the sdist, and the wheel that is built from it
	rm -rf build dist
	$(PYTHON_IN_VENV) -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	$(PYTHON_IN_VENV) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

clean: ## remove caches and build leftovers; keeps .venv, data and runs
	rm -rf build dist site .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
