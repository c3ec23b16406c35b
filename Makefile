# Two commands on a fresh machine, nothing before them:  make demo   and   make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test slow lint format figures wheel clean

help:
	@echo "make demo    set up, then adapt SmolLM2-135M on this machine's text and show what it did (about 13 minutes on 2 cores)"
	@echo "make test    set up, then lint, types and tests (slow ones: make slow)"
	@echo "make figures, make wheel, make format, make clean"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "hici needs Python 3.11 or newer; this is %d.%d. Give another: make PYTHON=python3.12" % v[:2])'
	@echo "setting up $(VENV): downloads torch (200 MB as a CPU build, more with CUDA) and about 250 MB of packages"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,gguf]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python demo/run.py --cache .cache --out runs/demo

test: lint
	$(BIN)/pytest -n 2

slow: $(STAMP)
	$(BIN)/pytest -n 2 -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(STAMP)
	$(BIN)/python docs/draw_stages.py

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) .cache runs dist
