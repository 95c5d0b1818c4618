"""What computes needs torch alone; what draws is imported by those who draw."""

from tests.test_import import run


def test_torch_alone():
    code = """
from dcn_plugin.visualize import receptive_fields, record, sampling_points
from dcn_plugin.layers import DeformConv2dPack
conv = DeformConv2dPack(1, 1, 3, padding=1)
image = torch.rand(1, 1, 8, 8)
[call] = record(conv, image).convolutions
assert len(sampling_points(call, (4, 4)).y) == 9
assert receptive_fields(conv, image, [(call, (4, 4))])[0].count_nonzero() == 9
from dcn_plugin.visualize.statistics import Table
"""
    run(code, missing=("mmengine", "mmcv", "mmdet", "matplotlib", "cv2", "PIL"))
