"""``fallback_on_stride=True`` of the key ``dcn`` in MMDetection's ResNet and the backbones derived from it.

It says that convolutions of stride 2 stay plain. But each block takes it out of a dict that all blocks share, so that
only the first sees it, and that one falls back whatever its stride. Here every block gets a dict of its own, and the
convolution decides, which knows its stride.
"""

import functools

from mmcv.cnn import build_conv_layer
from mmdet.models.backbones.resnet import Bottleneck  # the blocks of the others are its subclasses
from mmengine.registry import MODELS
from torch.nn.modules.utils import _pair


@MODELS.register_module("ConvUnlessStrided", force=True)
def conv_unless_strided(*args, conv: dict, stride=1, **kwargs):
    """The convolution of config ``conv`` where the stride is 1, and an ``nn.Conv2d`` elsewhere."""
    return build_conv_layer(conv if _pair(stride) == (1, 1) else None, *args, stride=stride, **kwargs)


def _falls_back(init):
    @functools.wraps(init)
    def init_block(self, *args, **kwargs):
        conv = dict(kwargs.get("dcn") or {})
        if conv.pop("fallback_on_stride", False):
            kwargs["dcn"] = dict(type="ConvUnlessStrided", conv=conv)
        init(self, *args, **kwargs)

    init_block.falls_back = True
    return init_block


if not hasattr(Bottleneck.__init__, "falls_back"):
    Bottleneck.__init__ = _falls_back(Bottleneck.__init__)
