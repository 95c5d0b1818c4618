"""The key ``deformable=`` of whatever MMEngine's MODELS, or a registry below it, builds."""

import functools
import logging

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS, Registry

from dcn_plugin.convert import convert, logger


def _without_key(cfg):
    """A config without its key ``deformable``, and the value of that."""
    if not isinstance(cfg, (dict, Config)) or not isinstance(cfg.get("deformable"), dict | None):
        return cfg, None  # not a config, or an argument of that name that is not for us
    cfg = cfg.copy()
    return cfg, cfg.pop("deformable", None)


def _accepts_deformable(build):
    """The build function of a registry, followed by the conversion of what it built."""

    @functools.wraps(build)
    def build_deformable(cfg, *args, **kwargs):
        if not isinstance(cfg, list):
            cfg, key = _without_key(cfg)
            module = build(cfg, *args, **kwargs)
            return module if key is None else convert(module, **key)
        pairs = [_without_key(one) for one in cfg]
        sequence = build([one for one, _ in pairs], *args, **kwargs)
        for module, (_, key) in zip(sequence, pairs, strict=True):
            if key is not None:
                convert(module, **key)
        return sequence

    build_deformable.accepts_deformable = True
    return build_deformable


def _extend(registry: Registry) -> None:
    # Registries made later inherit the function of their parent; those that exist have one of their own.
    if not hasattr(registry.build_func, "accepts_deformable"):
        registry.build_func = _accepts_deformable(registry.build_func)
    for child in registry.children.values():
        _extend(child)


class _ToMMEngine(logging.Handler):
    """Says in MMEngine's current log, and so in the log file of a run, what was converted."""

    def emit(self, record: logging.LogRecord) -> None:
        print_log(record.getMessage(), logger="current", level=record.levelno)


_extend(MODELS)
if not logger.handlers:
    logger.addHandler(_ToMMEngine())
    logger.setLevel(logging.INFO)
