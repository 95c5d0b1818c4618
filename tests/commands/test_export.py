"""``python -m dcn_plugin export``: small detectors of every kind, written, read again and compared; its errors."""

import importlib.util
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="exports mmdet's detectors")

from mmengine.registry import MODELS
from torch import nn

import dcn_plugin
from dcn_plugin.__main__ import main
from dcn_plugin.commands import _config
from dcn_plugin.commands.export import compare, export

ONNX = pytest.mark.skipif(
    find_spec("onnxscript") is None or find_spec("onnxruntime") is None, reason="needs onnxscript and onnxruntime"
)
OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")

RESNET = (
    "backbone=dict(depth=18, base_channels=8, stem_channels=8, frozen_stages=-1, init_cfg=None,"
    " deformable=dict(type='DCNv2', targets=['layer3', 'layer4'])),"
    " neck=dict(in_channels=[8, 16, 32, 64], out_channels=16)"
)
GROUP_NORM = ", norm_cfg=dict(type='GN', num_groups=4)"


def on_resnet(more=""):
    return f"dict({RESNET}, bbox_head=dict(num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1{more}))"


SMALL_CSP = "widen_factor=0.125, deepen_factor=0.1"
DETECTORS = {
    "retinanet": ("retinanet/retinanet_r50_fpn_1x_coco.py", on_resnet()),
    "fcos": ("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", on_resnet(GROUP_NORM)),
    "atss": ("atss/atss_r50_fpn_1x_coco.py", on_resnet(GROUP_NORM)),
    "reppoints": (
        "reppoints/reppoints-moment_r50_fpn_1x_coco.py",
        on_resnet(", point_feat_channels=16"),
    ),
    "vfnet": ("vfnet/vfnet_r50_fpn_1x_coco.py", on_resnet(GROUP_NORM)),
    "yolox": (
        "yolox/yolox_s_8xb8-300e_coco.py",
        f"dict(backbone=dict({SMALL_CSP}, deformable=dict(targets=['stage3', 'stage4'])),"
        " neck=dict(in_channels=[32, 64, 128], out_channels=16),"
        " bbox_head=dict(num_classes=3, in_channels=16, feat_channels=16))",
    ),
    "rtmdet": (
        "rtmdet/rtmdet_s_8xb32-300e_coco.py",
        f"dict(backbone=dict({SMALL_CSP}, init_cfg=None,"
        " deformable=dict(targets=['stage3', 'stage4'], depthwise=False)),"
        " neck=dict(in_channels=[32, 64, 128], out_channels=16, num_csp_blocks=1),"
        " bbox_head=dict(num_classes=3, in_channels=16, feat_channels=16))",
    ),
    "faster-rcnn": (
        "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
        f"dict({RESNET}, rpn_head=dict(in_channels=16, feat_channels=16),"
        " roi_head=dict(bbox_roi_extractor=dict(out_channels=16),"
        " bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=3)))",
    ),
}


@pytest.fixture
def detector(tmp_path):
    """The config and checkpoint of a small detector by its name, with random weights; its offsets reach some pixels."""

    def make(name, extra=""):
        base, model = DETECTORS[name]
        config, checkpoint = tmp_path / f"{name}.py", tmp_path / f"{name}.pth"
        config.write_text(f"_base_ = 'mmdet::{base}'\nmodel = {model}\n{extra}\n")
        built = _config.build(_config.load(str(config)))
        for module in built.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
            if hasattr(module, "conv_offset"):
                nn.init.normal_(module.conv_offset.weight, std=0.3)
        torch.save(dict(state_dict=built.state_dict()), checkpoint)
        return str(config), str(checkpoint)

    return make


def deviations(report):
    return [float(line.split("(")[-1].split()[0]) for line in report.splitlines() if line.endswith("of the largest)")]


@ONNX
@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_in_onnxruntime(name, detector, tmp_path):
    config, checkpoint = detector(name)
    path = tmp_path / "model.onnx"
    report = export(config, checkpoint, str(path), shape=(64, 96))
    assert max(deviations(report)) < 1e-4, report
    assert "compared with PyTorch (float32) on noise" in report

    import onnx

    model = onnx.load(path)
    names = [output.name for output in model.graph.output]
    about = json.loads((tmp_path / "model.onnx.json").read_text())
    assert [value.name for value in model.graph.input] == ["images"] and about["outputs"] == names
    assert about["input"]["shape"] == [1, 3, 64, 96] and about["input"]["dtype"] == "float32"
    deformable = [node.op_type for node in model.graph.node].count("DeformConv")
    assert deformable >= (4 if name == "vfnet" else 2)
    if name == "faster-rcnn":
        assert "roi_head stays in PyTorch" in report and about["stays_in_pytorch"] == "roi_head"
        assert names[0] == "map_0" and "rpn_cls_scores_0" in names
    else:
        assert names[0] == "cls_scores_0" and "bbox_preds_0" in names


