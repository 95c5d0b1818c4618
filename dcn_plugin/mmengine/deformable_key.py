"""The key ``deformable=`` of whatever MMEngine's MODELS, or a registry below it, builds."""

import functools
import inspect
import logging

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS, Registry

from dcn_plugin.convert import KINDS, convert, logger


def _is_argument(cfg, registry: Registry | None) -> bool:
    """Whether the class that a config names has an argument ``deformable`` of its own."""
    kind = cfg.get("type")
    if isinstance(kind, str):
        with (registry or MODELS).switch_scope_and_registry(cfg.get("_scope_")) as here:
            kind = here.get(kind)
    return callable(kind) and "deformable" in inspect.signature(kind).parameters


def _without_key(cfg, registry: Registry | None = None):
    """A config without its key ``deformable``, and the conversions that this asks for."""
    if not isinstance(cfg, (dict, Config)) or "deformable" not in cfg or _is_argument(cfg, registry):
        return cfg, []
    cfg = cfg.copy()
    given = cfg.pop("deformable")
    keys = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if not all(isinstance(key, dict) for key in keys):
        raise ValueError(f"deformable= takes a dict such as dict(type='DCNv2', targets='*'), or a list; got {given!r}")
    return cfg, keys


def _convert(module, keys) -> None:
    for key in keys:
        key = dict(key)
        if isinstance(key.get("type"), str) and key["type"] not in KINDS:
            key["type"] = MODELS.get(key["type"]) or key["type"]  # a registered subclass, or a class by its path
        convert(module, **key)


def _accepts_deformable(build):
    """The build function of a registry, followed by the conversion of what it built."""

    @functools.wraps(build)
    def build_deformable(cfg, *args, **kwargs):
        if not isinstance(cfg, list):
            cfg, keys = _without_key(cfg, kwargs.get("registry"))
            module = build(cfg, *args, **kwargs)
            _convert(module, keys)
            return module
        pairs = [_without_key(one, kwargs.get("registry")) for one in cfg]
        sequence = build([one for one, _ in pairs], *args, **kwargs)
        for module, (_, keys) in zip(sequence, pairs, strict=True):
            _convert(module, keys)
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


def register_deformable_key() -> None:
    """Gives the key to MMEngine's MODELS and the registries below it, and each conversion a line in MMEngine's log."""
    _extend(MODELS)
    if not logger.handlers:
        logger.addHandler(_ToMMEngine())
        logger.setLevel(logging.INFO)
