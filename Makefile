# `make demo` and `make test` do all the set-up; nothing is reinstalled while pyproject.toml and
# constraints.txt are unchanged.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Test processes: alone, a slow test leaves a third of two cores idle (waits, start-ups).
TESTERS ?= 2
# Slow tests that do not begin within so many minutes are left out and listed, other ones each day; empty: none is.
MINUTES ?=
PYTEST  := $(BIN)/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test lint types fast audit benchmarks clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.12 setup")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24" "setuptools>=77" wheel
	@# torch first and exactly pinned: any looser request may bring another build of it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: setup
	$(BIN)/gru demo

test: lint types
	$(PYTEST) --durations 40 $(if $(MINUTES),--minutes $(MINUTES))

fast: setup
	$(PYTEST) -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

audit: setup  # a report: neither findings nor a database out of reach fail it
	$(BIN)/python .ci/audit.py

benchmarks: setup
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/search.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
