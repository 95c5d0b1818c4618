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
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import dcn_plugin.onnx
from dcn_plugin.layers import DeformConv2d, DeformRoIAlignPack, MultiScaleDeformableAttention
from dcn_plugin.ops import deform_roi_align, ms_deform_attn

from ..ops.cases import relative_error
from .exporting import Calls, export, feed, onnxruntime


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


SIZES = [(4, 6), (2, 3)]


def attention_inputs(batch, queries):
    """value, sampling_locations, attention_weights"""
    locations = 1.4 * torch.rand(batch, queries, 2, 2, 3, 2) - 0.2
    return torch.randn(batch, 30, 2, 4), locations, torch.rand(batch, queries, 2, 2, 3)


class Attend(torch.nn.Module):
    def forward(self, value, locations, weights):
        return ms_deform_attn(value, SIZES, locations, weights)


@pytest.mark.parametrize("opset", [18, 19, 20, 22, 23])
def test_attention_with_a_dynamic_batch_and_number_of_queries(opset, tmp_path):
    queries = {0: "batch", 1: "queries"}
    shapes = {0: "batch"}, queries, queries
    path = export(Attend(), attention_inputs(2, 5), tmp_path / "model.onnx", opset_version=opset, dynamic_shapes=shapes)
    model = onnx.load(path)
    assert model.opset_import[0].version == opset
    assert [node.op_type for node in model.graph.node].count("GridSample") == len(SIZES)
    assert {node.domain for node in model.graph.node} == {""}
    for batch, queries in ((2, 5), (3, 1), (1, 0)):
        inputs = attention_inputs(batch, queries)
        (output,) = onnxruntime(path, inputs)
        expected = Attend()(*inputs)
        assert output.shape == expected.shape and (not output.numel() or relative_error(output, expected) < 1e-5)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_a_layer_of_deformable_detr(listed, coordinates, tmp_path):
    class Layer(torch.nn.Module):
        """The sizes of the levels in the model, or an input."""

        def __init__(self):
            super().__init__()
            self.attention = MultiScaleDeformableAttention(16, 4, 2, 3, batch_first=True)
            self.norm = torch.nn.LayerNorm(16)
            torch.nn.init.normal_(self.attention.sampling_offsets.weight)
            torch.nn.init.normal_(self.attention.attention_weights.weight)

        def forward(self, query, value, padding, reference, shapes=SIZES):
            return self.norm(
                self.attention(
                    query, value=value, key_padding_mask=padding, reference_points=reference, spatial_shapes=shapes
                )
            )

    layer, padding = Layer().eval(), torch.rand(2, 30) < 0.3
    inputs = torch.randn(2, 7, 16), torch.randn(2, 30, 16), padding, torch.rand(2, 7, 2, coordinates)
    inputs = inputs if listed else (*inputs, torch.tensor(SIZES))
    path = export(layer, inputs, tmp_path / "model.onnx")
    with torch.no_grad():
        error = relative_error(onnxruntime(path, inputs)[0], layer(*inputs))
    print(f"largest deviation: {error:.1e}")
    assert error < 1e-5


class Pyramid(torch.nn.Module):
    """An encoder's attention to maps of any size."""

    def __init__(self):
        super().__init__()
        self.attention = MultiScaleDeformableAttention(8, 2, 2, 3, batch_first=True)
        torch.nn.init.normal_(self.attention.sampling_offsets.weight)

    def forward(self, image):
        maps = [image, torch.nn.functional.avg_pool2d(image, 2)]
        sizes = [tuple(one.shape[-2:]) for one in maps]
        query = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)
        reference = torch.sigmoid(query[:, :, None, :2]).expand(-1, -1, 2, -1)
        return self.attention(query, reference_points=reference, spatial_shapes=sizes)


def test_attention_to_maps_of_any_size(tmp_path):
    model = Pyramid().eval()
    shapes = ({2: 2 * torch.export.Dim("height", min=2, max=64), 3: 2 * torch.export.Dim("width", min=2, max=64)},)
    path = export(model, (torch.randn(1, 8, 8, 12),), tmp_path / "model.onnx", dynamic_shapes=shapes)
    for size in ((8, 12), (6, 20)):
        check(model, path, torch.randn(1, 8, *size))


