# `make` lists what there is. Every target sets up what it needs first; a finished set-up costs a fraction of a second.
.DEFAULT_GOAL := help
.PHONY: help setup demo test soak docs lint check wheel clean

PYTHON_IN_VENV := .venv/bin/python
# One pytest worker per usable core, up to 8 (each holds a torch of its own and compiles its own kernels).
# OMP_NUM_THREADS is unset for the count since nproc heeds it.
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); [ $$n -le 8 ] && echo $$n || echo 8)
# More options of pytest, such as --cpu-bf16=yes, which stands in for a CPU that computes in bf16.
TEST_OPTIONS ?=

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST)

setup: ## system libraries (apt) and .venv with pinned packages; PYTHON=... chooses the interpreter
	@./setup.sh

demo: setup ## distil on Fashion-MNIST, with and without pruning, and print what was saved
	$(PYTHON_IN_VENV) -m fastkd.bench savings recipes/quickstart.yaml --no-breakdown

# One torch thread per worker, or the workers fight over the cores. Numba keeps its threads: FFCV's loaders ask for two.
# worksteal hands each worker a run of neighbouring tests, so that a file's fixtures and compiled kernels are mostly made
# once, and levels the end, where a whole file per worker (loadfile) would leave one core idle behind the longest file.
test: ## the tests that need no GPU, on all cores
	@./setup.sh tests
	OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -n $(WORKERS) --dist worksteal -m 'not gpu and not soak' $(TEST_OPTIONS)

soak: ## hundreds of broken-off epochs and killed trainings, one after another: the better part of an hour; prints its figures
	@./setup.sh tests
	OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -m soak -s

docs: setup ## write the generated parts of docs/ anew, and build site/index.html
	$(PYTHON_IN_VENV) docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(PYTHON_IN_VENV) -m mkdocs build --strict

lint: setup ## ruff (rules and format) and mypy
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy

check: lint test ## everything before a commit: lint and tests

wheel: setup ## dist/: the sdist, and the wheel that is built from it
	rm -rf build dist
	$(PYTHON_IN_VENV) -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	$(PYTHON_IN_VENV) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

clean: ## remove caches and build leftovers; keeps .venv, data and runs
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
