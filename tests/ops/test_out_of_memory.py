"""What callers see where a GPU's memory does not suffice, with kernels that say so in the compiled operators' place."""

import warnings

import pytest
import torch

from dcn_plugin.ops import deform_conv2d

LACK = "CUDA out of memory. Tried to allocate 20.00 GiB (a tensor of shape (1, 2))"


@pytest.fixture
def replace():
    """replace(operator, message): its kernel raises a RuntimeError of that message."""
    with torch.library._scoped_library("dcn_plugin", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel is registered twice

        def raise_in(operator, message):
            def kernel(*args):
                raise RuntimeError(message)

            library.impl(operator, kernel, "CPU")

        yield raise_in


def tensors(requires_grad=False):
    input, offset, weight = torch.zeros(1, 1, 3, 3), torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 1, 1)
    return input.requires_grad_(requires_grad), offset, weight


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward(replace, mode, requires_grad):
    replace("deform_conv2d", LACK)
    with mode(), pytest.raises(torch.OutOfMemoryError) as caught:
        deform_conv2d(*tensors(requires_grad))
    assert str(caught.value) == LACK


def test_backward(replace):
    output = deform_conv2d(*tensors(requires_grad=True))
    replace("deform_conv2d_backward", LACK)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        output.sum().backward()
    assert str(caught.value) == LACK


# The second is what csrc/tensor.h says where libtorch does not tell which of the two it was.
@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "could not allocate, or convert to, 20 GiB, a tensor of shape (1, 2): the GPU's memory does not suffice, "
        "or an earlier kernel failed",
    ],
)
def test_other_errors_stay(replace, message):
    replace("deform_conv2d", message)
    with pytest.raises(RuntimeError) as caught:
        deform_conv2d(*tensors())
    assert caught.type is RuntimeError
    assert str(caught.value) == message


def test_kernels_are_back():
    assert deform_conv2d(*tensors()).shape == (1, 1, 3, 3)
