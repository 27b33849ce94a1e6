# Needs git, make and Python >= 3.11; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/demo
CONFIG ?= experiments/configs/digits.py

.PHONY: demo demo-text demo-grids demo-seeds smoke test lint types unit docs test-full test-faults test-slurm clean

demo: $(VENV)/.run
	$(BIN)/python -m experiments.train --workdir=$(WORKDIR) --config=$(CONFIG)
	$(BIN)/python -m experiments.adapt --workdir=$(WORKDIR) --config=$(CONFIG)
	$(BIN)/python -m experiments.report --workdir=$(WORKDIR)

# A decoder of bytes on the sources of Python's standard library; nothing is downloaded.
demo-text: WORKDIR = runs/demo-text
demo-text: CONFIG = experiments/configs/documents.py
demo-text: demo

# Private copies of a decoder of grids for tasks with drawn rules; nothing is downloaded.
demo-grids: WORKDIR = runs/demo-grids
demo-grids: CONFIG = experiments/configs/few_shot.py
demo-grids: demo

demo-seeds: WORKDIR = runs/demo-seeds
demo-seeds: $(VENV)/.run
	$(BIN)/python -m experiments.train --workdir=$(WORKDIR) --config=$(CONFIG) --config.seeds="(0, 1, 2)"
	$(BIN)/python -m experiments.adapt --workdir=$(WORKDIR) --config=$(CONFIG) --config.seeds="(0, 1, 2)"
	$(BIN)/python -m experiments.report --workdir=$(WORKDIR)

smoke: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m smoke tests/test_smoke.py

# The pages run beside the tests: most of either is one compilation after the other.
test: lint types
	$(MAKE) --jobs=2 unit docs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What `make test` runs, and the whole product of losses, selections and adapters.
test-full: lint types docs
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not faults and not slurm and not smoke'

# A hundred kills at random moments during the example sweep: about twenty minutes. Then disks that
# are full or read-only, which needs root to mount them.
test-faults: $(VENV)/.dev
	TTT_JAX_KILLS=100 $(BIN)/python -m pytest -m faults tests/experiments/test_sweep_faults.py tests/experiments/test_sweep_disk.py

# A Slurm of its own on this machine: needs root and `apt install slurm-wlm munge`.
test-slurm: $(VENV)/.dev
	$(BIN)/python -m pytest -m slurm tests/experiments/test_sweep_slurm.py

# The pages are read once, by the first of the two.
docs: DOCTREES = docs/_build/doctrees
docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -q -W --keep-going -d $(DOCTREES) -b doctest docs docs/_build/doctest
	$(BIN)/python -m sphinx -q -W --keep-going -d $(DOCTREES) -b html docs docs/_build/html

# What a run needs; the second of `make demo` and `make test` finds it there.
$(VENV)/.run: setup.cfg requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ttt_jax needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) --version). Run make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -e '.[data,experiments,lora]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet -e '.[dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) runs docs/_build .jax_cache .pytest_cache .mypy_cache .ruff_cache
