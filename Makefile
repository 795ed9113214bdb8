# Two commands are all a newcomer needs: make quickstart, make test.
#   PYTHON=python3.12            another interpreter (3.11 or newer)
#   TORCH_INDEX=URL              where pip finds CPU builds of PyTorch, if your package index offers only CUDA builds
#   EXTRAS=dev,curation,mpi      which optional dependencies are installed
#   QUICKSTART="run.steps=50"    overrides for the main job
PYTHON ?= python3
EXTRAS ?= dev,curation,fasttext,mpi
TORCH_INDEX ?=
QUICKSTART ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: help install quickstart test slow lint types bench docs clean
help:
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 14

install: $(STAMP) ## create .venv and install everything for development and the quickstart
$(STAMP): pyproject.toml constraints/cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 install"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "This Python has no venv module; on Debian: apt-get install python3-venv"; exit 2; }
	@case ",$(EXTRAS)," in *,fasttext,*) command -v g++ >/dev/null || { echo "fasttext is compiled and needs g++; on Debian: apt-get install g++ (or: make EXTRAS=dev,curation,mpi install)"; exit 2; };; esac
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade "pip>=24" "setuptools>=77" wheel
	$(PIP) install -q -c constraints/cpu.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),) torch
	$(PIP) install -q -c constraints/cpu.txt -e '.[$(EXTRAS)]'
	@touch $@

quickstart: install ## raw documents to an exported model and a report, in minutes
	$(BIN)/regrowth quickstart $(QUICKSTART)

test: install ## the suite (under 15 minutes on two cores)
	$(BIN)/python -m pytest

slow: install ## the long tests
	$(BIN)/python -m pytest -m slow

lint: install ## format check and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install ## static types
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: install ## every benchmark in its short form
	for program in benchmarks/*.py; do $(BIN)/python $$program --quick || [ "$$program $$?" = "benchmarks/kernels.py 2" ] || exit 1; done  # that one needs a GPU

docs: install ## run the commands that the documentation shows
	$(BIN)/python -m pytest tests/test_docs.py

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