@ONNX
def test_dynamic_sizes_normalisation_and_float16_in_onnxruntime(detector, tmp_path):
    config, checkpoint = detector("fcos")
    report = export(config, checkpoint, str(tmp_path / "a.onnx"), shape=(160, 192), dynamic=True, normalize=True)
    assert "2x160x192, 1x224x224" in report and max(deviations(report)) < 1e-4
    about = json.loads((tmp_path / "a.onnx.json").read_text())["input"]
    assert about["shape"] == ["any", 3, *["a multiple of 32, from 160 on"] * 2]
    assert about["mean"] is None and about["channels"] == "BGR"
    report = export(config, checkpoint, str(tmp_path / "b.onnx"), shape=(64, 96), dtype="float16", batch=2)
    assert max(deviations(report)) < 2e-2
    about = json.loads((tmp_path / "b.onnx.json").read_text())["input"]
    assert about["shape"] == [2, 3, 64, 96] and about["dtype"] == "float16"


@OPENVINO
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rtmdet", {}),
        ("fcos", dict(dynamic=True, normalize=True, shape=(160, 192))),
        ("vfnet", {}),
        ("reppoints", {}),
        ("atss", dict(dtype="float16")),
    ],
)
def test_openvino(name, options, detector, tmp_path):
    config, checkpoint = detector(name)
    report = export(config, checkpoint, str(tmp_path / "model.xml"), **{"shape": (64, 96), **options})
    assert max(deviations(report)) < (2e-2 if options.get("dtype") else 1e-4), report
    assert {file.name for file in tmp_path.glob("model*")} == {"model.xml", "model.bin", "model.xml.json"}


@OPENVINO
def test_openvino_names_the_layer_that_it_cannot_convert(errors, monkeypatch):
    def fail(traced, context):
        raise ValueError("no such form")

    monkeypatch.setattr("dcn_plugin.deploy.openvino._deform_conv2d", fail)
    message = errors("retinanet", "--shape", "64", "96", target="model.xml")
    assert message == "error: backbone.layer3.0.conv1/dcn_plugin::deform_conv2d cannot be converted: no such form"


