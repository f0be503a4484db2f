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
TABLES := $(addprefix reproduce-,table1 adding adding-500 frequency imdb ucf101)
DATA = $(or $(DATA_$*),$*)
DATA_table1 := mnist
DATA_adding-500 := adding_sarnn

QUICKSTART := experiment=digits profile=digits/quickstart device=cpu

SWEEPS := $(addprefix sweep-,mnist digits adding)
SWEEP_digits := sweep
SWEEP_adding := long
SWEEP = experiment=sweep_$* profile=$*/$(or $(SWEEP_$*),$(PROFILE)) rows=null $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help install quickstart $(TABLES) reproduce-all $(SWEEPS) figures dashboard claims verify-table1 bench docs test test-wheel lint

help:  ## list the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 28

install: $(INSTALLED)  ## create the environment and install the locked dependencies

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.lock
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(RUN) -m skiprnn.model.engines.native
	touch $@

quickstart: install  ## Skip RNN and SA-RNN on 8x8 digits: real data, no download, minutes; a table and pictures
	$(RUN) -m skiprnn.train -m $(QUICKSTART) $(CORES) $(ARGS)
	$(RUN) -m skiprnn.figures $(QUICKSTART) $(ARGS)
	@echo "In the folder above them: table.md. To look at: tradeoff.png, accuracy against state updates, and usage-*.png,"
	@echo "what is read (red) and skipped (blue). Next: make dashboard, make sweep-digits, make reproduce-table1"

reproduce-table1:  ## Table I on MNIST; PROFILE=paper|long|cpu|smoke (default: paper on a GPU, else cpu)
reproduce-adding:  ## Skip RNN's Table 1: the adding task, length 50
reproduce-adding-500:  ## SA-RNN's Table 4: the adding task, length 500
reproduce-frequency:  ## Skip RNN's frequency discrimination
reproduce-imdb:  ## Skip RNN's sentiment analysis on IMDb
reproduce-ucf101:  ## Skip RNN's action recognition on UCF-101, from a feature store: see README.md
$(TABLES): reproduce-%: install
	$(RUN) -m skiprnn.train -m experiment=$(subst -,,$*) data=$(DATA) profile=$(DATA)/$(PROFILE) $(if $(ON_GPU),,$(CORES)) $(ARGS)

reproduce-all: install  ## every table that the data at hand allows; says what was left out, and why
	$(RUN) -m skiprnn.sweep $(PROFILE) $(if $(ON_GPU),,$(CORES)) $(ARGS)

sweep-mnist:  ## accuracy against state updates on MNIST, over λ and p_skip: table and figures
sweep-digits:  ## the same on 8x8 digits, in minutes
sweep-adding:  ## error against state updates on the adding task
$(SWEEPS): sweep-%: install
	$(RUN) -m skiprnn.train -m $(SWEEP) $(if $(ON_GPU),,$(CORES))
	$(RUN) -m skiprnn.figures $(SWEEP)

figures: install  ## figures of complete runs; ARGS="experiment=table1 profile=mnist/cpu" (default: quickstart's)
	$(RUN) -m skiprnn.figures $(or $(ARGS),$(QUICKSTART))

dashboard: install  ## outputs/dashboard.html: every sweep, its table, curves and runs; ARGS="FOLDER --serve" follows them
	$(RUN) -m skiprnn.dashboard $(ARGS)

claims: install  ## what the papers claim, and what the records in results/ say of it: results/claims.md
	$(RUN) -m skiprnn.claims $(ARGS)

verify-table1: install  ## evaluate the published MNIST checkpoints on the CPU, compare with their records
	$(RUN) -m skiprnn.evaluate verify='results/*/checkpoints/mnist' device=cpu $(ARGS)

bench: install  ## time the engines against torch.nn; ARGS=--quick for minutes
	$(RUN) -m skiprnn.bench $(ARGS)

# torch.Tensor gives another module than its file as its own, so pdoc does not find one of its annotations
docs: install  ## outputs/api/skiprnn.html: the API page, from the docstrings
	$(RUN) -W "ignore:Cannot determine where skiprnn.GatedState._is_param" \
		-m pdoc --docformat google --no-show-source --output-directory outputs/api $(ARGS) skiprnn '!skiprnn\.'

test: install lint  ## lint, types and the test suite
	$(RUN) -m pytest -q -n auto $(ARGS)

test-wheel: install  ## build the wheel, install it in two fresh environments, try it there
	$(RUN) tests/wheel.py

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
