"""The demo's data set, and its detector through mmdet's Runner: end to end, but for the time it takes to learn."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="the demo runs in MMDetection")
pytest.importorskip("sklearn", reason="the demo's digits come from scikit-learn")

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import Runner, load_checkpoint

import dcn_plugin
import dcn_plugin.mmdet
from dcn_plugin.layers import ModulatedDeformConv2dPack
from dcn_plugin.mmdet.mmcv_ext import provide_mmcv_ext

from ..test_import import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    make(out)
    return out


@pytest.fixture(scope="session")
def deformed(tmp_path_factory):
    out = tmp_path_factory.mktemp("deformed")
    make(out, "--kind", "deformed")
    return out


def make(out, *options):
    program = ROOT / "projects/digits/make_dataset.py"
    command = [sys.executable, program, "--out", out, "--train", "6", "--val", "3", *options]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


def test_dataset_is_coco_and_its_boxes_are_in_the_image(digits):
    for split, count in (("train", 6), ("val", 3)):
        content = json.loads((digits / f"{split}.json").read_text())
        assert len(content["images"]) == count
        assert all((digits / split / image["file_name"]).exists() for image in content["images"])
        assert [c["name"] for c in content["categories"]] == [str(d) for d in range(10)]
        assert len(content["annotations"]) >= count
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            assert min(x, y) >= 0
            assert min(w, h) > 5
            assert max(x + w, y + h) <= 192


def test_dataset_is_the_same_each_time(digits, tmp_path):
    make(tmp_path)
    for file in digits.rglob("*.*"):
        assert file.read_bytes() == (tmp_path / file.relative_to(digits)).read_bytes()


@pytest.mark.parametrize("kind", ["digits", "deformed"])
def test_masks_lie_in_the_boxes_of_their_class_and_reach_their_edges(kind, request):
    folder = request.getfixturevalue(kind)
    content = json.loads((folder / "train.json").read_text())
    for image in content["images"]:
        mask = cv2.imread(str(folder / "train" / image["file_name"].replace("jpg", "png")), cv2.IMREAD_UNCHANGED)
        assert mask.shape == (image["height"], image["width"]) and mask.dtype == np.uint8
        rest = mask.copy()
        for one in content["annotations"]:
            if one["image_id"] == image["id"]:
                x, y, w, h = one["bbox"]
                inside = mask[y : y + h, x : x + w] == one["category_id"]
                covered = (mask[y : y + h, x : x + w] != one["category_id"]) & (mask[y : y + h, x : x + w] != 10)
                edges = [(inside | covered)[edge].any() for edge in (0, -1, (slice(None), 0), (slice(None), -1))]
                assert all(edges), "a box is no larger than its digit, what another digit covers aside"
                rest[y : y + h, x : x + w][inside] = 10
        assert (rest == 10).all(), "digits have boxes, and all else is background"


def test_deformed_digits_are_by_others_and_vary_more(deformed):
    program = load_program("make_dataset")
    train, val = program.split_digits(1797, program.KINDS["deformed"], seed=0)
    assert len(val) == 516 and val.max() < train.min() and len(train) + len(val) == 1797
    content = json.loads((deformed / "train.json").read_text())
    assert {(image["width"], image["height"]) for image in content["images"]} == {(96, 96)}
    sides = [max(annotation["bbox"][2:]) for annotation in content["annotations"]]
    assert max(sides) > 2.5 * min(sides)


def test_upright_digits_are_of_one_size(tmp_path):
    make(tmp_path, "--kind", "upright")
    heights = [one["bbox"][3] for one in json.loads((tmp_path / "train.json").read_text())["annotations"]]
    assert len(heights) > 6 and min(heights) > 24 and max(heights) < 36


def config(name, data, work_dir):
    cfg = Config.fromfile(ROOT / "configs/digits" / f"{name}.py")
    cfg.work_dir = str(work_dir)
    cfg.visualizer.name = str(work_dir)
    cfg.load_from = None
    cfg.default_scope = "mmdet"
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=1000)
    cfg.param_scheduler = None
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=2, by_epoch=False)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f"{data}/"
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        if "ann_file" in evaluator:
            evaluator.ann_file = str(data / "val.json")
    if "test_cfg" in cfg.model:  # two iterations make no confident detector
        cfg.model.test_cfg.get("rcnn", cfg.model.test_cfg).score_thr = 0.0
    return cfg


def predict(model, loader):
    model.eval()
    with torch.no_grad():
        found = [p.pred_instances for batch in loader for p in model.test_step(batch)]
    return [(p.bboxes, p.scores, p.labels) for p in found]


@pytest.mark.parametrize(
    ("name", "data", "convolutions"),
    [
        ("fcos_r50-dcnv2-c3-c5_digits", "digits", 4 + 6 + 3),  # one in each block of ResNet-50's last three stages
        ("fcos_r18-dcnv2_deformed-digits", "deformed", 4 + 4),
    ],
)
def test_trains_tests_and_survives_saving(name, data, convolutions, tmp_path, request):
    data = request.getfixturevalue(data)
    runner = Runner.from_cfg(config(name, data, tmp_path))
    layers = [m for m in runner.model.modules() if isinstance(m, ModulatedDeformConv2dPack)]
    assert len(layers) == convolutions
    assert not any(m.conv_offset.weight.any() for m in layers)
    runner.train()
    assert all(m.conv_offset.weight.any() for m in layers), "the offsets learn from the first step on"
    metrics = runner.test()
    assert 0 <= metrics["coco/bbox_mAP"] <= 1
    expected = predict(runner.model, runner.test_dataloader)
    assert sum(len(boxes) for boxes, *_ in expected) > 0

    other = Runner.from_cfg(config(name, data, tmp_path / "other"))
    load_checkpoint(other.model, str(tmp_path / "iter_2.pth"), strict=True)
    for before, after in zip(expected, predict(other.model, other.test_dataloader), strict=True):
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(provide_mmcv_ext(), reason="mmcv-lite: no compiled operators to compare with")
def test_mmcv_lite_trains_the_same_weights_and_finds_the_same_boxes(digits, tmp_path):
    """To the last bit: what mmcv has compiled runs in no step of this training, and its NMS keeps the same boxes."""

    def trained(name, **blocked):
        code = f"""
