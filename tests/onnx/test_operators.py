"""Exported operators compute, in ONNX Runtime and in onnx's own evaluator, what the reference computes."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("onnxscript", reason="exports to ONNX")
pytest.importorskip("onnxruntime", reason="runs what is exported")

from dcn_plugin.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_align, ms_deform_attn, reference

from ..ops import test_deform_ps_roi_pool as ps_roi_pool
from ..ops import test_deform_roi_align as roi_align
from ..ops.cases import BASE, CONV_CASES, as_float64, relative_error
from .exporting import RUNTIMES, Calls, export

# Of the largest value. ONNX Runtime's sums are float32 as ours; in float16 it computes positions in float16, too.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def border_cases(dtype):
    """One sample at every position of interest of a (4, 5) map, as in the operator's own test."""
    case = replace(BASE, batch=1, channels=2, size=(4, 5), out_channels=1, kernel=1, padding=0)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    near = 1e-6 if dtype == torch.float32 else 2**-8  # float16 has no position nearer to the border
    for y in (-1.0, -1 + near, -0.5, 0.0, 3.0, 3.5, 4 - near, 4.0):
        for x in (-1.0, -0.25, 2.0, 4.75, 5.0):
            tensors = case.make(dtype)
            tensors["offset"] = torch.stack([y - rows, x - columns])[None].to(dtype)
            yield f"border({y:g}, {x:g})", tensors, case.options


def wild_cases(dtype):
    for wild in (1e4, -1e4, 1e9, -1e9, 1e30, math.inf, -math.inf, math.nan):
        tensors = BASE.make(dtype)
        tensors["offset"][:, ::4] = wild  # y of every other tap
        yield f"wild {wild}", tensors, BASE.options


def check(function, truth, cases, path, tolerance, runtimes=("onnxruntime",)):
    """Compares each case of one exported model, which all runtimes run, with the reference on the same values."""
    model = Calls(function, [(tensors, options) for _, tensors, options in cases])
    path, names = export(model, model.inputs(), path), [name for name, _, _ in cases]
    expected = [truth(**as_float64(tensors), **options) for _, tensors, options in cases]
    for runtime in runtimes:
        outputs = RUNTIMES[runtime](path, model.inputs())
        errors = {n: relative_error(o, e) for n, o, e in zip(names, outputs, expected, strict=True)}
        worst = max(errors, key=errors.get)
        print(f"{runtime}: largest deviation {errors[worst]:.1e} ({worst})")
        assert all(e <= tolerance for e in errors.values()), {n: e for n, e in errors.items() if not e <= tolerance}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_deform_conv2d_in_onnxruntime(dtype, tmp_path):
    cases = [(name, case.make(dtype), case.options) for name, case in CONV_CASES.items()]
    cases += [*border_cases(dtype), *wild_cases(dtype)]
    check(deform_conv2d, reference.deform_conv2d, cases, tmp_path / "model.onnx", TOLERANCE[dtype])


# The evaluator loops over output values in Python, so cases are small. It divides by a map's height - 1 and width - 1.
SMALL = ("base", "v1-no-bias", "5x1", "stride-asymmetric", "dilation-asymmetric", "groups-do-not-divide")


@DTYPES
def test_deform_conv2d_in_the_reference_evaluator(dtype, tmp_path):
    cases = [(n, replace(CONV_CASES[n], batch=1, size=(4, 5)).make(dtype), CONV_CASES[n].options) for n in SMALL]
    cases += border_cases(dtype)
    path, tolerance = tmp_path / "model.onnx", TOLERANCE[dtype]
    check(deform_conv2d, reference.deform_conv2d, cases, path, tolerance, ["reference_evaluator"])


ROI_OPTIONS = {
    "plain": dict(offset=False, mask=False, sampling_ratio=2),
    "v1": dict(offset=True, mask=False, sampling_ratio=1),
    "v2": dict(offset=True, mask=True, sampling_ratio=3, output_size=7, gamma=0.5),
}
WILD_ROIS = [
    [1.0, 4.0, 4.0, math.nan, 20.0],
    [math.nan, 4.0, 4.0, 20.0, 20.0],
    [0.0, 4.0, 4.0, math.inf, 20.0],
    [0.0, -3e4, 4.0, 3e4, 20.0],
]


