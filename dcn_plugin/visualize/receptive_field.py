"""The effective receptive field of an output position of a deformable convolution."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dcn_plugin import ops

from .recording import Convolution, uncompiled

Place = tuple[Convolution, tuple[int, int]]


class _Reached(Exception):
    """All outputs that were asked for are there: the rest of the model need not run."""


class _Outputs(TorchFunctionMode):
    """Keeps the outputs of the calls of deform_conv2d with these indices, and takes the offsets away if asked."""

    def __init__(self, indices: set[int], straight: bool):
        super().__init__()
        self.indices, self.straight = indices, straight
        self.calls = 0
        self.outputs: dict[int, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not ops.deform_conv2d:
            return func(*args, **kwargs)
        given = dict(zip(("input", "offset", "weight"), args, strict=False))
        kwargs = kwargs | given
        kwargs["weight"] = kwargs["weight"].detach()  # nobody wants its gradient, which the operator would compute
        if self.straight:
            kwargs["offset"] = torch.zeros_like(kwargs["offset"])
        args = (*(kwargs.pop(name) for name in given), *args[len(given) :])
        output = func(*args, **kwargs)
        if self.calls in self.indices:
            self.outputs[self.calls] = output
            if len(self.outputs) == len(self.indices):
                raise _Reached
        self.calls += 1
        return output


def receptive_fields(
    forward: Callable[[Tensor], Any], image: Tensor, places: list[Place], straight: bool = False
) -> list[Tensor]:
    """What in an image reaches output positions, and how strongly: `Understanding the Effective Receptive Field in Deep
    Convolutional Neural Networks <https://arxiv.org/abs/1701.04128>`_.

    It is the gradient of the position's output, summed over its channels, with respect to the image: its absolute
    value, summed over the image's channels.

    Args:
        forward: the model, called with the image as it was recorded.
        image: (1, C, H, W).
        places: calls of a recording of this model and image, and positions (i, j) in their outputs.
        straight: all deformable convolutions sample straight, with offsets 0; masks stay.

    Returns:
        (H, W) for each place, float32 on the CPU.
    """
    if not places:
        return []
    image = image.detach().clone().requires_grad_()
    reached = _Outputs({convolution.index for convolution, _ in places}, straight)
    with uncompiled(), torch.enable_grad(), reached:
        try:
            forward(image)
        except _Reached:
            pass
        else:
            raise ValueError("the model did not run the convolutions that were recorded")
        fields = []
        for convolution, (i, j) in places:
            feature = reached.outputs[convolution.index][0, :, i, j].float().sum()
            [gradient] = torch.autograd.grad(feature, image, retain_graph=True)
            fields.append(gradient[0].abs().sum(0).float().cpu())
    return fields
