"""The part of a detector that computes tensors from tensors: backbone, neck and dense head."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Images to the tensors from which a detector's own post-processing makes boxes.

    Of a single-stage detector these are the outputs of its head; of a two-stage detector the maps of its neck and the
    outputs of its RPN, since what runs on proposals (``roi_head``) stays in PyTorch.

    Args:
        detector: of mmdet, in float32; it is put into evaluation mode.
        normalize: whether the network does what the detector's data_preprocessor does to pixels: the order of the
            channels, mean and standard deviation. If so, it takes pixels as images are loaded, BGR in 0 to 255.

    Attributes:
        head: the head that is part of the network, and ``head_name`` its name in the detector.
        two_stage: whether something of the detector stays outside.

    Raises:
        ValueError: the detector has no such part.
    """

    def __init__(self, detector: nn.Module, normalize: bool = False):
        from mmdet.models.detectors import SingleStageDetector, TwoStageDetector

        super().__init__()
        self.two_stage = isinstance(detector, TwoStageDetector) and detector.with_rpn
        if not (self.two_stage or (isinstance(detector, SingleStageDetector) and hasattr(detector, "bbox_head"))):
            raise ValueError(
                f"{type(detector).__name__} has no part that computes tensors from images alone: single-stage "
                "detectors with a bbox_head and two-stage detectors with an rpn_head have"
            )
        detector.eval()
        detector.requires_grad_(False)
        self.detector: Any = detector
        self.head_name = "rpn_head" if self.two_stage else "bbox_head"
        preprocessor: Any = detector.data_preprocessor
        self.normalize = normalize
        self.swap = bool(getattr(preprocessor, "_channel_conversion", False))
        if getattr(preprocessor, "_enable_normalize", False):
            self.register_buffer("mean", preprocessor.mean.clone()[None])
            self.register_buffer("std", preprocessor.std.clone()[None])
        else:
            self.mean = self.std = None

    @property
    def head(self) -> Any:
        return getattr(self.detector, self.head_name)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) to the tensors of :meth:`named`, in its order."""
        if self.normalize:
            images = images.flip(1) if self.swap else images
            images = images if self.mean is None else (images - self.mean) / self.std
        return tuple(leaves(self.parts(images)))

    def parts(self, images: Tensor):
        """The same for normalised images, and in the nested tuples that the detector's own methods take."""
        maps = self.detector.extract_feat(images)
        return (tuple(maps), self.head(maps)) if self.two_stage else self.head(maps)

    def as_input(self, images: Tensor) -> Tensor:
        """What the data_preprocessor made, as this network takes it."""
        if not self.normalize:
            return images
        images = images if self.mean is None else images * self.std.float() + self.mean.float()
        return images.flip(1) if self.swap else images

    def named(self, parts) -> list[str]:
        """A name for each tensor of :meth:`parts`: the argument of the head's ``predict_by_feat``, and the level."""
        maps, outputs = parts if self.two_stage else ((), parts)
        prefix = "rpn_" if self.two_stage else ""
        arguments = list(inspect.signature(self.head.predict_by_feat).parameters)
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        names = [f"map_{level}" for level in range(len(maps))]
        for argument, output in zip(arguments, outputs, strict=False):
            found = len(leaves(output))
            names += (
                [prefix + argument] if isinstance(output, Tensor) else [f"{prefix}{argument}_{i}" for i in range(found)]
            )
        return names

    @contextmanager
    def replaced_by(self, run) -> Iterator[None]:
        """Meanwhile the detector's own ``predict`` takes its tensors from ``run``, which answers as this network does.

        ``run`` is given images as the data_preprocessor makes them, and may be this network itself.
        """
        detector, head = self.detector, self.head
        structure: list[Any] = []

        def extract_feat(images):
            restore()
            if not structure:
                with torch.no_grad():
                    structure.append(self.parts(images[:1]))
            parts = rebuild(structure[0], iter(run(images)))
            detector.extract_feat = extract_feat
            head.forward = lambda maps: parts[1] if self.two_stage else parts
            return parts[0] if self.two_stage else parts

        def restore():
            detector.__dict__.pop("extract_feat", None)
            head.__dict__.pop("forward", None)

        detector.extract_feat = extract_feat
        try:
            yield
        finally:
            restore()


def leaves(tree) -> list[Tensor]:
    """The tensors of nested tuples and lists, in order; None holds none."""
    if isinstance(tree, Tensor):
        return [tree]
    return [] if tree is None else [leaf for branch in tree for leaf in leaves(branch)]


def rebuild(tree, tensors: Iterator[Tensor]):
    """The same nested tuples and lists with other tensors."""
    if isinstance(tree, Tensor):
        return next(tensors)
    return None if tree is None else type(tree)(rebuild(branch, tensors) for branch in tree)


def fit(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images padded below and to the right with zeros, as the data_preprocessor pads batches, or cut, to a size."""
    height, width = (new - old for new, old in zip(size, images.shape[-2:], strict=True))
    return nn.functional.pad(images, (0, width, 0, height))


@contextmanager
def layer_of_error(network: nn.Module):
    """Turns an error in a network's forward pass into a ValueError that names the innermost layer that was running."""
    running = []
    hooks = []
    for name, module in network.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield
    except Exception as error:
        layer = running[-1] if running else ""
        where = f"{layer} ({type(network.get_submodule(layer)).__name__})" if layer else type(network).__name__
        raise ValueError(f"{where.removeprefix('detector.')} cannot be exported: {summary(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()


def summary(error: BaseException) -> str:
    """The first line that says something, of the error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
