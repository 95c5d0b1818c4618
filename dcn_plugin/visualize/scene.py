"""An image as a model of MMEngine's sees it: through the test pipeline and the data preprocessor, and back."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from torch import Tensor

from .attention import Attention, AttentionPoints
from .grid import Grid
from .points import Points, sampling_points
from .receptive_field import Place, receptive_fields
from .recording import Convolution, Recording, record


@dataclass
class Scene:
    """An image, what a model found in it, and what its deformable layers did; coordinates are those of the image."""

    name: str
    image: np.ndarray  # (H, W, 3) uint8, RGB, as it is in its file
    frame: Grid  # of what the model got in the image
    recording: Recording
    boxes: Tensor  # (K, 4) of what was found, best first, as x1, y1, x2, y2
    labels: Tensor  # (K,)
    scores: Tensor  # (K,)
    classes: tuple[str, ...]
    input: Tensor  # (1, C, h, w): what the model got
    forward: Any  # the model, called with such

    def points(self, convolution: Convolution, place: tuple[float, float], layers: int) -> Points:
        """The sampling points of the output position nearest to a place (x, y)."""
        points = sampling_points(convolution, self.position(convolution, place), layers)
        y, x = self.frame.to_image(points.y, points.x)
        return points._replace(y=y, x=x)

    def position(self, convolution: Convolution, place: tuple[float, float]) -> tuple[int, int]:
        """The output position (i, j) nearest to a place (x, y)."""
        return convolution.position_at(*self.frame.to_map(place[1], place[0]))

    def centre(self, convolution: Convolution, place: tuple[float, float]) -> tuple[float, float]:
        """The place (x, y) of the output position nearest to one."""
        y, x = self.frame.to_image(*convolution.output_grid.to_image(*self.position(convolution, place)))
        return x, y

    def attended(self, attention: Attention, place: tuple[float, float]) -> tuple[AttentionPoints, tuple[float, float]]:
        """The sampling points of the query nearest to a place (x, y), and where its reference is."""
        query = attention.query_at(*self.frame.to_map(place[1], place[0]))
        points = attention.points(query)
        y, x = self.frame.to_image(points.y, points.x)
        centre_y, centre_x = self.frame.to_image(*attention.to_image(attention.references()[query]))
        return points._replace(y=y, x=x), (float(centre_x), float(centre_y))

    def receptive_fields(self, places: list[Place], straight: bool) -> list[Tensor]:
        """As :func:`receptive_fields`, of the pixels that the model got; :meth:`extent` says where they are."""
        return receptive_fields(self.forward, self.input, places, straight)

    def extent(self, size: tuple[int, int], grid: Grid | None = None) -> tuple[float, float, float, float]:
        """Left, right, bottom and top edge of a map (H, W) of a grid, by default of what the model got."""
        grid = grid or Grid()
        top, left = self.frame.to_image(*grid.to_image(-0.5, -0.5))
        bottom, right = self.frame.to_image(*grid.to_image(size[0] - 0.5, size[1] - 0.5))
        return left, right, bottom, top

    def default_places(self, count: int) -> list[tuple[float, float]]:
        """The centres (x, y) of detections, from the smallest to the largest; of the image where there are none.

        Of detections that mostly overlap, as those of several classes may, only the best counts.
        """
        if not len(self.boxes):
            height, width = self.image.shape[:2]
            return [((width - 1) / 2, (height - 1) / 2)]
        boxes = self.boxes[apart(self.boxes)]
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        chosen = areas.argsort()[np.linspace(0, len(areas) - 1, min(count, len(areas))).round()]
        return [(float(x1 + x2 - 1) / 2, float(y1 + y2 - 1) / 2) for x1, y1, x2, y2 in boxes[chosen]]


def overlap(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of a box (4,) and others (K, 4)."""
    shared = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp_min(0).prod(1)
    areas = (others[:, 2:] - others[:, :2]).clamp_min(0).prod(1) + (box[2:] - box[:2]).prod()
    return shared / (areas - shared).clamp_min(1e-12)


def apart(boxes: Tensor) -> list[int]:
    """The indices of boxes of which none is mostly in the same place as one before."""
    chosen: list[int] = []
    for k, box in enumerate(boxes):
        if not (overlap(box, boxes[chosen]) > 0.3).any():
            chosen.append(k)
    return chosen


def frame_of(metainfo: dict) -> Grid:
    """The grid of a pipeline's result in the image's own pixels, from the result's metainfo.

    A resize puts the centre of pixel p at (p + 0.5) / scale_factor - 0.5; padding below and to the right moves nothing,
    ``border`` (of mmdet's RandomCenterCropPad) by its top and left.
    """
    scale_x, scale_y = metainfo.get("scale_factor", (1.0, 1.0))[:2]
    top, _, left, _ = [float(edge) for edge in metainfo.get("border", (0, 0, 0, 0))]
    if metainfo.get("flip"):
        raise ValueError("the pipeline flips images; the pictures need one that does not")
    step = 1 / float(scale_y), 1 / float(scale_x)
    return Grid(step, (-0.5, -0.5)).then((1, 1), (0.5 - top, 0.5 - left))


def see(model, data: dict, score_thr: float = 0.3) -> Scene:
    """Runs a model on one image.

    Args:
        model: of MMEngine's BaseModel, such as a detector of mmdet's, in the mode to look at.
        data: what a test pipeline makes of an image: ``inputs`` and ``data_samples``.
        score_thr: detections below it are left out.
    """
    sample = data["data_samples"]
    metainfo = dict(sample.metainfo)
    image = _read(metainfo.get("img_path"))
    frame = frame_of(metainfo)
    if image is None:  # then the pictures show what the pipeline made
        image, frame = _rgb(data["inputs"], model), Grid()
    batch = model.data_preprocessor(pseudo_collate([data]), False)
    forward = partial(_predict, model, batch["data_samples"])
    recording = record(model, batch["inputs"], forward)
    boxes, labels, scores = _detections(recording.output, score_thr)
    if frame == Grid() and "scale_factor" in metainfo:
        boxes = boxes * torch.tensor(metainfo["scale_factor"][:2]).float().repeat(2)
    return Scene(
        Path(metainfo.get("img_path") or "image").stem,
        image,
        frame,
        recording,
        boxes,
        labels,
        scores,
        tuple((getattr(model, "dataset_meta", None) or {}).get("classes", ())),
        batch["inputs"],
        forward,
    )


def _predict(model, samples, inputs):
    return model(inputs, samples, mode="predict")


def _read(path) -> np.ndarray | None:
    if path is None or not Path(path).is_file():
        return None
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)  # turned as its EXIF says, as pipelines do
    return None if image is None else image[..., ::-1]


def _rgb(inputs: Tensor, model) -> np.ndarray:
    image = inputs.float().clamp(0, 255).byte().cpu().numpy().transpose(1, 2, 0)
    return image[..., ::-1] if getattr(model.data_preprocessor, "_channel_conversion", True) else image


def _detections(output, score_thr: float) -> tuple[Tensor, Tensor, Tensor]:
    sample = output[0] if isinstance(output, (list, tuple)) and output else output
    found = getattr(sample, "pred_instances", None)
    if found is None or "bboxes" not in found or "scores" not in found:
        return torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0)
    found = found.cpu()
    order = found.scores.argsort(descending=True)
    order = order[found.scores[order] >= score_thr]
    boxes = getattr(found.bboxes, "tensor", found.bboxes)
    return boxes[order].float(), found.labels[order], found.scores[order]
