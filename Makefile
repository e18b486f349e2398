# `make train` and `make test` set up what they need.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# What oneDNN, NumPy and Arrow are to do without. TensorFlow's own kernels are built for AVX at most.
AVX2   := ONEDNN_MAX_CPU_ISA=AVX2 NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL AVX512_SPR" ARROW_USER_SIMD_LEVEL=AVX2

# Versions beside those of requirements.txt with which the project runs: of Ray every older minor version, of the others
# the oldest. Each has an environment that lies over $(VENV): what it does not hold itself it takes from there.
RAYS     := ray-2.57 ray-2.58 ray-2.59
OTHERS   := tensorflow-2.20 mlflow-3.16
VERSIONS ?= $(VENV)/versions

# What the tests of clusters start beside Ray; they skip what is missing, with the reason. npm brings Azurite.
DEBIAN := postgresql openssh-server rsync iproute2 ceph-mon ceph-mgr ceph-osd radosgw ceph-common prometheus
AZURITE := azurite@3.35.0

.PHONY: setup requirements train test test-avx2 test-slow test-cluster test-ray test-versions $(RAYS:%=test-%) $(OTHERS:%=test-%) kill-test golden gpu-check ui doctor lint types bench

setup: $(STAMP)  ## The virtual environment: every package in the version and with the hash of requirements.txt

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 setup" if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)'
	@echo "Installing TensorFlow, Ray, MLflow and what they need into $(VENV): $$(grep '^[a-z0-9].*==' requirements.txt | grep -vc win32) packages, 1 GB to download, 3.5 GB on disk, two to five minutes."
	@$(PYTHON) -m venv $(VENV)
	@set -o pipefail; $(BIN)/pip install --disable-pip-version-check --progress-bar off --require-hashes -r requirements.txt | \
		sed -u -n -e 's#^\(Collecting\|Processing\) \([^ ]*/\)\?\([^ ]*\).*#  \3#p' -e 's/^Installing collected.*/All downloaded. Unpacking takes a minute or two, without output./p'
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@
	@echo "Done. Next: make train, make test, or $(BIN)/unet-train --help."

requirements: setup  ## requirements.txt anew from pyproject.toml. Pins stay; UPGRADE=--upgrade or UPGRADE=--upgrade-package=NAME moves them
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --strip-extras --no-annotate --extra test \
		--custom-compile-command "make requirements" $(UPGRADE) --output-file requirements.txt pyproject.toml

train: setup  ## Train on drawn pets with two workers, for three minutes on any machine
	$(BIN)/python jobs/train.py --data synthetic --image-size 64 --minutes 3 --num-workers 2

test: setup  ## The suite, about fourteen minutes
	$(BIN)/python -m pytest -q

test-avx2: setup  ## The suite as on a processor without AVX-512, on one that has it
	$(AVX2) $(BIN)/python -m pytest -q -m 'not slow and not kills and not cluster and not bfloat16'
	TF_ENABLE_ONEDNN_OPTS=0 $(AVX2) $(BIN)/python -m pytest -q -m 'bfloat16 and not slow and not cluster'

test-slow: setup  ## The tests that take a minute or more each
	$(BIN)/python -m pytest -q -m slow

test-cluster: setup  ## Several hosts in namespaces of this machine, and servers beside a cluster: parts need root and say so
	@$(BIN)/python -c "import cfnlint, grafana_foundation_sdk, kubernetes_validate, psycopg2, flask_wtf, gcp_storage_emulator" 2> /dev/null || \
		$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[cluster]"
	@[ $$(id -u) != 0 ] || ! command -v apt-get > /dev/null || dpkg -s $(DEBIAN) > /dev/null 2>&1 || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(DEBIAN); }
	@! command -v npm > /dev/null || [ -x $(BIN)/azurite-blob ] || \
		npm install --global --silent --no-fund --no-audit --prefix $(VENV) $(AZURITE)
	$(BIN)/python -m pytest -q -m cluster

test-ray: $(RAYS:%=test-%)  ## What another Ray may break, with each older one that is taken: some minutes and 0.25 GB a version

test-versions: test-ray $(OTHERS:%=test-%)  ## The same, and with the oldest TensorFlow and MLflow

$(RAYS:%=test-%) $(OTHERS:%=test-%): test-%: $(VERSIONS)/%/.installed
	@echo "With $*:"
	$(VERSIONS)/$*/bin/python -m pytest -q -m versions

$(VERSIONS)/%/.installed: $(STAMP)
	@echo "Installing $* over $(VENV), into $(@D)."
	@rm -rf $(@D) && $(BIN)/python -m venv --without-pip $(@D)
	@$(BIN)/python -c 'import sys, sysconfig; print(f"import site; site.addsitedir({sysconfig.get_path(sys.argv[1])!r})")' purelib \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test]" "$(subst -,==,$*).*"
	@touch $@

kill-test: setup  ## Kills workers, controllers and drivers at random moments: about half an hour
	$(BIN)/python -m pytest -s -m '' tests/test_kills.py
	UNET_SWEEP_KILLS=3 $(BIN)/python -m pytest -q tests/test_tune.py -k kills_of_the_driver

golden: setup  ## Digests of short trainings beside the recorded ones: a change that may move no number leaves them
	$(BIN)/python benchmarks/golden.py

gpu-check: setup  ## A machine's GPU against its CPU, for a report: about five minutes, no network
	$(BIN)/python benchmarks/gpu_check.py

ui: setup  ## The MLflow UI of the default storage path, on http://127.0.0.1:5000
	@echo "Look at http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
	uri=$$($(BIN)/python -m unet.tracking.database) && \
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --host 127.0.0.1 --port 5000 --workers 1 --backend-store-uri "$$uri"

doctor: setup  ## This machine, or the cluster of RAY_ADDRESS, before a run: what to put right
	$(BIN)/python jobs/doctor.py

lint: setup  ## Style and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup  ## The type checker, about twenty seconds
	$(BIN)/mypy

bench: setup  ## Every speed claim of docs/performance.md
	$(BIN)/python benchmarks/train_throughput.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/prepare_throughput.py
	$(BIN)/python benchmarks/ingest_throughput.py
	$(BIN)/python benchmarks/stream_memory.py
	$(BIN)/python benchmarks/predict_throughput.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/checkpoint_cost.py
	$(BIN)/python benchmarks/soak.py
