# `make help` lists the targets. Each makes .venv if it is missing.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
EXAMPLES_INSTALLED := $(VENV)/.installed-examples
ECOSYSTEM_INSTALLED := $(VENV)/.installed-ecosystem
DISTRIBUTED_INSTALLED := $(VENV)/.installed-distributed
VLLM_INSTALLED := $(VENV)-vllm/.installed
CANDIDATES := python3 python3.13 python3.12 python3.11
# The first Python on the path that is new enough; used only to make the virtual environment.
HOST_PYTHON = $(shell for python in $(CANDIDATES); do \
	$$python -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
export HF_HUB_OFFLINE := 1

.PHONY: help quickstart test test-slow test-faults test-ecosystem test-distributed test-vllm test-package test-versions test-mixins lint format install clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# Without the packages of the tests, so that it starts sooner.
quickstart: $(if $(wildcard $(INSTALLED)),$(INSTALLED),$(EXAMPLES_INSTALLED)) ## Compare heads on SmolLM2-135M in a few minutes; downloads 93 MB, with TINY=1 nothing
	$(PYTHON) examples/quickstart/compare_heads.py $(if $(TINY),--tiny)

# One thread in each of a few workers: the models are tiny, and more threads make them slower. A file stays with one
# worker, so that what its tests share is made once.
test: install ## Run the quick tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile

# What takes long, once each, but for the wheel in an empty environment: test-package.
test-slow: install ## Run the tests that are marked slow
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 4 -m slow --ignore tests/test_package.py

# What a kill at every write, a broken file, a loss that is not finite and a component without weight do.
test-faults: install ## Kill saves, break checkpoints, drive losses to infinity, take a component's weight
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 4 -m 'slow or not slow' tests/faults

# The tools that people use with a model: command line, Hub, servers, evaluation, adapters, trackers.
test-ecosystem: $(ECOSYSTEM_INSTALLED) ## Test the clients: command line, Hub, servers, evaluation, adapters, trackers
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile tests/ecosystem tests/test_zero_start.py

# Two processes on this machine: DDP, FSDP2, tensor parallelism, DeepSpeed, conversion of what does not fit twice.
test-distributed: $(DISTRIBUTED_INSTALLED) ## Test two processes: DDP, FSDP2, tensor parallelism, DeepSpeed
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/distributed

# vLLM's release for the CPU. Its environment is another, as it takes other releases of transformers.
test-vllm: $(VLLM_INSTALLED) ## Test serving by vLLM on the CPU
	$(<D)/bin/python -m pytest tests/vllm_plugin

# The wheel with its dependencies in an empty environment. Needs the package index.
test-package: install ## Install the wheel in an empty environment and test it
	$(PYTHON) -m pytest -m slow tests/test_package.py

# The suite on the oldest and the newest transformers, and checkpoints from one to the other. Needs the package index.
test-versions: ## Run the tests on the oldest and the newest transformers
	tests/run_versions.sh

# transformers' own model tests, out of its source distribution. Needs the package index.
test-mixins: install ## Run transformers' own model tests
	version=$$($(PYTHON) -c 'import transformers; print(transformers.__version__)') && \
	$(PYTHON) -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation -d build/transformers \
		transformers==$$version && \
	OMP_NUM_THREADS=1 $(PYTHON) tests/run_transformers_mixins.py build/transformers/transformers-$$version.tar.gz

lint: install ## Run ruff and mypy
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m ruff check
	$(PYTHON) -m mypy

format: install ## Format the code
	$(PYTHON) -m ruff format
	$(PYTHON) -m ruff check --fix

install: $(INSTALLED) ## Make the virtual environment

# The stamp is written last, so an interrupted installation is taken up again.
$(INSTALLED) $(EXAMPLES_INSTALLED): pyproject.toml constraints.txt
	@test -n "$(HOST_PYTHON)" || { echo "expected Python 3.11 or later with venv, found none of: $(CANDIDATES)"; exit 1; }
	$(PYTHON) -m pip --version >/dev/null 2>&1 || $(HOST_PYTHON) -m venv --clear $(VENV)
	$(PYTHON) -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(if $(filter $@,$(INSTALLED)),dev,examples)]'
	touch $@

$(ECOSYSTEM_INSTALLED): $(INSTALLED)
	$(PYTHON) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,ecosystem]'
	touch $@

$(DISTRIBUTED_INSTALLED): $(INSTALLED)
	DS_BUILD_OPS=0 $(PYTHON) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,distributed]'
	touch $@

$(VLLM_INSTALLED): pyproject.toml tests/vllm_plugin/requirements.txt
	$(HOST_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --no-deps -r tests/vllm_plugin/requirements.txt -e .
	touch $@

clean: ## Delete environments and outputs
	rm -rf $(VENV) $(VENV)-vllm build dist *.egg-info quickstart-out quickstart-model
