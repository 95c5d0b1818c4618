"""What torch.jit.script says of the layers."""

from torch import nn


def refuse_scripting(layer: nn.Module):
    """``__prepare_scriptable__`` of the layers, which torch.jit.script calls first, on each module of a model.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        f"torch.jit.script cannot compile {type(layer).__name__}: use torch.jit.trace, or torch.export in its place"
    )
