"""State dicts in which a layer's offset convolution lies beside it, as in mmcv before 1.0 and in MMDetection 1.x."""

from torch import nn

from .zero_init import ZeroInitConv2d


def predicts_offsets(module: nn.Module) -> bool:
    return isinstance(getattr(module, "conv_offset", None), ZeroInitConv2d)


def rename_old_offsets(parent: nn.Module) -> None:
    """Makes ``parent`` load ``conv2_offset.*`` as ``conv2.conv_offset.*``, for each child that predicts offsets.

    Loading shows a module only the keys under its own name, so it is the parent that has to do this.
    """
    if _rename not in [getattr(hook, "hook", None) for hook in parent._load_state_dict_pre_hooks.values()]:
        parent.register_load_state_dict_pre_hook(_rename)


def _rename(parent: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    for name, child in parent.named_children():
        if not predicts_offsets(child) or hasattr(parent, f"{name}_offset"):
            continue
        for kind in ("weight", "bias"):
            old, new = f"{prefix}{name}_offset.{kind}", f"{prefix}{name}.conv_offset.{kind}"
            if old in state_dict and new not in state_dict:
                state_dict[new] = state_dict.pop(old)
