# `make demo` and `make test` set up their own virtual environment. The plain commands for Windows are in README.md.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint options bench clean

demo: .venv/.installed
	$(BIN)/python demo/demo.py

test: .venv/.installed
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.installed
	$(BIN)/pip install --disable-pip-version-check -q -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/benchmark.py

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check torch==2.13.0 setuptools==84.2.1 cython==3.3.1 numpy==2.4.6
	$(BIN)/pip install --disable-pip-version-check --no-build-isolation -r requirements.txt
	touch $@

clean:
	rm -rf .venv demo_output
