# Each command sets up its own virtual environment, .venv. README.md has the plain commands for Windows.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check
# Two processes with one thread each: the networks in the tests are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# PyTorch for your card, in .venv or another Python: make gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
FAST := network fusion loading registration checkpoint checkpoint_* identify errors files tiling timing
RUNTIMES := runtimes exported onnx onnx_int8 ncnn tensorrt spandrel comfyui
# The demo and the page need less than the tests, whose environment serves as well where it is there.
SMALL := .venv/.$(if $(wildcard .venv/.installed),installed,small)
tests_of = $(wildcard $(patsubst %,tests/test_%.py,$(1)))

.PHONY: demo web test test-fast test-slow test-runtimes lint format options bench gpu requirements clean

demo: $(SMALL)
	$(BIN)/python demo/demo.py $(ARGS)

# The page that upscales in the browser, on localhost. make web ARGS="--port 8080"
web: $(SMALL)
	$(BIN)/python demo/serve_web.py $(ARGS)

test: .venv/.installed
	$(PYTEST)

# The network, fusing and loading, in a minute.
test-fast: .venv/.installed
	$(PYTEST) $(call tests_of,$(FAST))

# What takes minutes each, such as a training with every template.
test-slow: .venv/.installed
	$(PYTEST) -m slow

# Our files in other runtimes, spandrel and ComfyUI.
test-runtimes: .venv/.installed
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

bench: .venv/.installed
	$(BIN)/python benchmarks/speed.py $(ARGS)

# What a GPU can do, in four minutes. Needs PyTorch and nothing else.
gpu:
	$(GPU_PYTHON) benchmarks/speed.py --device cuda --output benchmarks/results/gpu.md $(ARGS)

.venv/.installed: requirements.lock requirements-basicsr.txt
	$(PYTHON) -m venv .venv
	$(PIP) --no-deps --require-hashes -r requirements.lock
	$(PIP) torch==2.13.0
	$(PIP) --no-deps --require-hashes --no-build-isolation -r requirements-basicsr.txt
	touch $@

.venv/.small: requirements.lock
	$(PYTHON) -m venv .venv
	grep -oE '^[^ #]+==[^ ]+' $< > .venv/versions
	$(PIP) -c .venv/versions torch==2.13.0 numpy onnx onnxruntime onnxslim pillow pyvips pyvips-binary safetensors \
		scikit-image tqdm
	touch $@

# After changing requirements.txt. Pinned versions stay unless UPGRADE=--upgrade.
requirements: .venv/.installed
	$(PIP) -q uv==0.13.9
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url $(UPGRADE) \
		--custom-compile-command "make requirements" --output-file requirements.lock requirements.txt

clean:
	rm -rf .venv demo_output* build dist *.egg-info
