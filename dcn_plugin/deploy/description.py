"""The JSON file beside an exported network: what its user needs to prepare images and to make boxes of its outputs."""

import json
from pathlib import Path

import torch
from torch import Tensor

from dcn_plugin import __version__

from .network import Network


def describe(
    config, checkpoint: str, form: str, network: Network, images: Tensor, dynamic: bool, names: list[str]
) -> dict:
    """A dict of plain values."""
    preprocessor = dict(config.model.get("data_preprocessor") or {})
    loader = config.get("test_dataloader") or {}
    batch, _, height, width = images.shape
    multiple = "a multiple of 32, from 160 on"
    return plain(
        dict(
            format=form,
            config=config.filename,
            checkpoint=str(Path(checkpoint).resolve()),
            versions=dict(dcn_plugin=__version__, torch=torch.__version__),
            input=dict(
                name="images",
                shape=["any", 3, multiple, multiple] if dynamic else [batch, 3, height, width],
                dtype=str(images.dtype).removeprefix("torch."),
                channels="BGR" if network.normalize or not network.swap else "RGB",
                mean=None if network.normalize else preprocessor.get("mean"),
                std=None if network.normalize else preprocessor.get("std"),
                padding="below and to the right, with " + ("the mean" if network.normalize else "zeros"),
            ),
            outputs=names,
            stays_in_pytorch="roi_head" if network.two_stage else None,
            head=config.model[network.head_name],
            test_cfg=config.model.get("test_cfg"),
            classes=(loader.get("dataset", {}).get("metainfo") or {}).get("classes") or _classes(loader),
            pipeline=loader.get("dataset", {}).get("pipeline") or config.get("test_pipeline"),
        )
    )


def _classes(loader) -> list[str] | None:
    """Those that the test set's class knows by itself."""
    from mmdet.registry import DATASETS

    kind = loader.get("dataset", {}).get("type")
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    return getattr(kind, "METAINFO", {}).get("classes")


def plain(value):
    """Dicts, lists, numbers and strings; classes by their names."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__name__", str(value))


def description_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def read(path: Path) -> dict:
    """The description beside an exported network.

    Raises:
        ValueError: there is none.
    """
    file = description_of(path)
    if not path.exists() or not file.exists():
        raise ValueError(
            f"{path if not path.exists() else file} is not there: `python -m dcn_plugin export` writes both"
        )
    return json.loads(file.read_text())