def by_torchscript(model, inputs, path, **options):
    return export(model, inputs, path, dynamo=False, custom_translation_table=None, **options)


@pytest.mark.parametrize("opset", [16, 19, 20])
def test_torchscript_exporter_with_attention(opset, tmp_path):
    axes = dict(value={0: "batch"}, locations={0: "batch", 1: "queries"}, weights={0: "batch", 1: "queries"})
    options = dict(opset_version=opset, input_names=list(axes), dynamic_axes=axes)
    path = by_torchscript(Attend(), attention_inputs(2, 5), tmp_path / "model.onnx", **options)
    for batch, queries in ((2, 5), (3, 1)):
        inputs = attention_inputs(batch, queries)
        assert relative_error(onnxruntime(path, inputs)[0], Attend()(*inputs)) < 1e-5


def test_torchscript_exporter_with_attention_to_what_has_fixed_sizes(tmp_path):
    inputs = attention_inputs(2, 5)
    path = by_torchscript(Attend(), inputs, tmp_path / "model.onnx", opset_version=20)
    assert relative_error(onnxruntime(path, inputs)[0], Attend()(*inputs)) < 1e-5


@pytest.fixture
def torchscript_writes_the_plugin():
    name, of_tensorrt = "dcn_plugin::ms_deform_attn", dcn_plugin.onnx.ms_deform_attn_tensorrt_symbolic
    torch.onnx.register_custom_op_symbolic(name, of_tensorrt, 18)
    yield
    torch.onnx.unregister_custom_op_symbolic(name, 18)


@pytest.mark.parametrize("dynamo", [True, False])
def test_tensorrts_plugin(dynamo, torchscript_writes_the_plugin, tmp_path):
    """Its inputs, in its order and dtypes; onnx's evaluator computes it, since TensorRT alone has it."""
    inputs, path, queries = attention_inputs(2, 5), tmp_path / "model.onnx", {0: "batch", 1: "queries"}
    if dynamo:
        table, shapes = dcn_plugin.onnx.translations(tensorrt_plugin=True), ({0: "batch"}, queries, queries)
        path = export(Attend(), inputs, path, custom_translation_table=table, dynamic_shapes=shapes)
    else:
        axes = dict(value={0: "batch"}, locations=queries, weights=queries)
        options = dict(opset_version=18, input_names=list(axes), dynamic_axes=axes)
        path = by_torchscript(Attend(), inputs, path, **options)
    model = onnx.load(path)
    assert "GridSample" not in {node.op_type for node in model.graph.node}
    [plugin] = [node for node in model.graph.node if node.op_type == "MultiscaleDeformableAttnPlugin_TRT"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in plugin.attribute}
    assert attributes == dict(plugin_version=b"1", plugin_namespace=b"")

    class MultiscaleDeformableAttnPlugin_TRT(OpRun):
        op_domain = plugin.domain

        def _run(self, value, sizes, starts, locations, weights, **attributes):
            assert [a.dtype.name for a in (value, sizes, starts, locations, weights)] == [
                "float32",
                "int32",
                "int32",
                "float32",
                "float32",
            ]
            assert sizes.tolist() == [list(size) for size in SIZES] and starts.tolist() == [0, 24]
            value, locations, weights = map(torch.tensor, (value, locations, weights))
            output = ms_deform_attn(value, torch.tensor(sizes).long(), locations, weights)
            return (output.unflatten(-1, value.shape[2:]).numpy(),)

    evaluator = ReferenceEvaluator(path, new_ops=[MultiscaleDeformableAttnPlugin_TRT])
    for batch, queries in ((2, 5), (1, 3)):
        inputs = attention_inputs(batch, queries)
        (output,) = evaluator.run(None, feed(evaluator.input_names, inputs))
        torch.testing.assert_close(torch.from_numpy(output), Attend()(*inputs))


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
