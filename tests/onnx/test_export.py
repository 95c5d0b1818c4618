"""``torch.onnx.export`` of layers: opsets, dynamic sizes, both exporters, and what each error says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxscript", reason="exports to ONNX")
pytest.importorskip("onnxruntime", reason="runs what is exported")

import onnx

import dcn_plugin.onnx
from dcn_plugin.layers import DeformConv2d, DeformRoIAlignPack
from dcn_plugin.ops import deform_roi_align

from ..ops.cases import relative_error
from .exporting import Calls, export, onnxruntime


@pytest.fixture
def layers():
    """v1 and v2 one after the other, their offsets a few pixels."""
    made = torch.nn.Sequential(
        dcn_plugin.layers.ModulatedDeformConv2dPack(4, 6, 3, padding=1, deform_groups=2, mask_scale=2.0),
        dcn_plugin.layers.DeformConv2dPack(6, 8, 3, stride=2, padding=2, dilation=2, groups=2, max_offset=3),
    )
    for layer in made:
        torch.nn.init.normal_(layer.conv_offset.weight, std=0.3)
    return made.eval()


def check(model, path, inputs):
    with torch.no_grad():
        error = relative_error(onnxruntime(path, [inputs])[0], model(inputs))
    print(f"largest deviation: {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("opset", [19, 20, 22, 23])
def test_dynamic_batch_and_sizes(layers, opset, tmp_path):
    path = export(
        layers,
        (torch.randn(2, 4, 8, 8),),
        tmp_path / "model.onnx",
        opset_version=opset,
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
    )
    model = onnx.load(path)
    assert model.opset_import[0].version == opset
    assert [node.op_type for node in model.graph.node].count("DeformConv") == 2
    assert {node.domain for node in model.graph.node} == {""}
    check(layers, path, torch.randn(3, 4, 9, 14))


@pytest.mark.parametrize("opset", [19, 20])
def test_torchscript_exporter(layers, opset, tmp_path):
    axes = {0: "batch", 2: "height", 3: "width"}
    path = export(
        layers,
        (torch.randn(2, 4, 8, 8),),
        tmp_path / "model.onnx",
        dynamo=False,
        custom_translation_table=None,
        opset_version=opset,
        input_names=["images"],
        dynamic_axes=dict(images=axes),
    )
    check(layers, path, torch.randn(3, 4, 9, 14))


def test_an_exported_program(layers, tmp_path):
    images = torch.randn(2, 4, 8, 8)
    program = torch.export.export(layers, (images,))
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, f=str(path), custom_translation_table=dcn_plugin.onnx.translations(), verbose=False)
    check(layers, str(path), images)


def test_dynamic_number_of_rois(tmp_path):
    model = Calls(deform_roi_align, [(dict(input=0, rois=0, offset=0), dict(output_size=3, sampling_ratio=2))])
    rois = torch.tensor([[0, 1.0, 2.0, 7.0, 9.0]])
    images, dynamic = torch.randn(2, 4, 8, 8), {0: "rois"}
    inputs = (images, rois.repeat(2, 1), torch.randn(2, 2, 3, 3))
    path = export(model, inputs, tmp_path / "model.onnx", dynamic_shapes=(({0: "batch"}, dynamic, dynamic),))
    for count in (0, 1, 5):
        inputs = images, rois.repeat(count, 1), torch.randn(count, 2, 3, 3)
        (output,) = onnxruntime(path, inputs)
        expected = deform_roi_align(*inputs, output_size=3, sampling_ratio=2)
        assert relative_error(output, expected) < 1e-5


def cause(error):
    """The messages of an exception and of all that led to it."""
    text = ""
    while error is not None:
        text, error = f"{text}{error}\n", error.__cause__
    return text


def test_opset_18_is_refused(layers, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        export(layers, (torch.randn(1, 4, 8, 8),), path, opset_version=18)
    assert "needs ONNX opset 19 or later (DeformConv), not 18" in cause(error.value)
    assert not path.exists()


def test_torchscript_refuses_opset_18(layers, tmp_path):
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="'dcn_plugin::deform_conv2d' .* version 18"):
        export(
            layers,
            (torch.randn(1, 4, 8, 8),),
            tmp_path / "model.onnx",
            dynamo=False,
            custom_translation_table=None,
            opset_version=18,
        )


def test_sampling_ratio_0_is_refused(tmp_path):
    model = DeformRoIAlignPack(3, 4, 8, sampling_ratio=0).eval()
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        export(model, (torch.randn(1, 4, 8, 8), torch.zeros(1, 5)), tmp_path / "model.onnx")
    assert "deform_roi_align with sampling_ratio=0 has no ONNX form" in cause(error.value)


def fresh(code):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, sys.path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_translations_the_error_names_them():
    code = """
import torch
from dcn_plugin.layers import DeformConv2d
try:
    torch.onnx.export(DeformConv2d(1, 1, 1).eval(), (torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4)), dynamo=True)
except Exception as error:
    assert "custom_translation_table=dcn_plugin.onnx.translations()" in str(error), error
else:
    raise SystemExit("exported")
"""
    fresh(code)


def test_without_onnxscript_the_error_names_the_extra():
    code = """
import sys
sys.modules["onnxscript"] = None
import dcn_plugin.onnx
try:
    dcn_plugin.onnx.translations()
except ImportError as error:
    assert "needs onnxscript, which is not installed: `pip install dcn_plugin[onnx]`" in str(error), error
else:
    raise SystemExit("translated")
"""
    fresh(code)


def test_the_core_imports_none_of_it():
    code = "import sys, dcn_plugin; print({'onnx', 'onnxscript', 'torch.onnx', 'dcn_plugin.onnx'} & set(sys.modules))"
    assert fresh(code).strip() == "set()"


def test_layers_whose_offsets_are_inputs(tmp_path):
    layer = DeformConv2d(4, 4, 3).eval()
    inputs = torch.randn(1, 4, 8, 8), torch.randn(1, 18, 6, 6)
    path = export(layer, inputs, Path(tmp_path, "model.onnx"))
    with torch.no_grad():
        assert relative_error(onnxruntime(path, inputs)[0], layer(*inputs)) < 1e-5
