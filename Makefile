# make setup   .venv with the pinned requirements and the built extensions (does nothing when nothing changed)
# make demo    train, resume, evaluate, convert, score and sample a small SepLLM beside full attention
# make test    set-up and the test suite
# make lint    ruff and mypy
# make test-gpu   what needs a CUDA device
# make bench-gpu  the same, then every benchmark of a CUDA device, saved in benchmarks/results; MINUTES=9: as much as fits, and goes on next time

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/setup-done
export PYTHONPATH := $(CURDIR)

.PHONY: setup demo test test-gpu bench-gpu lint clean

setup: $(SETUP)

$(SETUP): requirements/train.txt requirements/dev.txt requirements/demo.txt requirements/constraints.txt pyproject.toml $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@command -v $${CXX:-c++} >/dev/null || { echo "No C++ compiler found: install one (Debian: apt-get install g++) or set CXX."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/train.txt -r requirements/dev.txt -c requirements/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/demo.txt
	$(BIN)/python -m megatron.data.index_builder
	$(BIN)/python -m sepllm.ops.extension
	@touch $@

demo: setup
	$(BIN)/python -m tools.demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope -m "not slow and not gpu"

test-gpu: setup
	$(BIN)/python -m pytest -n 8 -m gpu

bench-gpu: setup
	$(BIN)/python -m tools.bench.gpu $(if $(MINUTES),--minutes $(MINUTES))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build runs
