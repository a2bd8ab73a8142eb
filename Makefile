# `make demo` and `make test` set up their own virtual environment. The plain commands for Windows are in README.md.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint options bench requirements clean

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

.venv/.installed: requirements.txt requirements-basicsr.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --no-deps --require-hashes -r requirements.txt
	$(BIN)/pip install --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --disable-pip-version-check --no-deps --require-hashes --no-build-isolation -r requirements-basicsr.txt
	touch $@

# After a change of requirements.in; what is pinned already stays unless UPGRADE=--upgrade.
requirements: .venv/.installed
	$(BIN)/pip install --disable-pip-version-check -q uv==0.13.9
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --custom-compile-command "make requirements" \
		$(UPGRADE) --output-file requirements.txt requirements.in

clean:
	rm -rf .venv demo_output
