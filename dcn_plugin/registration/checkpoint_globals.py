"""What MMEngine's own checkpoints contain, for ``torch.load``.

Since 2.6 ``torch.load`` refuses all but tensors and plain containers. Besides those, a checkpoint of MMEngine's Runner
holds the histories of its logged scalars; without this, MMEngine 0.10.7 could not read back what it wrote.
"""

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


def _statistic_of_history_buffer(owner, name):
    """``getattr`` as far as a pickled HistoryBuffer needs it: for its own statistics, and nothing else."""
    if owner is not HistoryBuffer or name.startswith("_"):
        raise ValueError(
            f"a checkpoint asks for attribute {name!r} of {owner!r}, which is not a statistic of MMEngine's"
        )
    return getattr(owner, name)


torch.serialization.add_safe_globals(
    [
        HistoryBuffer,
        (_statistic_of_history_buffer, "builtins.getattr"),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")},
        # NumPy pickles under the names its modules had in version 1 and, from 2 on, under those they have now.
        *[
            (
                getattr(np._core.multiarray if hasattr(np, "_core") else np.core.multiarray, function),
                f"numpy.{core}.{function}",
            )
            for function in ("_reconstruct", "scalar")
            for core in ("core.multiarray", "_core.multiarray")
        ],
    ]
)
