"""What deformable layers do with an image: where they sample, what reaches a feature, how RoI bins move.

``recording`` watches a model run, ``points``, ``receptive_field`` and ``statistics`` compute from what
it saw; they need torch alone. ``drawing`` draws with matplotlib, ``scene`` knows the data of MMEngine's models.
``python -m dcn_plugin visualize`` and DeformOffsetVisHook are made of them.
"""

from .attention import Attention, AttentionPoints
from .points import Points, sampling_points
from .receptive_field import receptive_fields
from .recording import Convolution, Pooling, Recording, record
from .statistics import effective_dilation

__all__ = [
    "Attention",
    "AttentionPoints",
    "Convolution",
    "Points",
    "Pooling",
    "Recording",
    "effective_dilation",
    "receptive_fields",
    "record",
    "sampling_points",
]
