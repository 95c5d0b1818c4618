"""Models that compute what detectron2 documents, in its names, against the mmdet models that they are converted for."""

import pickle

import numpy as np
import pytest
import torch
from mmdet.models.task_modules import AnchorGenerator
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn import functional as F

import dcn_plugin.mmdet  # noqa: F401
from dcn_plugin.commands.convert_checkpoint import convert_checkpoint
from dcn_plugin.ops import reference

from .conftest import assert_loads, assert_same, convert, randomised

BLOCKS = (3, 4, 6, 3)


class Conv(nn.Conv2d):
    """A convolution that holds its norm."""

    def __init__(self, *arguments, norm=nn.BatchNorm2d, **options):
        super().__init__(*arguments, bias=norm is None, **options)
        self.norm = norm and norm(self.out_channels)

    def forward(self, x):
        x = super().forward(x)
        return self.norm(x) if self.norm else x


class DeformConv(Conv):
    def forward(self, x, offset, mask=None):
        x = reference.deform_conv2d(x, offset, self.weight, None, self.stride, self.padding, self.dilation, mask)
        return self.norm(x)


class Bottleneck(nn.Module):
    def __init__(self, channels, out, middle, stride, stride_in_1x1, deform=None, groups=1):
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = Conv(channels, out, 1, stride) if channels != out else None
        self.conv1 = Conv(channels, middle, 1, first)
        self.deform = deform
        if deform:
            self.conv2_offset = Conv(middle, {"v1": 18, "v2": 27}[deform] * groups, 3, second, 1, norm=None)
        self.conv2 = (DeformConv if deform else Conv)(middle, middle, 3, second, 1)
        self.conv3 = Conv(middle, out, 1)

    def forward(self, x):
        out = self.conv1(x).relu()
        if self.deform == "v2":
            first, second, mask = self.conv2_offset(out).chunk(3, dim=1)
            out = self.conv2(out, torch.cat((first, second), dim=1), mask.sigmoid())
        else:
            out = self.conv2(out, self.conv2_offset(out)) if self.deform else self.conv2(out)
        return (self.conv3(out.relu()) + (self.shortcut(x) if self.shortcut else x)).relu()


class ResNet(nn.Module):
    def __init__(self, stride_in_1x1=True, deform="v2", groups=1, num_classes=None):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = Conv(3, 8, 7, 2, 3)
        channels = 8
        for i, count in enumerate(BLOCKS):
            blocks = []
            for j in range(count):
                stride = 2 if i and not j else 1
                kind = deform if i else None
                blocks.append(Bottleneck(channels, 32 << i, 8 << i, stride, stride_in_1x1, kind, groups))
                channels = 32 << i
            self.add_module(f"res{i + 2}", nn.Sequential(*blocks))
        if num_classes:
            self.linear = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = F.max_pool2d(self.stem.conv1(x).relu(), 3, 2, 1)
        outs = []
        for i in range(4):
            outs.append(x := getattr(self, f"res{i + 2}")(x))
        return outs


def tree(**children):
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, tree(**child) if isinstance(child, dict) else child)
    return module


def mmdet_resnet(style, deform=None, groups=1):
    kind = {None: None, "v1": "DCN", "v2": "DCNv2"}[deform]
    return dict(
        type="ResNet",
        depth=50,
        base_channels=8,
        stem_channels=8,
        style=style,
        dcn=kind and dict(type=kind, deform_groups=groups),
        stage_with_dcn=(False, *[kind is not None] * 3),
    )


def built(config):
    init_default_scope("mmdet")
    return MODELS.build(ConfigDict(config))


@pytest.mark.parametrize("deform, groups", [(None, 1), ("v1", 1), ("v1", 2), ("v2", 1), ("v2", 2)])
def test_resnet(deform, groups, tmp_path):
    style = "pytorch" if groups == 2 else "caffe"
    source = randomised(ResNet(style == "caffe", deform, groups, num_classes=10))
    state, text = convert(source, tmp_path)
    target = assert_loads(built(mmdet_resnet(style, deform, groups)), state)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected = source(x)
    assert_same(target(x), expected)
    assert "left out, 2: linear.weight, linear.bias" in text
    if deform:
        assert "deformable, 13, DCN" in text and "layer2.0.conv2, layer2.1.conv2" in text
        assert ("mask_scale=1" in text) == (deform == "v2")
        with torch.no_grad():  # the offsets matter to the output
            target.layer3[0].conv2.conv_offset.bias += 0.5
        assert not torch.allclose(target(x)[-1], expected[-1])
    else:
        assert "deformable, 0" in text


