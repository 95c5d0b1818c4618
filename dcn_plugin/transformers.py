"""Runs the deformable attention of Hugging Face transformers' models on ours; needs torch alone.

::

    from dcn_plugin.transformers import replace_attention

    replace_attention(model)

Deformable DETR, RT-DETR, Grounding DINO, MM Grounding DINO, OmDet-Turbo, LW-DETR, RF-DETR and PP-DocLayout have a
module for it, MultiScaleDeformableAttention, which has no parameters: checkpoints and configs stay as they are.
RT-DETRv2, D-FINE, DEIMv2, Mask2Former and OneFormer call functions of their own and are not reached.
"""

from torch import Tensor, nn

from .ops import ms_deform_attn

NAME = "MultiScaleDeformableAttention"


def multi_scale_deformable_attention(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """``MultiScaleDeformableAttention.forward`` of transformers, as :func:`dcn_plugin.ops.ms_deform_attn`.

    The sizes are taken from the list, so that a GPU is not waited for; ``im2col_step`` is unused.
    """
    return ms_deform_attn(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def replace_attention(model: nn.Module) -> list[str]:
    """Lets a model of transformers run its deformable attention on ours, in place.

    Returns:
        The names of the modules that now do.

    Raises:
        ValueError: the model has none.
    """
    names = []
    for name, module in model.named_modules():
        if type(module).__name__ == NAME and next(module.parameters(), None) is None:
            module.forward = multi_scale_deformable_attention
            names.append(name)
    if not names:
        raise ValueError(f"{type(model).__name__} has no {NAME} of transformers")
    return names