@DTYPES
def test_deform_roi_align(dtype, tmp_path):
    rois = torch.tensor([*roi_align.WHOLE_ROIS.tolist(), *WILD_ROIS]).to(dtype)
    cases = []
    for name, options in ROI_OPTIONS.items():
        options = {**roi_align.OPTIONS, **options}
        bins = (len(rois), 2, *ps_roi_pool.pair(options["output_size"]))
        tensors = dict(input=torch.randn(2, 5, 11, 13).to(dtype), rois=rois)
        tensors["offset"] = torch.randn(bins).to(dtype) if options.pop("offset") else None
        tensors["mask"] = torch.rand(bins)[:, :1].to(dtype) if options.pop("mask") else None
        cases.append((name, tensors, options))
    check(deform_roi_align, reference.deform_roi_align, cases, tmp_path / "model.onnx", TOLERANCE[dtype], RUNTIMES)


@DTYPES
def test_deform_ps_roi_pool(dtype, tmp_path):
    rois = torch.tensor([*ps_roi_pool.ROIS[:4].tolist(), *WILD_ROIS])
    cases = []
    for name, classes in [("bins", 0), ("fewer", 0), *((name, 2) for name in ps_roi_pool.SIZES)]:
        sizes = ps_roi_pool.SIZES[name]
        tensors = ps_roi_pool.make(dtype, classes=classes, rois=rois, options=sizes)
        tensors["rois"] = rois.to(dtype)
        cases.append((f"{name}, {classes} classes", tensors, {**ps_roi_pool.OPTIONS, **sizes}))
    check(deform_ps_roi_pool, reference.deform_ps_roi_pool, cases, tmp_path / "model.onnx", TOLERANCE[dtype], RUNTIMES)


def test_float32_rois_beside_half_features(tmp_path):
    tensors = dict(input=torch.randn(2, 5, 11, 13).half(), rois=roi_align.ROIS, offset=torch.randn(6, 2, 3, 4).half())
    cases = [("float32 RoIs", tensors, {**roi_align.OPTIONS, "sampling_ratio": 2})]
    check(deform_roi_align, reference.deform_roi_align, cases, tmp_path / "model.onnx", 2**-10)


LEVELS = [(4, 5), (3, 1), (1, 1)]


def attention_cases(dtype):
    """(name, tensors, options), the sizes of the levels in place of a tensor."""

    def case(name, locations, sizes=LEVELS, channels=4):
        batch, _, heads = locations.shape[:3]
        tensors = dict(
            value=torch.randn(batch, sum(h * w for h, w in sizes), heads, channels).to(dtype),
            sampling_locations=locations if dtype is torch.float64 else locations.float(),
            attention_weights=torch.rand(locations.shape[:-1]).to(dtype),
        )
        return name, tensors, dict(spatial_shapes=sizes)

    double = dict(dtype=torch.float64)
    yield case("levels", 1.6 * torch.rand(2, 5, 3, 3, 2, 2, **double) - 0.3)
    yield case("one of all", torch.rand(1, 1, 1, 1, 1, 2, **double), [(7, 6)], 1)
    pixels = torch.tensor([-1.5, -1.0, -1 + 1e-3, -0.5, 0.0, 1.25, 4.0, 4.5, 5 - 1e-3, 5.0, 6.0], **double)
    borders = (torch.cartesian_prod(pixels, pixels) + 0.5) / 5
    yield case("borders", borders.view(1, -1, 1, 1, 1, 2), [(5, 5)])
    wild = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 1e9, -1e4, 0.5], **double)
    yield case("wild", torch.cartesian_prod(wild, wild).view(1, -1, 1, 1, 1, 2), [(5, 5)])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ms_deform_attn(dtype, tmp_path):
    runtimes = list(RUNTIMES) if dtype is not torch.float64 else ["onnxruntime"]  # onnx's own samples in float32
    cases = list(attention_cases(dtype))
    check(ms_deform_attn, reference.ms_deform_attn, cases, tmp_path / "model.onnx", TOLERANCE[dtype], runtimes)
