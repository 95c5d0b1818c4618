"""Checkpoints of old mmcv, whose offsets lie beside the layer, load into whatever holds a layer of ours."""

import copy

import pytest
import torch
from torch import nn

from dcn_plugin.layers import DeformConv2dPack, ModulatedDeformConv2dPack

PACKS = pytest.mark.parametrize("pack", [DeformConv2dPack, ModulatedDeformConv2dPack])


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@PACKS
def test_old_checkpoints_load_through_any_parent(pack):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv2 = pack(4, 4, 3, padding=1)

    new = randomised(nn.Sequential(Block(), Block()))
    old = {key.replace("conv2.conv_offset.", "conv2_offset."): value for key, value in new.state_dict().items()}
    assert "1.conv2_offset.bias" in old
    for loader in (nn.Sequential(Block(), Block()), copy.deepcopy(nn.Sequential(Block(), Block()))):
        loader.load_state_dict(old)  # strict
        for key, value in new.state_dict().items():
            assert torch.equal(loader.state_dict()[key], value)
    assert "1.conv2_offset.bias" in old  # the caller's dict is left alone


@PACKS
def test_a_true_sibling_named_like_an_old_offset_stays(pack):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv2 = pack(4, 4, 3)
            self.conv2_offset = nn.Conv2d(4, pack._channels_per_tap * 9, 3)

    state = randomised(Block()).state_dict()
    loaded = Block()
    loaded.load_state_dict(state)
    assert torch.equal(loaded.conv2_offset.weight, state["conv2_offset.weight"])
    partial = {key: value for key, value in state.items() if "conv_offset" not in key}
    assert loaded.load_state_dict(partial, strict=False).missing_keys == [
        "conv2.conv_offset.weight",
        "conv2.conv_offset.bias",
    ]
