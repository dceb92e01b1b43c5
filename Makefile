PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-all lint

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The environment is made once, and again when what it holds has changed.
.venv/installed: requirements.txt requirements-test.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-test.txt
	touch $@

demo: .venv/installed  ## experiment 1, small: LeNet on the middle of the map (2 to 3 minutes)
	$(BIN)/python directional_bias.py --arch lenet --output runs/demo \
	    $(foreach y,-4 -2 0 2 4,$(foreach x,-4 -2 0 2 4,--frequency $(y) $(x)))

test: .venv/installed  ## the tests that need neither a GPU nor much patience
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: .venv/installed  ## every test that this machine can run
	$(BIN)/python -m pytest

lint: .venv/installed  ## ruff and its formatter, the notebook included
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
