"""MMDetection's configs with deformable attention, as they are but small, compute on our operator what they compute
on mmcv's function."""

import copy

import pytest
import torch

pytest.importorskip("mmdet")

import dcn_plugin.mmdet  # noqa: F401  # isort: skip  on mmcv-lite, MMDetection's models need it
from mmcv.ops.nms import NMSop
from mmdet.models.layers.transformer.grounding_dino_layers import GroundingDinoTransformerEncoder
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from dcn_plugin import layers
from dcn_plugin.mmdet import mmcv_ops

from .test_mmdet_configs import ZOO, Calls, without_pretrained

FAMILIES = {  # with the layers that attend
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py": 4,
    "deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py": 4,
    "deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py": 4,
    "dino/dino-4scale_r50_8xb2-12e_coco.py": 4,
    "ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py": 4,
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py": 2,
}
GROUNDING_DINO = "grounding_dino/grounding_dino_swin-t_pretrain_obj365_goldg_cap4m.py"
SMALL = {  # what replaces a setting, wherever it is; MMDetection's two-stage detectors have the width 256 in their code
    "num_layers": 2,
    "feedforward_channels": 32,
    "num_queries": 20,
    "num_dn_queries": 4,
    "max_per_img": 10,
    # of Mask2Former's losses, which sample points at random
    "num_points": lambda value: 64 if value > 64 else value,
    "norm_cfg": lambda value: dict(type="GN", num_groups=4),
    "dropout": 0.0,
    "ffn_drop": 0.0,
}


def shrink(config):
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if key in SMALL:
            config[key] = SMALL[key](value) if callable(SMALL[key]) else SMALL[key]
        elif isinstance(value, dict | list):
            shrink(value)


def small(name):
    config = Config.fromfile(ZOO / name)
    model = without_pretrained(config.model)
    shrink(model)
    model.backbone.update(depth=18, base_channels=8, stem_channels=8, frozen_stages=-1, norm_eval=False)
    channels = [8 * 2**index for index in model.backbone.out_indices]
    if "neck" in model:
        model.neck.in_channels = channels
    else:
        model.panoptic_head.in_channels = channels
        model.data_preprocessor.batch_augments = None
    return config


def build(config):
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():  # as initialised, all attend alike
        if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(sizes):
    return demo_mm_inputs(len(sizes), [(3, *size) for size in sizes], num_items=[3, 2][: len(sizes)], with_mask=True)


def computed(config):
    """Losses, gradients and predictions, with float64 in the place of float32 wherever the model asks for that."""
    model = build(config).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(NMSop, "forward", in_float32(NMSop.forward))
        torch.set_default_dtype(torch.float64)
        try:
            return results_of(model)
        finally:
            torch.set_default_dtype(torch.float32)


def results_of(model):
    torch.manual_seed(2)
    data = model.data_preprocessor(inputs([(64, 96), (80, 56)]), True)
    for sample in data["data_samples"]:
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.double()
    losses = model.train()(data["inputs"].double(), data["data_samples"], mode="loss")
    model.parse_losses(losses)[0].backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    data = model.data_preprocessor(inputs([(64, 96)]), False)
    with torch.no_grad():
        [sample] = model.eval()(data["inputs"].double(), data["data_samples"], mode="predict")
    found = sample.pred_instances
    results = {name: value for name, value in losses.items() if name.startswith(("loss", "d0"))}
    results |= dict(gradient=gradient / gradient.norm(), scores=found.scores)
    return results | (dict(boxes=found.bboxes) if "bboxes" in found else {})


def in_float32(forward):
    """mmcv's suppression, whose kernel has no float64; it answers with indices."""

    def suppress(ctx, boxes, scores, *args):
        return forward(ctx, boxes.to(torch.float32), scores.to(torch.float32), *args)

    return staticmethod(suppress)


