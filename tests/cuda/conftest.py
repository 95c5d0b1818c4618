import os

# Asked for by PyTorch's matrix products under torch.use_deterministic_algorithms; read once, at the first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
