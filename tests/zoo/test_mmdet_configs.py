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

pytest.importorskip("mmdet")

import dcn_plugin.mmdet  # noqa: F401  # isort: skip  on mmcv-lite, MMDetection's models need it
import mmdet
from mmdet.models.utils.vlfuse_helper import BertPreTrainedModel
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine import MessageHub
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope, init_default_scope

from dcn_plugin.mmdet import mmcv_ops
from dcn_plugin.mmdet.mmcv_ext import provide_mmcv_ext

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
FEW_ROIS = dict(train_cfg=dict(rpn_proposal=dict(max_per_img=30)), test_cfg=dict(rpn=dict(max_per_img=30)))
# Lacks num_classes, which mmdet 3.3.0's RPN does not add: it cannot be built, whatever the operators.
BROKEN = ["cascade_rpn/cascade-rpn_r50-caffe_fpn_1x_coco.py"]
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
    """mmcv's, which it has compiled for GPUs alone: Guided Anchoring predicts with it."""
    return F.conv2d(features, weight, bias, stride, padding) * mask


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """What a Runner and ``custom_imports`` provide; and mmcv's own deformable operators fail where they are called."""

    def refuse(*args, **kwargs):
        raise AssertionError("an operator of mmcv's was called")

    init_default_scope("mmdet")
    MessageHub.get_current_instance().update_info("epoch", 0)
    if not provide_mmcv_ext():
        monkeypatch.setattr("mmcv.ops.masked_conv.masked_conv2d", masked_conv2d)
    for name in ("DeformConv2dFunction", "ModulatedDeformConv2dFunction", "DeformRoIPoolFunction"):
        monkeypatch.setattr(getattr(mmcv_ops, name), "forward", refuse)
    mmcv_ops.replace()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these images are too small to share
    yield
    torch.set_num_threads(threads)
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
    """What to load as 'bert-base-uncased': the width that GLIP's heads expect, one layer, letters for words."""
    transformers = pytest.importorskip("transformers")
    if BertPreTrainedModel is object:
        pytest.skip(f"mmdet finds no apply_chunking_to_forward in transformers {transformers.__version__}: 4.45 has it")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *letters, *(f"##{letter}" for letter in letters)]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(vocab_size=len(words), num_hidden_layers=1)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)


def inputs(config, batch):
    """A batch of noise, with objects; what a config's pipeline would have made of it."""
    # As small as the models allow: the hourglass halves it seven times, DetectoRS pads its smallest maps by reflection.
    size = 128 if config.model.backbone.type in ("HourglassNet", "DetectoRS_ResNet") else 64
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


def build(config):
    without_pretrained(config.model)
    model = revert_sync_batchnorm(MODELS.build(config.model))  # as the Runner does where there is one process
    model.init_weights()
    return model


def train(model, config):
    """Takes a step; returns the calls of our operators."""
    optim = config.optim_wrapper
    if optim.type == "AmpOptimWrapper":  # mmengine has it on GPUs alone
        optim.type = "OptimWrapper"
        optim.pop("loss_scale", None)
        optim.pop("dtype", None)
    optim = build_optim_wrapper(model, optim)
    model.train()
    with Calls() as calls:
        losses = model.train_step(inputs(config, 2), optim)
    assert losses and all(torch.isfinite(loss).all() for loss in losses.values()), losses
    return calls.of


def predict(model, config):
    """Predicts; returns the calls of our operators."""
    model.eval()
    with Calls() as calls, torch.no_grad():
        assert len(model.test_step(inputs(config, 1))) == 1
    return calls.of


def families(names):
    return {name.partition("/")[0] for name in names}


def test_every_family_is_represented():
    assert set(FAMILIES) <= set(ALL)
    # GLIP needs a language model. DyHead, from which its head has the deformable layers, stands for it.
    assert families(FAMILIES) == families(ALL) - {"glip"}


@pytest.mark.parametrize("name", ALL if RUN_ALL else FAMILIES)
def test_config(name, tmp_path, monkeypatch):
    config = Config.fromfile(ZOO / name)
    if not RUN_ALL:
        config.merge_from_dict(dict(model=FAMILIES[name]))
        if "roi_head" in config.model:
            config.merge_from_dict(dict(model=FEW_ROIS))
    if "language_model" in config.model:
        small_bert(tmp_path / config.lang_model_name)
        monkeypatch.chdir(tmp_path)
    if name in BROKEN:
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'num_classes'"):
            build(config)
        return
    model = build(config)
    if name.startswith("glip/") and "funtune" not in name:
        # For prediction alone: mmdet's head does not train with their loss, SmoothL1Loss, whatever the operators.
        with pytest.raises(RuntimeError, match="must match the size"):
            train(model, config)
        assert predict(model, config)["deform_conv2d"] > 0
        return
    training, prediction = train(model, config), predict(model, config)
    operators = {"deform_conv2d", "deform_roi_align"} & training.keys()
    assert operators
    for operator in operators:
        assert training[operator] >= training[f"{operator}_backward"] > 0
        # mmcv-lite's plain RoI align runs on ours too, once for each level that has boxes: how often is chance.
        lite = operator == "deform_roi_align" and provide_mmcv_ext()
        assert lite or prediction[operator] >= training[operator]


@pytest.mark.skipif(not RUN_ALL, reason="loads all of MMDetection's configs; DCN_PLUGIN_ALL_CONFIGS is not 1")
def test_the_list_is_complete():
    types = {
        "DCN",
        "DCNv2",
        "DeformRoIPoolPack",
        "ModulatedDeformRoIPoolPack",
        "RepPointsHead",
        "VFNetHead",
        "TOODHead",
    }
    types |= {
        "GARPNHead",
        "GARetinaHead",
        "CascadeRPNHead",
        "CentripetalHead",
        "DyHead",
        "ATSSVLFusionHead",
        "DDODHead",
    }
    switches = {"use_dcn", "use_deform", "with_deform", "dcn_on_last_conv"}

    def deformable(value):
        if isinstance(value, list | tuple):
            return any(map(deformable, value))
        if not isinstance(value, dict):
            return False
        named = isinstance(value.get("type"), str) and value["type"] in types
        return named or any(value.get(switch) for switch in switches) or any(map(deformable, value.values()))

    found = []
    for path in ZOO.rglob("*.py"):
        name = str(path.relative_to(ZOO))
        try:
            config = Config.fromfile(path, import_custom_modules=False)
        except (FileNotFoundError, ModuleNotFoundError):  # a base that is not packaged, or mmpretrain's
            continue
        if not name.startswith("_base_") and deformable(config._cfg_dict.get("model")):
            found.append(name)
    assert sorted(found) == ALL