def test_torch_export_loads_with_one_library_alone(detector, tmp_path):
    config, checkpoint = detector("retinanet")
    path = tmp_path / "model.pt2"
    report = export(config, checkpoint, str(path), shape=(160, 192), dynamic=True)
    assert max(deviations(report)) < 1e-5
    library = Path(dcn_plugin.__file__).parent / "_cpu.so"
    assert f"load {library} first" in report
    code = f"""
import sys, torch
torch.ops.load_library({str(library)!r})
outputs = torch.export.load({str(path)!r}).module()(torch.zeros(2, 3, 192, 256))
assert outputs[0].shape == (2, 27, 24, 32), outputs[0].shape
assert not {{"dcn_plugin", "mmdet", "mmengine"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@ONNX
def test_images_named_and_of_the_test_set(detector, tmp_path):
    import cv2
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "one.png"), pixels)
    info = dict(images=[dict(id=1, file_name="one.png", height=64, width=96)], annotations=[], categories=[])
    (tmp_path / "test.json").write_text(json.dumps(info))
    data = f"dict(data_root={str(tmp_path)!r}, ann_file='test.json', data_prefix=dict(img=''))"
    extra = f"test_dataloader = dict(dataset={data})\n"
    config, checkpoint = detector("retinanet", extra)
    report = export(config, checkpoint, str(tmp_path / "a.onnx"), shape=(64, 96))
    assert "on 1 images" in report
    report = export(config, checkpoint, str(tmp_path / "a.onnx"), shape=(64, 96), image=[str(tmp_path / "one.png")] * 2)
    assert "on 2 images" in report
    about = json.loads((tmp_path / "a.onnx.json").read_text())
    assert about["classes"][0] == "person" and about["pipeline"][0]["type"] == "LoadImageFromFile"
    assert about["head"]["type"] == "RetinaHead" and about["test_cfg"]["nms"]["type"] == "nms"


@MODELS.register_module(force=True)
class SortsInPython(nn.Module):
    """What torch.export cannot capture: it looks at values."""

    def forward(self, maps):
        return sorted(maps, key=lambda m: float(m.sum()))


@pytest.fixture
def errors(detector, tmp_path):
    """Runs the command, which must fail and leave the folder as it was; hands out what it said."""

    def errors(name, *arguments, target="model.onnx", extra=""):
        config, checkpoint = detector(name, extra)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(SystemExit) as error:
            main(["export", config, checkpoint, str(tmp_path / target), *arguments])
        assert sorted(tmp_path.iterdir()) == before
        return str(error.value)

    return errors


@ONNX
def test_a_layer_that_cannot_be_captured_is_named(errors):
    fpn = "dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=16, num_outs=5)"
    extra = f"model['neck'] = [{fpn}, dict(type='SortsInPython')]\n"
    message = errors("retinanet", "--shape", "64", "96", extra=extra)
    assert message.startswith("error: neck.1 (SortsInPython) cannot be exported: ")


@ONNX
def test_a_layer_without_a_translation_is_named_with_its_operator(errors, monkeypatch):
    from dcn_plugin import onnx

    monkeypatch.setattr(onnx, "translations", dict)
    message = errors("retinanet", "--shape", "64", "96")
    assert "backbone.layer3.0.conv1" in message and "dcn_plugin.deform_conv2d" in message


@pytest.mark.parametrize(
    ("arguments", "target", "message"),
    [
        ([], "model.tflite", "a suffix of .onnx, .xml, .pt2, or --format"),
        (["--format", "aoti"], "model.onnx", "of the format aoti ends in .pt2"),
        (["--opset", "18"], "model.onnx", "needs ONNX opset 19 or later, not 18"),
        (["--dynamic", "--shape", "128", "192"], "model.onnx", "--dynamic needs a --shape of multiples of 32"),
        ([], "nowhere/model.onnx", "nowhere: no such folder"),
        (["--shape", "64", "96", "--image", "nowhere.jpg"], "model.pt2", "nowhere.jpg: no such image"),
    ],
)
def test_errors(arguments, target, message, errors):
    assert message in errors("retinanet", *arguments, target=target)


@pytest.mark.parametrize(("target", "package"), [("model.onnx", "onnxruntime"), ("model.xml", "openvino")])
def test_a_missing_package_is_named_before_anything_is_built(target, package, errors, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("dcn_plugin.deploy.formats.find_spec", lambda name: None if name == package else find("torch"))
    monkeypatch.setattr(_config, "load_weights", None)
    message = errors("retinanet", "--shape", "64", "96", target=target)
    extra = "onnx" if target == "model.onnx" else "openvino"
    assert message == f"error: this needs {package}, which is not installed: `pip install 'dcn_plugin[{extra}]'`"


def test_detectors_without_such_a_part_are_refused(tmp_path):
    config = tmp_path / "detr.py"
    config.write_text("_base_ = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'\nmodel = dict(backbone=dict(init_cfg=None))\n")
    torch.save(dict(state_dict={}), tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="DETR has no part that computes tensors from images alone"):
        export(str(config), str(tmp_path / "empty.pth"), str(tmp_path / "model.onnx"), shape=(64, 96))


def test_deviations_are_an_error():
    ones = torch.ones(1, 2)
    assert "0.0e+00" in compare(["cls_scores_0"], [[ones]], [[ones]], 1e-3)
    for wrong in (ones * 1.01, ones * torch.nan):
        with pytest.raises(ValueError, match="cls_scores_0 deviate from PyTorch's by more than 0.001"):
            compare(["cls_scores_0"], [[ones]], [[wrong]], 1e-3)
    with pytest.raises(ValueError, match="cls_scores_0: .* in place of"):
        compare(["cls_scores_0"], [[ones]], [[ones[0]]], 1e-3)


def test_a_checkpoint_of_another_model_is_an_error(detector, tmp_path):
    config, checkpoint = detector("fcos")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    removed = next(name for name in state if "conv_offset" in name)
    for changed in ({"nothing.weight": torch.zeros(1)}, {n: t for n, t in state.items() if n != removed}):
        torch.save(dict(state_dict=changed), checkpoint)
        with pytest.raises(ValueError, match="no checkpoint of this config's model: of .* tensors .* are missing"):
            export(config, checkpoint, str(tmp_path / "model.pt2"), shape=(64, 96))
    Path(checkpoint).write_text("epoch 1\n")
    with pytest.raises(ValueError, match=r"fcos.pth is no checkpoint that torch.load reads \("):
        export(config, checkpoint, str(tmp_path / "model.pt2"), shape=(64, 96))
    assert not (tmp_path / "model.pt2").exists()
