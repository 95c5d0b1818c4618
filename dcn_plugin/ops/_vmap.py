"""Rules of ``torch.vmap``: what is mapped over joins an axis that the operators have anyway, so nothing loops."""

import torch
from torch import Tensor

from ._library import NAMESPACE

OPERATORS = getattr(torch.ops, NAMESPACE)


def _fold(tensor: Tensor | None, dim: int | None, size: int, axis: int = 0) -> Tensor | None:
    """Joins the mapped dimension, which an unmapped tensor gets by repetition, with ``axis``, of which it is major."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(axis).expand(*tensor.shape[:axis], size, *tensor.shape[axis:])
    else:
        tensor = tensor.movedim(dim, axis)
    return tensor.flatten(axis, axis + 1)


def _unfold(tensor: Tensor, size: int, axis: int = 0) -> Tensor:
    return tensor.unflatten(axis, (size, tensor.shape[axis] // size))


def _unfold_all(tensors: tuple[Tensor, ...], needed: tuple[bool, ...], size: int, axes: tuple[int, ...]):
    """A backward's answer: what was not needed is empty, and not mapped over."""
    answer = [_unfold(t, size, a) if need else t for t, need, a in zip(tensors, needed, axes, strict=True)]
    return tuple(answer), tuple(axis if need else None for need, axis in zip(needed, axes, strict=True))


@torch.library.register_vmap(f"{NAMESPACE}::deform_conv2d")
def _deform_conv2d(info, in_dims, input, offset, weight, bias, mask, *options):
    """Without mapped weights, into the batch; with them, into groups, which follow from the shapes."""
    size = info.batch_size
    of_input, of_offset, of_weight, of_bias, of_mask = in_dims[:5]
    if of_weight is None:
        samples = [_fold(t, d, size) for t, d in ((input, of_input), (offset, of_offset), (mask, of_mask))]
        own = None if of_bias is not None else bias
        output = _unfold(OPERATORS.deform_conv2d(*samples[:2], weight, own, samples[2], *options), size)
        if of_bias is not None:
            output = output + bias.movedim(of_bias, 0)[:, None, :, None, None]
        return output, 0
    bias = _fold(bias, of_bias, size)
    one_group = input.shape[1] == weight.movedim(of_weight, 0).shape[2]
    if not (of_input is of_offset is of_mask is None and one_group):
        input, offset, mask = (
            _fold(t, d, size, axis=1) for t, d in ((input, of_input), (offset, of_offset), (mask, of_mask))
        )
    output = OPERATORS.deform_conv2d(input, offset, _fold(weight, of_weight, size), bias, mask, *options)
    return _unfold(output, size, axis=1), 1


@torch.library.register_vmap(f"{NAMESPACE}::deform_conv2d_backward")
def _deform_conv2d_backward(info, in_dims, grad_output, input, offset, weight, mask, *options):
    size = info.batch_size
    need_input, need_sampling, need_weight = options[3:6]
    into_groups = in_dims[3] is not None or need_weight
    axis = 1 if into_groups else 0
    tensors = [_fold(t, d, size, axis) for t, d in zip((grad_output, input, offset), in_dims, strict=False)]
    weight = _fold(weight, in_dims[3], size) if into_groups else weight
    gradients = OPERATORS.deform_conv2d_backward(*tensors, weight, _fold(mask, in_dims[4], size, axis), *options)
    needed = need_input, need_sampling, need_sampling and mask is not None, need_weight
    return _unfold_all(gradients, needed, size, (axis, axis, axis, 0))


def _fold_rois(rois: Tensor, dim: int | None, size: int, images: int) -> Tensor:
    """RoIs whose images are folded too, ``images`` for each of ``size``; a RoI of no image stays one."""
    rois = rois.unsqueeze(0).expand(size, *rois.shape) if dim is None else rois.movedim(dim, 0)
    rois = rois if rois.dtype == torch.float64 else rois.float()  # float16 cannot count the images
    image = rois[..., :1]
    moved = image + images * torch.arange(size, device=rois.device)[:, None, None]
    moved = moved.where(image.isnan() | (image >= 0) & (image < images), -1)
    return torch.cat([moved, rois[..., 1:]], -1).flatten(0, 1)


def _fold_roi_arguments(size, fold_input, in_dims, input, rois, others):
    of_input, of_rois, *of_others = in_dims
    if fold_input:
        input = _fold(input, of_input, size)
        rois = _fold_rois(rois, of_rois, size, len(input) // size)
    else:
        rois = _fold(rois, of_rois, size)
    return input, rois, [_fold(t, d, size) for t, d in zip(others, of_others, strict=True)]


def _register_rois(operator: str, tensors: int) -> None:
    """The rules of a RoI operator with so many tensors after input and rois: what is mapped over becomes more RoIs."""
    forward, backward = getattr(OPERATORS, operator), getattr(OPERATORS, f"{operator}_backward")

    @torch.library.register_vmap(f"{NAMESPACE}::{operator}")
    def rule(info, in_dims, input, rois, *rest):
        dims, others, options = in_dims[: 2 + tensors], rest[:tensors], rest[tensors:]
        fold_input = dims[0] is not None
        input, rois, others = _fold_roi_arguments(info.batch_size, fold_input, dims, input, rois, others)
        return _unfold(forward(input, rois, *others, *options), info.batch_size), 0

    @torch.library.register_vmap(f"{NAMESPACE}::{operator}_backward")
    def backward_rule(info, in_dims, grad_output, input, rois, *rest):
        size, dims, others, options = info.batch_size, in_dims[1 : 3 + tensors], rest[:tensors], rest[tensors:]
        names = [argument.name for argument in backward.default._schema.arguments[3 + tensors :]]
        need_input, need_others = (options[i] for i, name in enumerate(names) if name.startswith("need_"))
        fold_input = dims[0] is not None or need_input
        input, rois, folded = _fold_roi_arguments(size, fold_input, dims, input, rois, others)
        gradients = backward(_fold(grad_output, in_dims[0], size), input, rois, *folded, *options)
        needed = need_input, *(need_others and other is not None for other in others)
        return _unfold_all(gradients, needed, size, (0,) * len(needed))


_register_rois("deform_roi_align", tensors=2)
_register_rois("deform_ps_roi_pool", tensors=1)


def _fold_attention(size, in_dims, value, spatial_shapes, *sampling):
    """Into the batch, which every tensor has."""
    of_value, of_shapes, *of_sampling = in_dims
    if of_shapes is not None:
        raise NotImplementedError("ms_deform_attn: spatial_shapes cannot be mapped over, since it sizes the maps")
    sampling = [_fold(t, d, size) for t, d in zip(sampling, of_sampling, strict=True)]
    return _fold(value, of_value, size), spatial_shapes, *sampling


@torch.library.register_vmap(f"{NAMESPACE}::ms_deform_attn")
def _ms_deform_attn(info, in_dims, *tensors):
    size = info.batch_size
    return _unfold(OPERATORS.ms_deform_attn(*_fold_attention(size, in_dims, *tensors)), size), 0


@torch.library.register_vmap(f"{NAMESPACE}::ms_deform_attn_backward")
def _ms_deform_attn_backward(info, in_dims, grad_output, *rest):
    size, tensors, options = info.batch_size, rest[:4], rest[4:]
    need_value, need_sampling, *_ = options
    folded = _fold_attention(size, in_dims[1:5], *tensors)
    gradients = OPERATORS.ms_deform_attn_backward(_fold(grad_output, in_dims[0], size), *folded, *options)
    return _unfold_all(gradients, (need_value, need_sampling, need_sampling), size, (0, 0, 0))
