# One environment, one command per result. PYTHON, VENV, PROFILE and ARGS can be given: make reproduce-table1 PROFILE=smoke
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# the published protocol needs a GPU; without one, the shortened protocol, a process per core
ON_GPU = $(shell $(RUN) -c "import torch; print('yes' if torch.cuda.is_available() else '')" 2>/dev/null)
PROFILE = $(if $(ON_GPU),paper,cpu)
CORES := hydra/launcher=processes threads=1

.DEFAULT_GOAL := help
.PHONY: help install quickstart reproduce-table1 bench test lint

help:  ## list the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 28

install: $(INSTALLED)  ## create the environment and install the locked dependencies

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.lock
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(RUN) -m skiprnn.engines.native
	touch $@

quickstart: install  ## Table I's rows on 8x8 digits: real data, no download, minutes
	$(RUN) -m skiprnn.train -m experiment=digits profile=digits/cpu device=cpu $(CORES) $(ARGS)

reproduce-table1: install  ## Table I on MNIST; PROFILE=paper|cpu|smoke (default: paper on a GPU, else cpu)
	$(RUN) -m skiprnn.train -m experiment=table1 profile=mnist/$(PROFILE) $(if $(ON_GPU),,$(CORES)) $(ARGS)

bench: install  ## time the engines against torch.nn; ARGS=--quick for minutes
	$(RUN) -m skiprnn.bench $(ARGS)

test: install lint  ## lint, types and the test suite
	$(RUN) -m pytest -q $(ARGS)

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
