"""Which convolutions of a model a target chooses, and why not others."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.utils import _pair

from .layers import DeformConv2d, ModulatedDeformConv2d

PLAIN = ("torch.nn.modules.conv.Conv2d", "mmcv.cnn.bricks.wrappers.Conv2d")  # mmcv's adds empty maps to old torch
PADS_ITSELF = ("mmcv.cnn.bricks.conv2d_adaptive_padding.Conv2dAdaptivePadding",)


@dataclass(eq=False)
class Candidate:
    conv: Any  # a convolution of PyTorch's or a subclass
    names: list[str]  # more than one where a convolution is shared
    obstacle: str | None  # why it cannot be deformable
    pattern: str | None = None  # the first that matched it


@dataclass
class Options:
    kernel_size: int | tuple[int, int] | None
    stride: int | tuple[int, int] | None
    depthwise: bool | None
    min_channels: int

    def __post_init__(self):
        if not isinstance(self.min_channels, int):
            raise ValueError(f"min_channels must be an integer, got {self.min_channels!r}")
        for name in ("kernel_size", "stride"):
            given = getattr(self, name)
            pair = given if isinstance(given, (tuple, list)) else (given, given)
            if given is not None and not (len(pair) == 2 and all(isinstance(one, int) for one in pair)):
                raise ValueError(f"{name} must be an integer or two integers, got {given!r}")

    def excludes(self, candidate: Candidate, named: bool) -> str | None:
        """Why a convolution that could be deformable is not to be; ``named`` is one whose full name was given."""
        conv = candidate.conv
        depthwise = conv.groups == conv.in_channels > 1
        if self.kernel_size is not None and conv.kernel_size != tuple(_pair(self.kernel_size)):
            return _size_of(conv)
        if self.kernel_size is None and not named and conv.kernel_size == (1, 1):
            return _size_of(conv)
        if self.stride is not None and conv.stride != tuple(_pair(self.stride)):
            return f"stride {conv.stride}"
        if self.depthwise is not None and depthwise != self.depthwise:
            return "depthwise" if depthwise else "not depthwise"
        if min(conv.in_channels, conv.out_channels) < self.min_channels:
            return f"{min(conv.in_channels, conv.out_channels)} channels"
        if not named and (conv.in_channels == 3 or any("stem" in name.split(".") for name in candidate.names)):
            return "stem"
        return None


def candidates_of(module: nn.Module) -> Iterator[Candidate]:
    """Every convolution of any kind, in the order of registration."""
    names: dict[nn.Module, list[str]] = {}
    for name, submodule in module.named_modules(remove_duplicate=False):
        if isinstance(submodule, _ConvNd):
            names.setdefault(submodule, []).append(name)
    for conv, its_names in names.items():
        yield Candidate(conv, its_names, _obstacle(conv, its_names))


def _obstacle(conv: Any, names: list[str]) -> str | None:
    if isinstance(conv, (DeformConv2d, ModulatedDeformConv2d)):
        return "already deformable"
    if any(part.endswith("conv_offset") for name in names for part in name.split(".")):
        return "predicts offsets"
    if isinstance(conv, _ConvTransposeNd):
        return "transposed"
    if len(conv.kernel_size) != 2:
        return f"{len(conv.kernel_size)}D"
    if class_of(conv) not in PLAIN + PADS_ITSELF:
        return f"{type(conv).__name__} computes something of its own"
    try:
        DeformConv2d(
            1,
            1,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            padding_mode=conv.padding_mode,
            device="meta",
        )
    except ValueError as error:
        return str(error)
    return None


def choose(
    module: nn.Module, candidates: list[Candidate], targets: str | Iterable[str], options: Options
) -> list[Candidate]:
    """The candidates that the targets choose, in their own order; notes in each which pattern matched it."""
    given, targets = targets, [targets] if isinstance(targets, str) else targets
    targets = list(targets) if isinstance(targets, Iterable) else []
    if not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"targets must be patterns on the names of submodules, got {given!r}")
    chosen = set()
    for target in targets:
        skipped, found = [], False
        for candidate in candidates:
            if not any(_matches(name, target) for name in candidate.names):
                continue
            candidate.pattern = candidate.pattern or target
            named = target in candidate.names
            if named and candidate.obstacle:
                raise ValueError(
                    f"target {target!r} is a convolution of {name_of(module)} that cannot become deformable: "
                    f"{candidate.obstacle}"
                )
            excluded = candidate.obstacle or options.excludes(candidate, named)
            if excluded:
                skipped.append(f"{candidate.names[0]} ({excluded})")
            else:
                found = True
                if candidate not in chosen:
                    candidate.pattern = target
                    chosen.add(candidate)
        if skipped and not found:
            raise ValueError(
                f"target {target!r} chooses none of the convolutions it matches in {name_of(module)}: {listed(skipped)}"
            )
        if not found:
            raise ValueError(_nothing_matches(module, target, candidates))
    return [candidate for candidate in candidates if candidate in chosen]


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a module's name or that of a container it is in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _nothing_matches(module: nn.Module, target: str, candidates: list[Candidate]) -> str:
    submodules = dict(module.named_modules(remove_duplicate=False))
    matched = [f"{name} ({name_of(submodules[name])})" for name in submodules if name and fnmatchcase(name, target)]
    if matched:
        return f"target {target!r} matches no convolution of {name_of(module)}, but {listed(matched)}"
    # Names are compared by as many parts, from either end, as the target has.
    depth = target.count(".") + 1
    ends: dict[str, str] = {}
    for candidate in candidates:
        parts = candidate.names[0].split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            ends.setdefault(".".join(parts[:end][:depth]), name)
            ends.setdefault(".".join(parts[:end][-depth:]), name)
    near = [ends[end] for end in get_close_matches(target, ends, cutoff=0.4)]
    near = near or [name for name, _ in module.named_children()]
    return f"target {target!r} matches nothing in {name_of(module)}; nearest: {listed(dict.fromkeys(near))}"


def name_of(module: nn.Module) -> str:
    return type(module).__name__


def _size_of(conv: Any) -> str:
    return f"kernel {'x'.join(map(str, conv.kernel_size))}"


def listed(names: Iterable[str], at_most: int = 8) -> str:
    names = list(names)
    shown = names if len(names) <= at_most else [*names[: at_most // 2], "...", *names[-at_most // 2 :]]
    return ", ".join(shown)


def class_of(conv: nn.Module) -> str:
    return f"{type(conv).__module__}.{type(conv).__qualname__}"
