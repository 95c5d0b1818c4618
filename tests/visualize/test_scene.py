"""From an image's file through the test pipeline to the model, and back to the file's own pixels."""

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="scenes of detectors")

from mmengine.dataset import Compose
from mmengine.registry import init_default_scope

from dcn_plugin import ops
from dcn_plugin.commands import _config
from dcn_plugin.visualize import Pooling, drawing
from dcn_plugin.visualize.grid import Grid
from dcn_plugin.visualize.scene import frame_of, see

from .conftest import DETR, TWO_STAGE

KEYS = "img_path", "ori_shape", "img_shape", "scale_factor", "border"


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [dict(type="Resize", scale=(1000, 180), keep_ratio=True)],
        [dict(type="Resize", scale=(60, 30), keep_ratio=False)],
        [dict(type="Resize", scale=(300, 400), keep_ratio=False), dict(type="Pad", size_divisor=64)],
        [
            dict(type="Resize", scale=(150, 100), keep_ratio=False),
            dict(
                type="RandomCenterCropPad",
                ratios=None,
                border=None,
                mean=[0, 0, 0],
                std=[1, 1, 1],
                to_rgb=True,
                test_mode=True,
                test_pad_mode=["logical_or", 127],
            ),
        ],
    ],
)
@pytest.mark.parametrize("spot", [(20, 30), (80, 18)])
def test_a_spot_is_found_again_through_the_pipeline(tmp_path, steps, spot):
    """The centre of mass of a spot in the pipeline's result, taken back, is where the spot was drawn."""
    x, y = spot
    rows, columns = np.mgrid[:50, :120]
    image = 255 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * 4**2))
    image = np.repeat(image[..., None], 3, axis=2).round().astype(np.uint8)
    path = str(tmp_path / "spot.png")
    cv2.imwrite(path, image)
    init_default_scope("mmdet")
    packed = Compose(
        [dict(type="LoadImageFromFile", to_float32=True), *steps, dict(type="PackDetInputs", meta_keys=KEYS)]
    )(dict(img_path=path, img_id=0))
    found = packed["inputs"].float().sum(0)
    rows, columns = (torch.arange(n) for n in found.shape)
    centre = float((found.sum(1) * rows).sum() / found.sum()), float((found.sum(0) * columns).sum() / found.sum())
    frame = frame_of(packed["data_samples"].metainfo)
    assert frame.to_image(*centre) == pytest.approx((y, x), abs=0.05)  # of a pixel: brightness is rounded


def test_no_scale_is_the_image_itself():
    assert frame_of({}) == Grid()
    with pytest.raises(ValueError, match="flips"):
        frame_of(dict(flip=True))


@pytest.fixture
def scene(write_config, write_checkpoint, image, request):
    path = write_config(*request.param)
    config = _config.load(path)
    model = _config.build(config)
    model.load_state_dict(torch.load(write_checkpoint(path))["state_dict"])
    model.dataset_meta = dict(classes=("cat", "dog"))
    return see(model.eval(), Compose(config.pipeline)(dict(img_path=image, img_id=0)), score_thr=0.0)


@pytest.mark.parametrize("scene", [()], indirect=True)
def test_a_detector(scene):
    assert scene.name == "scene" and scene.image.shape == (50, 60, 3)
    assert scene.input.shape == (1, 3, 64, 96) and scene.recording.size == (64, 96)
    convolutions = scene.recording.chosen()
    assert [conv.name for conv in convolutions] == [f"backbone.layer{k}.1.conv2" for k in (2, 3, 4)]
    assert [conv.output_grid for conv in convolutions] == [Grid((s, s), (0.0, 0.0)) for s in (8.0, 16.0, 32.0)]
    # Four convolutions a stage, but for the first two stages' downsampling, which is no 3x3.
    chain = [conv.name for conv in convolutions[-1].chain(100)]
    assert chain == [f"backbone.layer{k}.{b}.conv{c}" for k in (4, 3, 2) for b in (1, 0) for c in (2, 1)]

    # Pixel (2, 3) of the map of stride 8 is at (16, 24) of what the model got, which is 77 / 60 and 64 / 50 as large.
    place = scene.centre(convolutions[0], (24.5 / (77 / 60) - 0.5, 16.5 / (64 / 50) - 0.5))
    assert scene.position(convolutions[0], place) == (2, 3)
    assert place == pytest.approx((24.5 * 60 / 77 - 0.5, 16.5 * 50 / 64 - 0.5))
    points = scene.points(convolutions[0], place, 2)
    assert points.x.shape == (81,) and 0 < float(points.weight.max()) <= 1
    assert scene.extent((64, 77)) == pytest.approx((-0.5, 59.5, 49.5, -0.5))

    assert len(scene.boxes) == 6 and scene.classes == ("cat", "dog")
    assert (scene.scores.diff() <= 0).all()
    places = scene.default_places(3)
    x1, y1, x2, y2 = scene.boxes[(scene.boxes[:, 2:] - scene.boxes[:, :2]).prod(1).argmax()].tolist()
    assert len(places) == 3 and places[-1] == pytest.approx(((x1 + x2 - 1) / 2, (y1 + y2 - 1) / 2))