def mask_rcnn_source():
    box = dict(fc1=nn.Linear(8 * 49, 16), fc2=nn.Linear(16, 16))
    mask = {f"mask_fcn{i + 1}": Conv(8, 8, 3, padding=1, norm=None) for i in range(4)}
    mask |= dict(deconv=nn.ConvTranspose2d(8, 8, 2, 2), predictor=nn.Conv2d(8, 3, 1))
    rpn = dict(conv=nn.Conv2d(8, 8, 3, padding=1))
    rpn |= dict(objectness_logits=nn.Conv2d(8, 3, 1), anchor_deltas=nn.Conv2d(8, 12, 1))
    fpn = {f"fpn_lateral{i + 2}": nn.Conv2d(32 << i, 8, 1) for i in range(4)}
    fpn |= {f"fpn_output{i + 2}": nn.Conv2d(8, 8, 3, padding=1) for i in range(4)}
    source = tree(
        backbone=dict(bottom_up=ResNet(), **fpn),
        proposal_generator=dict(rpn_head=rpn),
        roi_heads=dict(
            box_head=box,
            box_predictor=dict(cls_score=nn.Linear(16, 4), bbox_pred=nn.Linear(16, 12)),
            mask_head=mask,
        ),
    )
    return source


def mask_rcnn_target():
    roi_extractor = dict(
        type="SingleRoIExtractor",
        roi_layer=dict(type="RoIAlign", output_size=7),
        out_channels=8,
        featmap_strides=[4, 8, 16, 32],
    )
    config = dict(
        type="MaskRCNN",
        train_cfg=None,
        test_cfg=dict(rpn=None, rcnn=None),
        backbone=mmdet_resnet("caffe", "v2"),
        neck=dict(type="FPN", in_channels=[32, 64, 128, 256], out_channels=8, num_outs=5),
        rpn_head=dict(
            type="RPNHead",
            in_channels=8,
            feat_channels=8,
            anchor_generator=dict(type="AnchorGenerator", scales=[8], ratios=[0.5, 1, 2], strides=[4, 8, 16, 32, 64]),
        ),
        roi_head=dict(
            type="StandardRoIHead",
            bbox_roi_extractor=roi_extractor,
            mask_roi_extractor=roi_extractor,
            bbox_head=dict(type="Shared2FCBBoxHead", in_channels=8, fc_out_channels=16, num_classes=3),
            mask_head=dict(type="FCNMaskHead", in_channels=8, conv_out_channels=8, num_classes=3),
        ),
    )
    return built(config)


def test_mask_rcnn(tmp_path):
    source = randomised(mask_rcnn_source())
    source.register_buffer("pixel_mean", torch.tensor([1.0, 2.0, 3.0])[:, None, None])
    source.register_buffer("pixel_std", torch.ones(3, 1, 1))
    state, text = convert(source, tmp_path)
    target = assert_loads(mask_rcnn_target(), state)
    assert "PIXEL_MEAN is 1, 2, 3, its PIXEL_STD 1, 1, 1" in text

    x, body = torch.randn(1, 3, 64, 64, dtype=torch.float64), source.backbone
    tops = body.bottom_up(x)
    levels, above = [], None
    for i in reversed(range(4)):
        lateral = getattr(body, f"fpn_lateral{i + 2}")(tops[i])
        above = lateral if above is None else lateral + F.interpolate(above, scale_factor=2, mode="nearest")
        levels.insert(0, getattr(body, f"fpn_output{i + 2}")(above))
    levels.append(F.max_pool2d(levels[-1], 1, 2))
    maps = target.neck(target.backbone(x))
    assert_same(maps, levels)

    rpn = source.proposal_generator.rpn_head
    hidden = [rpn.conv(level).relu() for level in levels]
    scores, boxes = target.rpn_head(maps)
    assert_same(scores, [rpn.objectness_logits(one) for one in hidden])
    assert_same(boxes, [rpn.anchor_deltas(one) for one in hidden])

    pooled, heads = torch.randn(5, 8, 7, 7, dtype=torch.float64), source.roi_heads
    flat = heads.box_head.fc2(heads.box_head.fc1(pooled.flatten(1)).relu()).relu()
    expected = [heads.box_predictor.cls_score(flat), heads.box_predictor.bbox_pred(flat)]
    assert_same(target.roi_head.bbox_head(pooled), expected)

    hidden, mask = pooled, heads.mask_head
    for i in range(4):
        hidden = getattr(mask, f"mask_fcn{i + 1}")(hidden).relu()
    assert_same([target.roi_head.mask_head(pooled)], [mask.predictor(mask.deconv(hidden).relu())])


