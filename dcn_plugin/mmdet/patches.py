"""Changes to the behaviour of MMDetection, a function each; all may be called more than once."""

import functools

import torch
from mmcv.cnn import build_conv_layer
from mmcv.ops.nms import NMSop
from mmdet.models.backbones.resnet import Bottleneck
from torch.nn.modules.utils import _pair


class _ConvUnlessStrided:
    """A type for ``build_conv_layer``: the convolution of config ``conv`` at stride 1, an ``nn.Conv2d`` elsewhere."""

    def __new__(cls, *args, conv: dict, stride=1, **kwargs):
        return build_conv_layer(conv if _pair(stride) == (1, 1) else None, *args, stride=stride, **kwargs)


def fall_back_on_stride() -> None:
    """Makes ``fallback_on_stride=True`` of the key ``dcn`` leave the convolutions of stride 2 plain, and no others.

    In mmdet (all versions up to 3.3.0) each block of a ResNet, or of a backbone derived from it, takes the option out
    of a dict that all blocks share: only the first sees it, and that one falls back whatever its stride. Here every
    block gets a dict of its own, and the convolution decides, which knows its stride.
    """
    init = Bottleneck.__init__
    if hasattr(init, "falls_back"):
        return

    @functools.wraps(init)
    def init_block(self, *args, **kwargs):
        conv = dict(kwargs.get("dcn") or {})
        if conv.pop("fallback_on_stride", False):
            kwargs["dcn"] = dict(type=_ConvUnlessStrided, conv=conv)
        init(self, *args, **kwargs)

    init_block.falls_back = True
    Bottleneck.__init__ = init_block


def suppress_in_bfloat16() -> None:
    """Lets mmcv's non-maximum suppression take bfloat16 boxes, as evaluating under autocast on a CPU makes them.

    mmcv's kernel (all versions up to 2.2.0) has no bfloat16, nor float16 on the CPU. It gets the boxes and scores cast
    to float32 and answers with indices, so that nothing else changes.
    """
    forward = NMSop.forward
    if hasattr(forward, "casts"):
        return

    @functools.wraps(forward)
    def forward_in_float32(ctx, bboxes, scores, *args):
        halves = (torch.bfloat16, torch.float16) if bboxes.device.type == "cpu" else (torch.bfloat16,)
        bboxes, scores = (t.float() if t.dtype in halves else t for t in (bboxes, scores))
        return forward(ctx, bboxes, scores, *args)

    forward_in_float32.casts = True
    NMSop.forward = staticmethod(forward_in_float32)
