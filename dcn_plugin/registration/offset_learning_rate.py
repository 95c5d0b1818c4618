"""``dcn_offset_lr_mult`` of MMEngine's ``paramwise_cfg``, for our layers.

MMEngine looks for an ``nn.Conv2d`` named ``conv_offset`` in a layer of mmcv's, and passes over others without a word.
Our layers are not mmcv's, nor is what predicts their offsets an ``nn.Conv2d``, and they work where there is no mmcv.
"""

import functools

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from dcn_plugin.layers.zero_init import ZeroInitConv2d


def _knows_our_layers(add_params):
    """The method that sorts a module's parameters into groups, shown our offset predictors as if they were mmcv's."""

    @functools.wraps(add_params)
    def add_params_of(self, params, module, prefix="", is_dcn_module=None):
        if isinstance(module, ZeroInitConv2d) and prefix.rpartition(".")[2] == "conv_offset":
            stand_in = nn.Conv2d.__new__(nn.Conv2d)
            stand_in.__dict__ = module.__dict__  # so its parameters are the module's own
            module, is_dcn_module = stand_in, True
        add_params(self, params, module, prefix=prefix, is_dcn_module=is_dcn_module)

    add_params_of.knows_our_layers = True
    return add_params_of


# The method, not a class registered in its place: subclasses, and configs that name the class itself, use it too.
if not hasattr(DefaultOptimWrapperConstructor.add_params, "knows_our_layers"):
    DefaultOptimWrapperConstructor.add_params = _knows_our_layers(DefaultOptimWrapperConstructor.add_params)
