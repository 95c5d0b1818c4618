"""Models of transformers compute with our attention what they compute with their own."""

import collections
import copy

import pytest
import torch

import dcn_plugin.transformers
from dcn_plugin.layers import MultiScaleDeformableAttention

transformers = pytest.importorskip("transformers", reason="runs its models")


def deformable_detr(**options):
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, out_features=["stage2", "stage3", "stage4"]
    )
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=10,
        **options,
    )
    return transformers.DeformableDetrForObjectDetection(config)


def rt_detr():
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, out_features=["stage2", "stage3", "stage4"]
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        use_pretrained_backbone=False,
        encoder_hidden_dim=32,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=32,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=2,
        num_queries=10,
    )
    return transformers.RTDetrForObjectDetection(config)


MODELS = {
    "Deformable DETR": (deformable_detr, 4),
    "Deformable DETR, two-stage": (
        lambda: deformable_detr(two_stage=True, with_box_refine=True, two_stage_num_proposals=10),
        4,
    ),
    "RT-DETR": (rt_detr, 2),
}


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the calls of our operators, by name."""

    def __init__(self):
        super().__init__()
        self.of = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dcn_plugin":
            self.of[func._opname] += 1
        return func(*args, **(kwargs or {}))


def results(model, images):
    model.zero_grad()
    output = model(images)
    (output.logits.square().mean() + output.pred_boxes.square().mean()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return output.logits, output.pred_boxes, gradient / gradient.norm()


@pytest.mark.parametrize("name", MODELS)
def test_computes_the_same(name):
    make, attentions = MODELS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    for parameter_name, parameter in model.named_parameters():
        if "sampling_offsets.weight" in parameter_name or "attention_weights.weight" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected = results(model, images)
    states = set(model.state_dict())
    replaced = dcn_plugin.transformers.replace_attention(model)
    assert len(replaced) == attentions and set(model.state_dict()) == states
    with Calls() as calls:
        actual = results(model, images)
    assert calls.of == dict(ms_deform_attn=attentions, ms_deform_attn_backward=attentions)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_copies_keep_it():
    model = deformable_detr().eval()
    dcn_plugin.transformers.replace_attention(model)
    attention = [m for m in copy.deepcopy(model).modules() if type(m).__name__ == dcn_plugin.transformers.NAME]
    function = dcn_plugin.transformers.multi_scale_deformable_attention
    assert len(attention) == 4 and all(module.forward is function for module in attention)


@pytest.mark.parametrize("model", [torch.nn.Linear(1, 1), MultiScaleDeformableAttention()])
def test_other_models_are_refused(model):
    with pytest.raises(ValueError, match="has no MultiScaleDeformableAttention of transformers"):
        dcn_plugin.transformers.replace_attention(model)
