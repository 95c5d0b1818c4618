"""How the commands read configs. MMEngine is imported when a command runs, so that ``--help`` needs none."""

import argparse
import logging
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from dcn_plugin.convert import logger
from dcn_plugin.targets import listed

if TYPE_CHECKING:
    from mmengine.config import Config


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="merged into the config, as by mmdet's tools"
    )


def parsed(options: list[str]) -> dict:
    """The values of ``--cfg-options``, as MMEngine reads them."""
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser()
    parser.add_argument("options", nargs="*", action=DictAction)
    return parser.parse_args(options).options or {}


def load(name: str, options: dict | None = None) -> "Config":
    """A config by file name or as 'package::path', options merged in, and what it then says to import imported."""
    import_module("dcn_plugin.mmdet" if find_spec("mmdet") else "dcn_plugin.mmengine")
    from mmengine.config import Config
    from mmengine.utils import import_modules_from_strings

    config = Config.fromfile(_file_of(name), import_custom_modules=False)
    config.merge_from_dict(options or {})
    try:
        import_modules_from_strings(**(config.get("custom_imports") or dict(imports=None)))
    except ImportError as error:
        raise ImportError(f"{name}: custom_imports: {error} ({error.__context__})") from error
    return config


def _file_of(name: str) -> Path:
    package, _, path = name.partition("::")
    if not path:
        if not Path(name).is_file():
            raise ValueError(f"{name}: no such file")
        return Path(name)
    found = find_spec(package) if package.isidentifier() else None
    if found is None or found.origin is None:
        raise ValueError(f"{name}: there is no package {package!r}")
    folder = Path(found.origin).parent / ".mim" / "configs"  # where OpenMMLab's packages have their configs
    if not (folder / path).is_file():
        near = get_close_matches(path, [str(file.relative_to(folder)) for file in folder.rglob("*.py")])
        raise ValueError(f"{name}: {package} has no such config" + (f"; nearest: {listed(near)}" if near else ""))
    return folder / path


def build(config: "Config") -> nn.Module:
    """A config's model, without a log of what became deformable."""
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(config.get("default_scope", "mmdet"))
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        return MODELS.build(config.model)
    except TypeError as error:  # such as a misspelt key
        raise ValueError(str(error)) from error
    finally:
        logger.setLevel(level)


def read_checkpoint(checkpoint: str) -> dict:
    """What a checkpoint holds, on the CPU."""
    from mmengine.runner.checkpoint import _load_checkpoint

    try:
        loaded = _load_checkpoint(checkpoint, map_location="cpu", logger="silent")
    except OSError:  # such as a file that is not there
        raise
    except Exception as error:  # of any type: pickle reads what is no pickle as if it were one
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{checkpoint} is no checkpoint that torch.load reads ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{checkpoint} is no checkpoint: it holds a {type(loaded).__name__}")
    return loaded


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Loads a checkpoint whole.

    Raises:
        ValueError: it lacks tensors that the model has, or has others: the weights would be random, or another model's.
    """
    from mmengine.runner.checkpoint import _load_checkpoint_to_model

    loaded = read_checkpoint(checkpoint)
    state = loaded.get("state_dict", loaded)
    own = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    missing, unexpected = sorted(own - state.keys()), sorted(state.keys() - model.state_dict().keys())
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint} is no checkpoint of this config's model: of {len(own)} tensors {len(missing)} are missing "
            f"({listed(missing) or 'none'}) and {len(unexpected)} are unexpected ({listed(unexpected) or 'none'})"
        )
    _load_checkpoint_to_model(model, loaded, strict=True, logger="silent")


def image_size(config: "Config") -> tuple[int, int] | None:
    """(height, width) to which a config's test pipeline brings images, padded as its model pads batches.

    The largest that its resizing allows; None where it does not say.
    """
    pipeline = (config.get("test_dataloader") or {}).get("dataset", {}).get("pipeline") or config.get("test_pipeline")
    size = None
    for step in pipeline or []:
        given = step.get("scale") if "Resize" in str(step.get("type")) else step.get("size")
        if str(step.get("type")).rpartition(".")[2] in ("Resize", "FixScaleResize", "Pad") and given:
            width, height = (given, given) if isinstance(given, int) else given
            size = (min(height, width), max(height, width)) if step.get("keep_ratio") else (height, width)
    if size is None:
        return None
    divisor = (config.model.get("data_preprocessor") or {}).get("pad_size_divisor", 1)
    height, width = (-(-length // divisor) * divisor for length in size)
    return height, width
