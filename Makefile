# Each command sets up its own virtual environment, .venv. README.md has the plain commands for Windows.
PYTHON ?= python3
BIN := .venv/bin
# Two processes with one thread each: the networks in the tests are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
FAST := network fusion loading registration checkpoint* identify errors files fuse_command upscale_command
RUNTIMES := runtimes exported onnx onnx_int8 ncnn tensorrt spandrel comfyui
tests_of = $(wildcard $(patsubst %,tests/test_%.py,$(1)))

.PHONY: demo web test test-fast test-runtimes lint format options train gpu bench requirements clean

demo: .venv/.installed
	$(BIN)/python demo/demo.py

# The page that upscales in the browser, on localhost. make web ARGS="--port 8080"
web: .venv/.installed
	$(BIN)/python demo/serve_web.py $(ARGS)

test: .venv/.installed
	$(PYTEST)

# The network, fusing, loading and the commands.
test-fast: .venv/.installed
	$(PYTEST) $(call tests_of,$(FAST))

# Our files in other runtimes, spandrel and ComfyUI. Installs requirements-runtimes.txt first.
test-runtimes: .venv/.installed
	$(BIN)/pip install --disable-pip-version-check --no-deps --require-hashes -r requirements-runtimes.txt
	$(PYTEST) $(call tests_of,$(RUNTIMES))

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

options: .venv/.installed
	$(BIN)/python options/generate_options.py

# make train ARGS="--traiNNer-redux CHECKOUT --data FOLDER"
train: .venv/.installed
	$(BIN)/python training/train.py $(ARGS)

bench: .venv/.installed
	$(BIN)/pip install --disable-pip-version-check -q -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/benchmark.py $(ARGS)

# What a GPU can do, in four minutes. Install the PyTorch build for your GPU first.
gpu: .venv/.installed
	$(BIN)/pip install --disable-pip-version-check -q -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/gpu.py $(ARGS)

.venv/.installed: requirements.txt requirements-basicsr.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --no-deps --require-hashes -r requirements.txt
	$(BIN)/pip install --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --disable-pip-version-check --no-deps --require-hashes --no-build-isolation -r requirements-basicsr.txt
	touch $@

# After changing a requirements*.in. Pinned versions stay unless UPGRADE=--upgrade.
COMPILE = $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes $(UPGRADE) \
	--custom-compile-command "make requirements"
requirements: .venv/.installed
	$(BIN)/pip install --disable-pip-version-check -q uv==0.13.9
	$(COMPILE) --output-file requirements.txt requirements.in
	$(COMPILE) --constraint requirements.txt --output-file requirements-runtimes.txt requirements-runtimes.in

clean:
	rm -rf .venv demo_output build dist *.egg-info
