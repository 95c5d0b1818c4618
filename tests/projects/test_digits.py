"""The demo's data set, and its detector through mmdet's Runner: end to end, but for the time it takes to learn."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="the demo runs in MMDetection")
pytest.importorskip("sklearn", reason="the demo's digits come from scikit-learn")

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


def make(out):
    command = [sys.executable, ROOT / "projects/digits/make_dataset.py", "--out", out, "--train", "6", "--val", "3"]
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


def config(digits, work_dir):
    cfg = Config.fromfile(ROOT / "configs/digits/fcos_r50-dcnv2-c3-c5_digits.py")
    cfg.work_dir = str(work_dir)
    cfg.default_scope = "mmdet"
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=1000)
    cfg.param_scheduler = None
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=2, by_epoch=False)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f"{digits}/"
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = str(digits / "val.json")
    cfg.model.test_cfg.score_thr = 0.0  # two iterations make no confident detector
    return cfg


def predict(model, loader):
    model.eval()
    with torch.no_grad():
        found = [p.pred_instances for batch in loader for p in model.test_step(batch)]
    return [(p.bboxes, p.scores, p.labels) for p in found]


def test_trains_tests_and_survives_saving(digits, tmp_path):
    runner = Runner.from_cfg(config(digits, tmp_path))
    layers = [m for m in runner.model.modules() if isinstance(m, ModulatedDeformConv2dPack)]
    assert len(layers) == 4 + 6 + 3  # every block of ResNet-50's last three stages
    assert not any(m.conv_offset.weight.any() for m in layers)
    runner.train()
    assert all(m.conv_offset.weight.any() for m in layers), "the offsets learn from the first step on"
    metrics = runner.test()
    assert 0 <= metrics["coco/bbox_mAP"] <= 1
    expected = predict(runner.model, runner.test_dataloader)
    assert sum(len(boxes) for boxes, *_ in expected) > 0

    other = Runner.from_cfg(config(digits, tmp_path / "other"))
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
runner = Runner.from_cfg(config(Path({str(digits)!r}), Path({str(tmp_path / name)!r})))
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


def test_is_this_checkout():
    assert Path(dcn_plugin.__file__).parents[1] == ROOT


def demo():
    spec = spec_from_file_location("demo", ROOT / "projects" / "digits" / "demo.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_shows_a_few_lines_of_a_long_log():
    lines = [
        f"11/21 18:00:00 - mmengine - INFO - Epoch(train)  [{epoch}][{done:3d}/150]  base_lr: 1e-3 lr: 1e-3  "
        f"eta: 0:05:0{epoch}  time: 0.3300  data_time: 0.01  loss: 1.5{epoch}  loss_cls: 0.7\n"
        for epoch in range(1, 9)
        for done in range(10, 151, 10)
    ]
    progress = demo().Progress(epochs=8)
    shown = [text for text in map(progress, ["noise\n", *lines]) if text]
    assert 20 <= len(shown) <= 26
    assert shown[0] == "    epoch 1 of 8,   1%, loss 1.51, 0:05:01 left"
    assert shown[-1] == "    epoch 8 of 8, 100%, loss 1.58, 0:05:08 left"


def test_the_demo_goes_on_only_with_the_same_config(tmp_path):
    last_checkpoint, config, work_dir = demo().last_checkpoint, tmp_path / "config.py", tmp_path / "work"
    work_dir.mkdir()
    config.write_text("max_epochs = 8\n")
    assert last_checkpoint(work_dir, config) is None
    (work_dir / "config.txt").write_text("max_epochs = 8\n")
    (work_dir / "last_checkpoint").write_text(str(work_dir / "epoch_3.pth"))
    assert last_checkpoint(work_dir, config) is None  # written down, but not there
    (work_dir / "epoch_3.pth").touch()
    assert last_checkpoint(work_dir, config) == work_dir / "epoch_3.pth"
    config.write_text("max_epochs = 9\n")
    assert last_checkpoint(work_dir, config) is None


def test_a_failing_step_of_the_demo_shows_the_end_of_its_log(tmp_path, capfd):
    log = tmp_path / "log" / "demo.log"
    demo().run("Step", "-c", "print('fine')", log=log, verbose=False)
    with pytest.raises(SystemExit, match=f"error: Step failed; the whole output: {log}"):
        demo().run("Step", "-c", "raise RuntimeError('no disk')", log=log, verbose=False)
    assert "RuntimeError: no disk" in capfd.readouterr().err and "fine" in log.read_text()