def test_retinanet(tmp_path):
    def tower():
        layers = [layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
        return nn.Sequential(*layers)

    head = dict(
        cls_subnet=tower(),
        bbox_subnet=tower(),
        cls_score=nn.Conv2d(8, 9 * 3, 3, padding=1),
        bbox_pred=nn.Conv2d(8, 9 * 4, 3, padding=1),
    )
    fpn = {f"fpn_lateral{i + 3}": nn.Conv2d(64 << i, 8, 1) for i in range(3)}
    fpn |= {f"fpn_output{i + 3}": nn.Conv2d(8, 8, 3, padding=1) for i in range(3)}
    top = dict(p6=nn.Conv2d(256, 8, 3, 2, 1), p7=nn.Conv2d(8, 8, 3, 2, 1))
    source = tree(backbone=dict(bottom_up=ResNet(deform=None), top_block=top, **fpn), head=head)
    randomised(source)
    state, text = convert(source, tmp_path)
    config = dict(
        type="RetinaNet",
        backbone=mmdet_resnet("caffe"),
        neck=dict(
            type="FPN",
            in_channels=[32, 64, 128, 256],
            out_channels=8,
            start_level=1,
            num_outs=5,
            add_extra_convs="on_input",
            relu_before_extra_convs=True,
        ),
        bbox_head=dict(
            type="RetinaHead",
            num_classes=3,
            in_channels=8,
            feat_channels=8,
            anchor_generator=dict(
                type="AnchorGenerator",
                octave_base_scale=4,
                scales_per_octave=3,
                ratios=[0.5, 1.0, 2.0],
                strides=[8, 16, 32, 64, 128],
            ),
        ),
    )
    target = assert_loads(built(config), state)
    x, body = torch.randn(1, 3, 64, 64, dtype=torch.float64), source.backbone
    tops = body.bottom_up(x)
    levels, above = [], None
    for i in reversed(range(3)):
        lateral = getattr(body, f"fpn_lateral{i + 3}")(tops[i + 1])
        above = lateral if above is None else lateral + F.interpolate(above, scale_factor=2, mode="nearest")
        levels.insert(0, getattr(body, f"fpn_output{i + 3}")(above))
    levels.append(body.top_block.p6(tops[3]))
    levels.append(body.top_block.p7(levels[-1].relu()))
    maps = target.neck(target.backbone(x))
    assert_same(maps, levels)
    scores, boxes = target.bbox_head(maps)
    assert_same(scores, [source.head.cls_score(source.head.cls_subnet(level)) for level in levels])
    assert_same(boxes, [source.head.bbox_pred(source.head.bbox_subnet(level)) for level in levels])
    assert "scale_major=False" in text


def test_the_order_of_anchors_that_the_notes_ask_for():
    """detectron2's: for each size, for each ratio h / w, of the size's area."""
    sizes, ratios = [32.0, 40.0, 51.0], [0.5, 1.0, 2.0]
    corners = [(size / r**0.5 / 2, size * r**0.5 / 2) for size in sizes for r in ratios]
    expected = torch.tensor([(-x, -y, x, y) for x, y in corners])
    scales = [size / 8 for size in sizes]
    ours = AnchorGenerator(strides=[8], ratios=ratios, scales=scales, scale_major=False)
    torch.testing.assert_close(ours.base_anchors[0], expected)
    assert not torch.allclose(AnchorGenerator(strides=[8], ratios=ratios, scales=scales).base_anchors[0], expected)


@pytest.mark.parametrize(
    "old, new",
    {
        "backbone.res4.5.conv3.norm.bias": "backbone.layer3.5.bn3.bias",
        "backbone.stem.conv1.norm.weight": "backbone.bn1.weight",
        "roi_heads.res5.0.shortcut.norm.weight": "roi_head.shared_head.layer4.0.downsample.1.weight",
        "roi_heads.res5.2.conv2_offset.bias": "roi_head.shared_head.layer4.2.conv2.conv_offset.bias",
        "roi_heads.box_head.2.fc1.weight": "roi_head.bbox_head.2.shared_fcs.0.weight",
        "roi_heads.box_head.conv4.norm.weight": "roi_head.bbox_head.shared_convs.3.bn.weight",
        "roi_heads.box_head.1.conv2.weight": "roi_head.bbox_head.1.shared_convs.1.conv.weight",
        "roi_heads.box_predictor.0.bbox_pred.bias": "roi_head.bbox_head.0.fc_reg.bias",
        "roi_heads.mask_head.mask_fcn2.norm.weight": "roi_head.mask_head.convs.1.bn.weight",
        "backbone.fpn_output3.norm.weight": "neck.fpn_convs.1.bn.weight",
        "proposal_generator.rpn_head.conv.conv1.weight": "rpn_head.rpn_conv.1.conv.weight",
        "proposal_generator.anchor_generator.cell_anchors.3": None,
    }.items(),
)
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_names(old, new, norm, tmp_path):
    names = ["backbone.bottom_up.stem.conv1.weight", "backbone.fpn_lateral2.weight", old]
    if norm == "bn" and ".norm." in old:
        names.append(old.rpartition(".")[0] + ".running_mean")
    if norm == "gn" and new and ".downsample." not in new:
        new = new.replace("bn", "gn")
    state, _ = convert(None, tmp_path, state={name: torch.zeros(1) for name in names})
    expected = {"backbone.conv1.weight", "neck.lateral_convs.0.conv.weight", new}
    assert {name for name in state if not name.endswith("running_mean")} == expected - {None}


@pytest.mark.parametrize("numpy_1", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_arrays(numpy_1, protocol, tmp_path):
    source = ResNet()
    arrays = {f"backbone.bottom_up.{name}": tensor.numpy() for name, tensor in source.state_dict().items()}
    checkpoint = dict(model=arrays, __author__="Detectron2 Model Zoo", matching_heuristics=True)
    content = pickle.dumps(checkpoint, protocol)
    if numpy_1 and protocol == 2:  # where names are lines of text
        content = content.replace(b"numpy._core.", b"numpy.core.")
    (tmp_path / "in.pkl").write_bytes(content)
    text = convert_checkpoint(tmp_path / "in.pkl", tmp_path / "out.pth")
    assert "left out beside the model, 2: __author__, matching_heuristics" in text
    state = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    np.testing.assert_array_equal(state["backbone.layer2.0.conv2.weight"], source.res3[0].conv2.weight.detach())
    state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    assert_loads(built(mmdet_resnet("caffe", "v2")), state)


def test_names_of_towers_with_norms(tmp_path):
    """Convolution, norm and ReLU take three numbers, where convolution and ReLU take two."""
    state = {"backbone.res2.0.conv1.weight": torch.zeros(1, 1, 1, 1)}
    for i in range(2):
        state[f"head.cls_subnet.{3 * i}.weight"] = torch.zeros(8, 8, 3, 3)
        state |= {f"head.cls_subnet.{3 * i + 1}.{leaf}": torch.zeros(8) for leaf in ("weight", "running_mean")}
        state[f"head.bbox_subnet.{3 * i}.bias"] = torch.zeros(8)
        state[f"head.bbox_subnet.{3 * i + 1}.weight"] = torch.zeros(8)
    converted, _ = convert(None, tmp_path, state=state)
    towers = [name.removeprefix("bbox_head.") for name in converted if name.startswith("bbox_head")]
    names = ("cls_convs.{}.conv.weight", "cls_convs.{}.bn.weight", "cls_convs.{}.bn.running_mean")
    names += ("reg_convs.{}.conv.bias", "reg_convs.{}.gn.weight")
    assert towers == [name.format(i) for i in range(2) for name in names]
