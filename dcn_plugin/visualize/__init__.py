"""What deformable layers do with an image: where they sample, what reaches a feature, how RoI bins move.

:mod:`.recording` watches a model run, :mod:`.points`, :mod:`.receptive_field` and :mod:`.statistics` compute from what
it saw; they need torch alone. :mod:`.drawing` draws with matplotlib, :mod:`.scene` knows the data of MMEngine's models.
``python -m dcn_plugin visualize`` and DeformOffsetVisHook are made of them.
"""

from .points import Points, sampling_points
from .receptive_field import receptive_fields
from .recording import Convolution, Pooling, Recording, record
from .statistics import effective_dilation

__all__ = [
    "Convolution",
    "Points",
    "Pooling",
    "Recording",
    "effective_dilation",
    "receptive_fields",
    "record",
    "sampling_points",
]
