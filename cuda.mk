# CUDA targets, included by the Makefile.
.PHONY: cuda wheel gpu-check

OUT ?= build/gpu-check
CUDA_BUILD := build/cuda

cuda: setup  ## compile the CUDA operators (needs nvcc, no GPU) and list registers; a spill is an error
	DCN_PLUGIN_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace --build-temp $(CUDA_BUILD)
	$(BIN)/python tools/ptxas_report.py $(CUDA_BUILD) --no-spills

wheel: setup  ## make one wheel of the CPU and CUDA operators, for every Python and PyTorch >= 2.10
	DCN_PLUGIN_CUDA=1 $(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

gpu-check:  ## on a machine with an NVIDIA GPU and nvcc: build, test and measure; python3 needs torch alone (OUT=folder)
	python3 tools/gpu_check.py $(OUT)
