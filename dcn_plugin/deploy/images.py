"""Images as a config's test pipeline and data_preprocessor hand them to a detector."""

import copy
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

from .network import fit


def real_images(config, detector, files: Sequence[str], count: int = 2) -> list[Tensor]:
    """Normalised images (1, 3, H, W): of the files named, else the first of the test set, none where it is absent."""
    samples = _of_files(config, files) if files else _of_test_set(config, count)
    with torch.no_grad():
        return [detector.data_preprocessor(_batch(sample), False)["inputs"] for sample in samples]


def of_sizes(images: list[Tensor], sizes: list[tuple[int, int, int]]) -> list[Tensor]:
    """Batches (N, 3, H, W) of the images; of noise, where there are none."""
    batches = []
    for number, height, width in sizes:
        chosen = [fit(images[i % len(images)], (height, width)) for i in range(number)] if images else None
        batches.append(torch.cat(chosen) if chosen else torch.randn(number, 3, height, width))
    return batches


def _of_files(config, files):
    from mmcv.transforms import Compose
    from mmdet.utils import get_test_pipeline_cfg

    steps = [
        step for step in copy.deepcopy(get_test_pipeline_cfg(config)) if "LoadAnnotations" not in str(step["type"])
    ]
    pipeline = Compose(steps)
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{file}: no such image")
    return [pipeline(dict(img_path=file, img_id=i)) for i, file in enumerate(files)]


def _of_test_set(config, count):
    from mmdet.registry import DATASETS

    loader = config.get("test_dataloader")
    if not loader:
        return []
    try:
        with redirect_stdout(io.StringIO()):  # pycocotools reports its progress
            dataset = DATASETS.build(loader["dataset"])
        return [dataset[i] for i in range(min(count, len(dataset)))]
    except FileNotFoundError:
        return []


def _batch(sample: dict) -> dict:
    return {key: [value] for key, value in sample.items()}
