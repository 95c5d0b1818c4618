# `make` lists the targets.
VENV := .venv
BIN := $(VENV)/bin
CONFIG := configs/digits/fcos_r50-dcnv2-c3-c5_digits.py
WORK_DIR := work_dirs/digits

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## create .venv with pinned dependencies and build the package (about 10 minutes, once)
	@tools/setup_env.sh

demo: setup  ## train and test a deformable detector on handwritten digits (under 10 minutes; FORCE=1 trains again)
	@$(BIN)/python projects/digits/demo.py --config $(CONFIG) --work-dir $(WORK_DIR) $(if $(FORCE),--force)

test: setup lint  ## run lint and the test-suite
	$(BIN)/python -m pytest

lint: setup  ## run the linters over all files
	$(BIN)/python -m pre_commit run --all-files

format: lint  ## as lint: the linters fix what they can

bench: setup  ## time operators and a detector beside their peers (20 minutes; ARGS="--quick": one)
	$(BIN)/python -m benchmarks $(ARGS)

clean:  ## remove what was built; data, trained models and .venv stay
	rm -rf build dist *.egg-info dcn_plugin/_*.so $(VENV)/stamps/package

-include cuda.mk