@pytest.mark.parametrize("scene", [()], indirect=True)
def test_detections_in_one_place_are_one_place(scene):
    small, large = torch.tensor([[10.0, 10.0, 21.0, 21.0], [20.0, 5.0, 51.0, 46.0]])
    scene.boxes = torch.stack([large, small, large + 1, small - 0.5])
    assert scene.default_places(3) == [(15.0, 15.0), (35.0, 25.0)]


@pytest.mark.parametrize("scene", [()], indirect=True)
def test_the_pictures_of_a_detector(scene):
    convolutions = scene.recording.chosen()
    figures = dict(drawing.figures(scene, what=("points", "receptive_field", "rois", "offsets")))
    names = [f"scene_offsets_backbone.layer{k}.1.conv2" for k in (2, 3, 4)]
    assert list(figures) == ["scene_points", "scene_receptive_field", *names]
    for name, figure in figures.items():
        pixels = drawing.rendered(figure)
        assert pixels.std() > 10, name
    axes = figures["scene_points"].axes
    assert len(axes) == 9 and "3 deformable layers composed" in axes[0].get_title()
    assert len(figures["scene_receptive_field"].axes) == 18

    places = [(3.0, 4.0), (30.0, 20.0), (50.0, 40.0)]
    [(_, figure)] = drawing.figures(scene, ["*.layer2.1.conv2"], places=places, what=["points"])
    for ax, place in zip(figure.axes, places, strict=True):
        assert ax.get_subplotspec().rowspan.start == 0  # side by side
        assert tuple(ax.collections[-1].get_offsets()[0]) == pytest.approx(scene.centre(convolutions[0], place))

    [figure] = [figure for _, figure in drawing.figures(scene, ["*.layer4.0.conv1"], 4, [(3.0, 4.0)], ["points"])]
    [ax] = figure.axes
    drawn, centre = (one.get_offsets() for one in ax.collections)
    conv = scene.recording.chosen(["*.layer4.0.conv1"])[0]
    points = scene.points(conv, (3.0, 4.0), 4)
    assert len(drawn) == int(points.counts.sum()) and len(points.counts) == 9**4
    assert tuple(centre[0]) == pytest.approx(scene.centre(conv, (3.0, 4.0)))


@pytest.mark.parametrize("scene", [(TWO_STAGE,)], indirect=True)
def test_the_bins_of_rois(scene):
    assert {pooling.name for pooling in scene.recording.poolings} <= {
        f"roi_head.bbox_roi_extractor.roi_layers.{level}" for level in range(3)
    }
    assert sum(len(pooling.rois) for pooling in scene.recording.poolings) == 20
    pooling, index = drawing._roi_of(scene, scene.boxes[0])
    moved, straight = drawing._bins(scene, pooling, index, 0)
    roi = pooling.rois[index, 1:] / torch.tensor([77 / 60, 64 / 50] * 2)
    torch.testing.assert_close(torch.stack([straight[0, 0, :2], straight[-1, -1, 2:]]).flatten(), roi - 0.5)
    share = pooling.offset[index] * pooling.gamma  # x first
    size = (roi[2:] - roi[:2])[:, None, None]
    torch.testing.assert_close((moved - straight)[..., :2].permute(2, 0, 1), share * size, atol=1e-4, rtol=1e-4)
    figure = drawing.rois_figure(scene)
    assert len(figure.axes[1].patches) == 9 + 1 and drawing.rendered(figure).std() > 10
    assert figure.axes[0].get_title() == f"{scene.classes[scene.labels[0]]}, {scene.scores[0]:.2f}\nstraight bins"
    assert figure.axes[1].get_title() == f"{pooling.name}\nmoved bins"


