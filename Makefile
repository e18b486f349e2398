# `make train` and `make test` set up what they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# What oneDNN, NumPy and Arrow are to do without. TensorFlow's own kernels are built for AVX at most.
AVX2   := ONEDNN_MAX_CPU_ISA=AVX2 NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL AVX512_SPR" ARROW_USER_SIMD_LEVEL=AVX2

.PHONY: setup train test test-avx2 test-slow kill-test gpu-check ui lint bench

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 setup" if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

train: setup  ## Train on drawn pets with two workers: about three minutes on 2 cores
	$(BIN)/python jobs/train.py --data synthetic --image-size 64 --base-filters 16 --batch-size 32 --epochs 15 --num-workers 2

test: setup  ## The suite, about thirteen minutes
	$(BIN)/python -m pytest -q

test-avx2: setup  ## The suite as on a processor without AVX-512, on one that has it
	$(AVX2) $(BIN)/python -m pytest -q -m 'not slow and not kills and not bfloat16'
	TF_ENABLE_ONEDNN_OPTS=0 $(AVX2) $(BIN)/python -m pytest -q -m 'bfloat16 and not slow'

test-slow: setup  ## What takes a minute or more each
	$(BIN)/python -m pytest -q -m slow

kill-test: setup  ## Kills of workers, controller and driver at random times: about half an hour
	$(BIN)/python -m pytest -s -m '' tests/test_kills.py
	UNET_SWEEP_KILLS=3 $(BIN)/python -m pytest -q tests/test_tune.py -k kills_of_the_driver

gpu-check: setup  ## A machine's GPU against its CPU, for a report: about five minutes, no network
	$(BIN)/python benchmarks/gpu_check.py

ui: setup  ## The MLflow UI of the default storage path, on http://127.0.0.1:5000
	uri=$$($(BIN)/python -m unet.tracking.database) && \
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --host 127.0.0.1 --port 5000 --workers 1 --backend-store-uri "$$uri"

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: setup  ## Every speed claim of the README
	$(BIN)/python benchmarks/train_throughput.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/prepare_throughput.py
	$(BIN)/python benchmarks/ingest_throughput.py
	$(BIN)/python benchmarks/stream_memory.py
	$(BIN)/python benchmarks/predict_throughput.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/checkpoint_cost.py
	$(BIN)/python benchmarks/soak.py
