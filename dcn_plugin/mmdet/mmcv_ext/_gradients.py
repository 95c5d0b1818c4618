import torch
from torch import Tensor


def gradients(function, inputs: list[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Of ``function(*inputs)`` in all inputs, by autograd: computes the function once more."""
    with torch.enable_grad():
        inputs = [one.detach().requires_grad_() for one in inputs]
        return torch.autograd.grad(function(*inputs), inputs, grad_output)