from pathlib import Path
from mmengine.runner import Runner
from tests.projects.test_digits import config, predict
torch.set_num_threads(2)
runner = Runner.from_cfg(config("fcos_r50-dcnv2-c3-c5_digits", Path({str(digits)!r}), Path({str(tmp_path / name)!r})))
runner.train()
found = predict(runner.model, runner.test_dataloader)
torch.save((runner.model.state_dict(), found), {str(tmp_path / name)!r} + ".pth")
"""
        run(code, **blocked)
        return torch.load(tmp_path / f"{name}.pth")

    weights, found = trained("lite", missing=("mmcv._ext",))
    expected_weights, expected = trained("compiled")
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())
    assert sum(len(boxes) for boxes, *_ in expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("faster-rcnn_r18-deform-roi-align_deformed-digits", "coco/bbox_mAP"),
        ("semantic-fpn_r18-dcnv2_deformed-digits", "mIoU"),
    ],
)
def test_the_compared_trains_and_tests(name, metric, deformed, tmp_path):
    runner = Runner.from_cfg(config(name, deformed, tmp_path))
    runner.train()
    assert 0 <= runner.test()[metric] <= 100


def test_is_this_checkout():
    assert Path(dcn_plugin.__file__).parents[1] == ROOT


def load_program(name):
    spec = spec_from_file_location(name, ROOT / "projects" / "digits" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def demo():
    return load_program("demo")


def test_the_demo_shows_a_few_lines_of_a_long_log():
    lines = [
        f"11/21 18:00:00 - mmengine - INFO - Epoch(train)  [{epoch}][{done:3d}/150]  base_lr: 1e-3 lr: 1e-3  "
        f"eta: 0:05:0{epoch}  time: 0.3300  data_time: 0.01  loss: 1.5{epoch}  loss_cls: 0.7\n"
        for epoch in range(1, 9)
        for done in range(10, 151, 10)
    ]
    progress = demo().Progress(epochs=8)
    shown = [text for text in map(progress, ["noise\n", *lines]) if text]
    assert 7 <= len(shown) <= 9
    assert shown[0] == "    epoch 1 of 8,   1%, loss 1.51, 0:05:01 left"
    assert shown[-1] == "    epoch 8 of 8, 100%, loss 1.58, 0:05:08 left"


def test_the_demo_goes_on_only_with_the_same_config(tmp_path):
    last_checkpoint, work_dir = demo().last_checkpoint, tmp_path / "work"
    work_dir.mkdir()
    assert last_checkpoint(work_dir, "max_epochs = 8\n") is None
    (work_dir / "config.txt").write_text("max_epochs = 8\n")
    (work_dir / "last_checkpoint").write_text(str(work_dir / "epoch_3.pth"))
    assert last_checkpoint(work_dir, "max_epochs = 8\n") is None  # written down, but not there
    (work_dir / "epoch_3.pth").touch()
    assert last_checkpoint(work_dir, "max_epochs = 8\n") == work_dir / "epoch_3.pth"
    assert last_checkpoint(work_dir, "max_epochs = 9\n") is None


def test_a_failing_step_of_the_demo_shows_the_end_of_its_log(tmp_path, capfd):
    log = tmp_path / "log" / "demo.log"
    demo().run("Step", "-c", "print('fine')", log=log, verbose=False)
    with pytest.raises(SystemExit, match=f"error: Step failed; the whole output: {log}"):
        demo().run("Step", "-c", "raise RuntimeError('no disk')", log=log, verbose=False)
    assert "RuntimeError: no disk" in capfd.readouterr().err and "fine" in log.read_text()


def row(ap, **others):
    scores = dict.fromkeys(load_program("compare").AP, ap)
    layers = {"backbone.layer3.0.conv1": dict(offset_mean=ap, offset_max=2.0, offset_outside=0.1)}
    return dict(**scores, parameters=341032, macs=60486912, seconds=0.0561, layers=layers) | others


def test_the_tables_of_recorded_results():
    compare = load_program("compare")
    results = {"plain": {"0": row(30.0, layers={}), "1": row(32.0, layers={})}, "DCNv2 c3-c4": {"0": row(34.0)}}
    plain, deformable = compare.table(results, "detector", compare.AP).splitlines()[2:]
    assert plain.startswith("| plain | 2 | 31.0 ± 1.4 |") and plain.endswith("| 341 k | 60.5 M | 0.056 |")
    assert deformable.startswith("| DCNv2 c3-c4 | 1 | 34.0 | 34.0 |") and "| +4.0 |" in deformable
    assert compare.layers_table(results).splitlines()[2:] == [
        "| DCNv2 c3-c4 | layer3.0.conv1 | 34.00 | 2.00 | 0.10 |  |"
    ]


def test_what_is_written_of_results(tmp_path):
    compare, loss = load_program("compare"), [[10, 2.0], [20, 1.0]]
    results = {
        compare.TWIN: {"0": row(30.0, layers={}, loss=loss), "1": row(32.0, layers={}, loss=loss)},
        compare.DEMO: {"0": row(34.0, loss=loss)},
        "RoI align": {"0": row(35.0, macs=None)},
        "segmentation, plain": {"0": dict(row(0.0), mIoU=50.0)},
    }
    compare.write(results, tmp_path)
    tables = (tmp_path / "table.md").read_text().split("\n\n")
    assert [table.split("|")[1].strip() for table in tables] == [
        "FCOS",
        "Faster R-CNN",
        "semantic segmentation",
        "detector",
    ]
    text = " ".join(ElementTree.parse(tmp_path / "ap.svg").getroot().itertext())
    assert "plain (2)" in text and "DCNv2 c3-c4 (1)" in text and compare.DEMO in text and "RoI align" not in text
    assert (tmp_path / "ap.png").exists()


def test_what_is_recorded_is_not_trained_again():
    results = {"plain": {"0": row(30.0)}, "DCN c4": {"1": row(34.0)}}
    assert load_program("compare").missing(results, ["plain", "DCN c4"], 2) == [("DCN c4", 0), ("plain", 1)]


def test_the_arms_build_what_they_say():
    compare = load_program("compare")
    for name, arm in compare.ARMS.items():
        cfg = compare.configure(arm, 0, Path("work"))
        roots = [cfg[f"{split}_dataloader"].dataset.data_root for split in ("train", "val", "test")]
        assert roots == [f"{arm.data}/", f"{compare.DATA}/", f"{compare.DATA}/"]
        kinds = {type(m).__name__ for m in MODELS.build(dict(cfg.model, _scope_="mmdet")).modules()}
        assert ("ModulatedDeformConv2dPack" in kinds) == ("DCNv2" in name)
        assert ("DeformConv2dPack" in kinds) == ("DCN " in name)
        assert ("ModulatedDeformRoIAlignPack" in kinds) == ("deformable RoI" in name)
        start = compare.ARMS.get(arm.start)
        assert start is None or (start.start is None and start.data == arm.data)


def test_ap_by_size(tmp_path):
    compare = load_program("compare")
    boxes = [[0, 0, 10, 10], [20, 20, 30, 30], [10, 10, 60, 60]]
    annotations = [
        dict(id=1 + i, image_id=i, category_id=0, bbox=box, area=box[2] * box[3], iscrowd=0)
        for i, box in enumerate(boxes)
    ]
    images = [dict(id=i, width=96, height=96) for i in range(3)]
    truth = dict(images=images, annotations=annotations, categories=[dict(id=0, name="0")])
    found = [dict(image_id=i, category_id=0, bbox=boxes[i], score=0.9) for i in (0, 2)]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(found))
    scores = compare.evaluate(tmp_path / "truth.json", tmp_path / "found.json")
    assert (scores["AP small"], scores["AP medium"], scores["AP large"]) == (100, 0, 100)
    assert scores["AP"] == scores["AP50"] == pytest.approx(67, abs=1)  # 67 of 101 recalls
