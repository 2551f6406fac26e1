# Everything starts from a bare Python 3.11 or newer: `make demo` and `make test` make .venv when it is missing or
# when the dependencies have changed.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint clean

help:
	@echo "make demo   detect with the shipped weights, then train for about two minutes"
	@echo "make test   run the tests"
	@echo "make lint   formatting, types and the import contract"
	@echo "make setup  make $(VENV) with everything installed"
	@echo "make clean  remove $(VENV)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "crossdino needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip install --python $(VENV)/bin/python --constraint constraints.txt --editable '.[dev,pretrained]'
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/python scripts/demo.py

# Two processes with one thread each: small models gain nothing from many threads, and pools of them fight for the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python --level error src
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV)
