# make setup   .venv with the pinned requirements and the built extensions (does nothing when nothing changed)
# make demo    train, resume, evaluate, convert, score and sample a small SepLLM beside full attention
# make test    set-up and the test suite
# make lint    ruff and mypy
# make test-gpu   what needs a CUDA device
# make bench-gpu  the same, then every benchmark of a CUDA device, saved in benchmarks/results

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
	$(BIN)/python -m pytest -m gpu

# cores ends with status 1 where auto is not the best choice, as on every device that sepllm/attention/measured.py has no row for.
bench-gpu: test-gpu
	-$(BIN)/python -m tools.bench.cores --device cuda --dtype bf16 --cores sdpa fused_triton flex chunked dense --save
	$(BIN)/python -m tools.bench.attention --device cuda --dtype bf16 --seq-lengths 2048 4096 8192 32768 --minutes 6 --save
	$(BIN)/python -m tools.bench.train_step --device cuda --dtype bf16 --arms full reference sepllm fused_triton flex transformers \
		--seq-lengths 2048 8192 32768 --minutes 6 --save
	$(BIN)/python -m tools.bench.profile_step --device cuda --dtype bf16 --arms sepllm full transformers --save

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build runs