@pytest.mark.parametrize("scene", [()], indirect=True)
@pytest.mark.parametrize("kind", ["deform_roi_align", "deform_ps_roi_pool"])
def test_bins_are_drawn_where_the_operator_samples(scene, kind):
    """Pooling a map of its own x and y gives the bins' centres, here of a map of stride 4."""
    height, width, classes, samples = 24, 32, 1 if kind == "deform_roi_align" else 2, 64
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    rois = torch.tensor([[0, 37.3, 29.8, 81.6, 60.2]])
    offset = torch.randn(1, 2 * classes, 3, 4, generator=torch.Generator().manual_seed(0))
    if kind == "deform_roi_align":
        maps = torch.stack([x, y])[None]
        pooled = ops.deform_roi_align(maps, rois, offset, (3, 4), 0.25, sampling_ratio=samples)[0][:, None]
    else:
        maps = torch.stack([x, y, x, y])[None]  # of two classes
        sizes = dict(output_size=(3, 4), group_size=1, sample_per_part=samples)
        pooled = ops.deform_ps_roi_pool(maps, rois, offset, spatial_scale=0.25, **sizes)[0].view(2, 2, 3, 4)
        pooled = pooled.transpose(0, 1)
    pooling = Pooling("pool", kind, (height, width), rois, offset, None, 0.25, 0.1)
    for label in range(classes):
        moved, straight = drawing._bins(scene, pooling, 0, label)
        x, y = (4 * (pooled[:, label] + 0.5) - 0.5).unbind()  # of what the model got
        y, x = scene.frame.to_image(y, x)
        found = (moved[..., :2] + moved[..., 2:]) / 2
        # The position-sensitive operator's samples begin at the bin's corner: half a step off its centre.
        step = (moved[0, 0, 2:] - moved[0, 0, :2]) / samples / 2 if kind == "deform_ps_roi_pool" else 0
        torch.testing.assert_close(found - step, torch.stack([x, y], -1), atol=1e-3, rtol=0)
        torch.testing.assert_close(straight[1:, :, 1], straight[:-1, :, 3])  # side by side
        torch.testing.assert_close(straight[:, 1:, 0], straight[:, :-1, 2])


@pytest.mark.parametrize("scene", [(DETR,)], indirect=True)
def test_the_attention_of_a_detector(scene):
    encoder, decoder = scene.recording.chosen_attentions()
    assert (encoder.name, decoder.name) == ("encoder.layers.1.self_attn", "decoder.layers.1.cross_attn")
    assert encoder.of_pixels and len(decoder.locations) == 12

    place = 40.0, 22.0
    [(name, figure)] = drawing.figures(scene, ["encoder*1*", "decoder*1*"], places=[place], what=["attention"])
    assert name == "scene_attention" and drawing.rendered(figure).std() > 10
    for ax, attention in zip(figure.axes, (encoder, decoder), strict=True):
        assert ax.get_title() == f"{attention.name}\n8 heads, 3 levels, 4 points"
        drawn, centre = (one.get_offsets() for one in ax.collections)
        # The model got 96 x 64, of which the image's 60 x 50 pixels fill 77 x 64.
        to_image = torch.tensor([96 * 60 / 77, 64 * 50 / 64])
        query = attention.query_at((place[1] + 0.5) * 64 / 50 - 0.5, (place[0] + 0.5) * 77 / 60 - 0.5)
        sizes = attention.sizes.flip(-1)[:, None]
        at = attention.locations[query] * sizes - 0.5
        read = ((at > -1) & (at < sizes)).all(-1)
        expected = attention.locations[query][read] * to_image - 0.5
        assert len(expected) > 30
        drawn, expected = (np.array(sorted(map(tuple, one.tolist()))) for one in (drawn, expected))
        np.testing.assert_allclose(drawn, expected, atol=1e-3)
        assert len({tuple(colour[:3]) for colour in ax.collections[0].get_facecolor().tolist()}) == 8
        assert tuple(centre[0]) == pytest.approx((attention.references()[query] * to_image - 0.5).tolist(), abs=1e-3)
    # The encoder's query is the pixel of the map of stride 8 that is nearest: the place's share of 8 x 12 pixels.
    column, row = 40.5 * 77 / 60 / 8, 22.5 * 64 / 50 / 8
    x, y = scene.attended(encoder, place)[1]
    assert x == pytest.approx((int(column) + 0.5) * 8 * 60 / 77 - 0.5, abs=1e-3)
    assert y == pytest.approx((int(row) + 0.5) * 8 * 50 / 64 - 0.5, abs=1e-3)


@pytest.mark.parametrize("scene", [()], indirect=True)
def test_an_image_without_detections_or_file(scene):
    scene.boxes = scene.boxes[:0]
    assert scene.default_places(3) == [(29.5, 24.5)]
    data = dict(inputs=torch.zeros(3, 64, 77, dtype=torch.uint8), data_samples=_Sample())
    model = scene.forward.args[0]
    seen = see(model, data, score_thr=0.0)
    assert seen.image.shape == (64, 77, 3) and seen.frame == Grid() and seen.name == "image"


class _Sample:
    def __new__(cls):
        from mmdet.structures import DetDataSample

        return DetDataSample(metainfo=dict(img_shape=(64, 77), ori_shape=(50, 60), scale_factor=(77 / 60, 64 / 50)))
