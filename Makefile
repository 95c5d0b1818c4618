# `make` lists the targets.
VENV := .venv
BIN := $(VENV)/bin
CONFIG := configs/digits/fcos_r18-dcnv2_deformed-digits.py
WORK_DIR := work_dirs/digits
MMCV ?= lite
MINUTES ?= 10
CUDA_BUILD := build/cuda
OUT ?= build/gpu-check
CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

export OMP_WAIT_POLICY := passive # with a busy neighbour, threads that spin are up to 30 times slower

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo scaled-digits test fuzz lint format docs bench cuda sdist wheel matrix fork gpu-check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## create .venv with pinned dependencies and build the package (2 minutes, once; MMCV=full compiles mmcv: 10)
	@MMCV=$(MMCV) tools/setup_env.sh

setup-dev:  ## the same and what lint, docs and wheel need
	@MMCV=$(MMCV) tools/setup_env.sh dev

demo: setup  ## train and test a deformable detector on handwritten digits (under 10 minutes; FORCE=1: again; VERBOSE=1: all output)
	@$(BIN)/python projects/digits/demo.py --config $(CONFIG) --work-dir $(WORK_DIR) $(if $(FORCE),--force) $(if $(VERBOSE),--verbose)

scaled-digits: setup  ## train nothing but offsets, for digits of other sizes (under 10 minutes)
	$(BIN)/python projects/scaled_digits/experiment.py

test: lint docs  ## check style, types, links, and run the tests (MMCV=full: also those that compare with mmcv's operators)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 20 $(ARGS)

fuzz: setup  ## compare random cases with the reference, new ones each time (MINUTES=10)
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

lint: setup-dev  ## check all files; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/codespell
	! git grep -nIE '[[:space:]]+$$' -- ':!*.svg'
	$(BIN)/mypy
	$(BIN)/zizmor --offline --quiet --no-progress .github/workflows

format: setup-dev  ## change files to what lint wants, where a program can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

docs: setup-dev  ## make the site of docs/ and the docstrings, in build/site; a broken link is an error
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/site

bench: setup  ## time operators and a detector beside their peers (20 minutes; ARGS="--quick": one)
	$(BIN)/python -m benchmarks $(ARGS)

cuda: setup  ## compile the CUDA operators (needs nvcc, no GPU) and list registers; a spill is an error
	DCN_PLUGIN_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace --build-temp $(CUDA_BUILD)
	$(BIN)/python tools/ptxas_report.py $(CUDA_BUILD) --no-spills

sdist: setup-dev  ## make the source distribution, in dist/
	$(BIN)/python -m build --sdist --no-isolation

wheel: setup-dev  ## make one wheel of the CPU and CUDA operators, for every Python and PyTorch >= 2.10, in dist/
	tools/make_wheel.sh

matrix: setup  ## run the operators' tests with one wheel on other versions of PyTorch (an hour; VERSIONS="2.10.0 2.15.0")
	$(BIN)/python tools/matrix.py $(VERSIONS) $(ARGS)

fork: setup  ## run the tests with the living fork of MMDetection: onedl-mmdetection (10 minutes)
	$(BIN)/python tools/matrix.py fork $(ARGS)

gpu-check:  ## on a machine with an NVIDIA GPU and nvcc: build, test and measure; python3 needs torch alone (OUT=folder)
	python3 tools/gpu_check.py $(OUT)

clean:  ## remove what was built; data, trained models and .venv stay
	rm -rf build dist *.egg-info dcn_plugin/_*.so $(VENV)/stamps/package
