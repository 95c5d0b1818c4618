"""MMDetection's own configs, as they are, build, take a training step and predict, on our operators.

One config of each family; with DCN_PLUGIN_ALL_CONFIGS=1 in the environment, all that have deformable operators, which
configs.txt lists. Changed are only pretrained weights, which would be downloaded, and what has no place on a CPU.
"""

import collections
import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("mmcv._ext")
mmdet = pytest.importorskip("mmdet")

from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine import MessageHub
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope, init_default_scope

from dcn_plugin import replace_mmcv_ops

ZOO = Path(mmdet.__file__).parent / ".mim" / "configs"
ALL = (Path(__file__).parent / "configs.txt").read_text().split()
SHALLOW = dict(depth=50, init_cfg=None)
FAMILIES = {  # with what makes them quick
    "cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py": {},
    "centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py": {},
    "centripetalnet/centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco.py": dict(
        backbone=dict(stage_channels=[256, 16, 16, 16, 16, 16], stage_blocks=[1] * 6)
    ),
    "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": {},
    "dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py": {},
    "dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco.py": {},
    "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_amp-1x_coco.py": {},
    "ddod/ddod_r50_fpn_1x_coco.py": {},
    "detectors/cascade-rcnn_r50-sac_1x_coco.py": {},
    "dyhead/atss_r50_fpn_dyhead_1x_coco.py": {},
    "empirical_attention/faster-rcnn_r50-attn0010-dcn_fpn_1x_coco.py": {},
    "fcos/fcos_r50-dcn-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py": {},
    "foveabox/fovea_r50_fpn_gn-head-align_4xb4-2x_coco.py": {},
    "gcnet/cascade-mask-rcnn_x101-32x4d-syncbn-dconv-c3-c5-r16-gcb-c3-c5_fpn_1x_coco.py": dict(backbone=SHALLOW),
    "gfl/gfl_x101-32x4d-dconv-c4-c5_fpn_ms-2x_coco.py": dict(backbone=SHALLOW),
    "guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py": {},
    "htc/htc_x101-64x4d-dconv-c3-c5_fpn_ms-400-1400-16xb1-20e_coco.py": dict(backbone=SHALLOW),
    "nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py": {},
    "regnet/mask-rcnn_regnetx-3.2GF-mdconv-c3-c5_fpn_1x_coco.py": {},
    "reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py": {},
    "solov2/solov2-light_r50-dcn_fpn_ms-3x_coco.py": {},
    "tood/tood_r50_fpn_1x_coco.py": {},
    "vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco.py": {},
}
# The config lacks num_classes, which mmdet 3.3.0's RPN does not add: it builds with no operators whatever.
BROKEN = {"cascade_rpn/cascade-rpn_r50-caffe_fpn_1x_coco.py": (TypeError, "missing 1 required .* argument: 'num_classes'")}
RUN_ALL = os.environ.get("DCN_PLUGIN_ALL_CONFIGS") == "1"


class Calls(TorchDispatchMode):
    """Counts the calls of our operators, by name."""

    def __init__(self):
        super().__init__()
        self.of = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dcn_plugin":
            self.of[func._schema.name.removeprefix("dcn_plugin::")] += 1
        return func(*args, **(kwargs or {}))


def masked_conv2d(features, mask, weight, bias, padding=0, stride=1):
    """mmcv's, which it has on GPUs alone: Guided Anchoring predicts with it."""
    return F.conv2d(features, weight, bias, stride, padding) * mask


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """What a Runner and ``custom_imports`` provide; and mmcv's own deformable operators fail where they are called."""

    def refuse(*args, **kwargs):
        raise AssertionError("an operator of mmcv's was called")

    init_default_scope("mmdet")
    MessageHub.get_current_instance().update_info("epoch", 0)
    monkeypatch.setattr("mmcv.ops.masked_conv.masked_conv2d", masked_conv2d)
    for name in ("DeformConv2dFunction", "ModulatedDeformConv2dFunction", "DeformRoIPoolFunction"):
        monkeypatch.setattr(getattr(replace_mmcv_ops, name), "forward", refuse)
    replace_mmcv_ops.replace()
    yield
    replace_mmcv_ops.restore()
    DefaultScope._instance_dict.clear()


def without_pretrained(config):
    """Drops, in place, the weights that a config would download."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if key == "pretrained" or key == "init_cfg" and isinstance(value, dict) and value["type"] == "Pretrained":
            config[key] = None
        elif isinstance(value, dict | list | tuple):
            without_pretrained(value)
    return config


def small_bert(folder):
    """A folder to load in place of 'bert-base-uncased': the width that the heads expect, one layer, letters for words."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(vocab_size=len(words), num_hidden_layers=1)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def inputs(config, batch, size):
    """A batch of noise, with objects; what a config's pipeline would have made of it."""
    has_text = "language_model" in config.model
    return demo_mm_inputs(
        batch,
        [(3, size, size)] * batch,
        num_items=[3, 2][:batch],
        with_mask=True,
        with_semantic="semantic_head" in config.model.get("roi_head", {}),
        sem_seg_output_strides=8,
        texts=["a. b. c. d. e. f. g. h. i. j"] * batch if has_text else None,
        custom_entities=True,
    )


def runs_on_ours(config, size):
    """Builds the model, trains it a step and predicts; returns the calls of our operators in both."""
    without_pretrained(config.model)
    model = revert_sync_batchnorm(MODELS.build(config.model))  # as the Runner does where there is one process
    model.init_weights()
    optim = config.optim_wrapper
    if optim.type == "AmpOptimWrapper":  # mmengine has it on GPUs alone
        optim.type = "OptimWrapper"
        optim.pop("loss_scale", None)
        optim.pop("dtype", None)
    optim = build_optim_wrapper(model, optim)
    model.train()
    with Calls() as training:
        losses = model.train_step(inputs(config, 2, size), optim)
    assert losses and all(torch.isfinite(loss).all() for loss in losses.values()), losses
    model.eval()
    with Calls() as prediction, torch.no_grad():
        assert len(model.test_step(inputs(config, 1, size))) == 1
    return training.of, prediction.of


def assert_on_ours(config, size=128):
    training, prediction = runs_on_ours(config, size)
    operators = {"deform_conv2d", "deform_roi_align"} & training.keys()
    assert operators
    for operator in operators:
        assert prediction[operator] >= training[operator] >= training[f"{operator}_backward"] > 0


def families():
    return {name.partition("/")[0] for name in ALL}


def test_every_family_is_represented():
    assert set(FAMILIES) <= set(ALL)
    # GLIP's head needs a language model. DyHead, from which it has its layers, stands for it.
    assert {name.partition("/")[0] for name in FAMILIES} == families() - {"glip"}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_of_each_family(name):
    config = Config.fromfile(ZOO / name)
    config.merge_from_dict(dict(model=FAMILIES[name]))
    assert_on_ours(config)


@pytest.mark.skipif(not RUN_ALL, reason="DCN_PLUGIN_ALL_CONFIGS is not 1")
@pytest.mark.parametrize("name", ALL)
def test_all(name, tmp_path):
    config = Config.fromfile(ZOO / name)
    if "language_model" in config.model:
        config.model.language_model.name = small_bert(tmp_path)
    if name in BROKEN:
        error, message = BROKEN[name]
        with pytest.raises(error, match=message):
            runs_on_ours(config, 128)
    else:
        assert_on_ours(config)