@pytest.fixture(autouse=True)
def surroundings():
    init_default_scope("mmdet")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these images are too small to share
    mmcv_ops.replace()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def on_mmcvs():
    """Calls a function on mmcv's layers, and counts how often ours ran."""

    def call(function, *args):
        mmcv_ops.restore()
        try:
            with Calls() as calls:
                return function(*args), calls.of["ms_deform_attn"]
        finally:
            mmcv_ops.replace()

    return call


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_and_a_prediction(name):
    config = small(name)
    model = build(config)
    attention = [m for m in model.modules() if isinstance(m, layers.MultiScaleDeformableAttention)]
    assert len(attention) == FAMILIES[name]
    optim = build_optim_wrapper(model, config.optim_wrapper)
    with Calls() as calls:
        losses = model.train().train_step(inputs([(64, 96), (80, 56)]), optim)
    assert losses and all(torch.isfinite(loss).all() for loss in losses.values()), losses
    assert calls.of["ms_deform_attn"] == calls.of["ms_deform_attn_backward"] == FAMILIES[name]
    with Calls() as calls, torch.no_grad():
        assert len(model.eval().test_step(inputs([(64, 96)]))) == 1
    assert calls.of["ms_deform_attn"] == FAMILIES[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_mmcvs(name, on_mmcvs):
    config = small(name)
    theirs, calls = on_mmcvs(computed, copy.deepcopy(config))
    assert calls == 0
    ours = computed(config)
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def encoded():
    """Grounding DINO's encoder alone, since its language model would be downloaded: outputs and gradients."""
    config = Config.fromfile(ZOO / GROUNDING_DINO).model.encoder
    config.num_layers = 2
    config.fusion_layer_cfg.embed_dim = 32
    for layer in (config.layer_cfg, config.text_layer_cfg):
        layer.ffn_cfg.feedforward_channels = 32
    torch.manual_seed(0)
    encoder = GroundingDinoTransformerEncoder(**config).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    shapes = torch.tensor([(6, 8), (3, 4), (2, 2), (1, 1)])
    pixels, words = int(shapes.prod(1).sum()), 5
    leaves = [torch.randn(2, n, 256, dtype=torch.float64, requires_grad=True) for n in (pixels, words)]
    padding = torch.zeros(2, pixels, dtype=torch.bool)
    padding[1, 40:48] = True
    image, text = encoder(
        leaves[0],
        query_pos=torch.randn(2, pixels, 256, dtype=torch.float64),
        key_padding_mask=padding,
        spatial_shapes=shapes,
        level_start_index=torch.tensor([0, 48, 60, 64]),
        valid_ratios=torch.rand(2, 4, 2, dtype=torch.float64) / 2 + 0.5,
        memory_text=leaves[1],
        text_attention_mask=torch.zeros(2, words, dtype=torch.bool),
        text_self_attention_masks=torch.ones(2, words, words, dtype=torch.bool),
    )
    (image.square().sum() + text.square().sum()).backward()
    kinds = [type(m) for m in encoder.modules() if type(m).__name__ == "MultiScaleDeformableAttention"]
    return kinds, [image, text, *(leaf.grad for leaf in leaves), *(p.grad for p in encoder.parameters())]


def test_grounding_dinos_encoder(on_mmcvs):
    (_, theirs), calls = on_mmcvs(encoded)
    assert calls == 0
    kinds, ours = encoded()
    assert kinds == [layers.MultiScaleDeformableAttention] * 2
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# DDQ's loss, in MMDetection 3.3.0, puts float32 boxes among bfloat16 ones, which PyTorch refuses.
@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("ddq")])
def test_bfloat16_autocast(name):
    config = small(name)
    model = build(config)
    data = model.data_preprocessor(inputs([(64, 96), (80, 56)]), True)
    with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
        losses = model.train()(**data, mode="loss")
        loss, _ = model.parse_losses(losses)
    loss.backward()
    assert calls.of["ms_deform_attn"] == FAMILIES[name]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert len(model.eval().test_step(inputs([(64, 96)]))) == 1
