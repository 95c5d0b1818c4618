"""What is optional: other implementations, and MMDetection. Whatever keeps one from importing, the run goes on."""

from functools import cache
from importlib import import_module

import torch
from torch.nn import functional as F

# What is imported of each.
PEERS = dict(
    mmcv="mmcv.ops",
    mmdet="mmdet.models",
    torchvision="torchvision.ops",
    openvino="openvino.opset8",
    onnxruntime="onnxruntime",
)
elsewhere = {}  # {peer: the remote.Process that it runs in}


@cache
def load(name):
    """(module or None, its version or why it is absent); of a peer in a process of its own, that instead of a module"""
    if name not in PEERS:
        return None, "not asked for"
    try:
        if name in elsewhere:
            return elsewhere[name], elsewhere[name].ask("version", peer=name).split("+")[0]
        if name == "onnxruntime":
            import_module("onnx")  # makes its graphs
        module = import_module(PEERS[name])
        return module, getattr(import_module(name), "__version__", "?").split("-")[0]
    except Exception as error:  # a broken installation raises anything at all
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:160]


def use_only(name):
    """No other peer is imported; with None, all are."""
    for other in set(PEERS) - {name} if name else ():
        del PEERS[other]


def installed():
    """({peer: version}, {peer that is absent: why})"""
    found = {name: load(name) for name in PEERS}
    return tuple({name: said for name, (m, said) in found.items() if (m is None) == gone} for gone in (False, True))


def as_under_autocast(tensor):
    """What autocast gives torchvision, whose operators lack bfloat16 and round positions to float16: float32."""
    return tensor.float() if tensor.dtype.itemsize == 2 else tensor


def conv(case, t):
    """Deformable convolutions of the tensors ``t``: (name, run)."""
    input, weight, offset, mask = t.values()
    geometry = case.stride, case.padding, case.dilation
    groups = case.groups, case.deform_groups
    mmcv, torchvision = load("mmcv")[0], load("torchvision")[0]

    def mmcvs():
        # It reads channels_last tensors as if they were contiguous, and is wrong: its caller has to copy them.
        x, w = input.contiguous(), weight.contiguous()
        if mask is None:
            return mmcv.deform_conv2d(x, offset, w, *geometry, *groups, False)
        return mmcv.modulated_deform_conv2d(x, offset, mask, w, None, *geometry, *groups)

    if mmcv:
        yield "mmcv", mmcvs
    if torchvision:

        def torchvisions():
            x, o, w, m = (t if t is None else as_under_autocast(t) for t in (input, offset, weight, mask))
            return torchvision.deform_conv2d(x, o, w, None, *geometry, m).to(case.dtype)

        yield "torchvision", torchvisions


def roi_align(bins, ratio):
    """Pools of (map, rois, offset, spatial_scale), each (name, pool): with straight bins, and with bins that move."""
    straight, moving = [], []
    if mmcv := load("mmcv")[0]:
        straight.append(("mmcv", lambda x, rois, _, s: mmcv.roi_align(x.contiguous(), rois, bins, s, ratio)))
        moving.append(
            (
                "mmcv deform_roi_pool",
                lambda x, rois, offset, s: mmcv.deform_roi_pool(x.contiguous(), rois, offset, bins, s, ratio),
            )
        )
    if torchvision := load("torchvision")[0]:

        def torchvisions(x, rois, _, scale):
            x32, rois32 = as_under_autocast(x), as_under_autocast(rois)
            return torchvision.roi_align(x32, rois32, bins, scale, ratio, aligned=True).to(x.dtype)

        straight.append(("torchvision", torchvisions))
    return straight, moving


def attention_by_grid_sample(sizes, value, maps, locations, weights):
    """Multi-scale deformable attention of PyTorch's own operators, in float32 as autocast has them; ``sizes`` are the
    maps' on the host.
    """
    batch, _, heads, channels = value.shape
    levels = as_under_autocast(value).split([height * width for height, width in sizes], 1)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1).unbind(2)  # each (N * heads, Q, P, 2)
    samples = [
        F.grid_sample(level.permute(0, 2, 3, 1).reshape(batch * heads, channels, *size), grid, align_corners=False)
        for level, size, grid in zip(levels, sizes, grids, strict=True)
    ]
    weights = as_under_autocast(weights).transpose(1, 2).flatten(0, 1).flatten(2)[:, None]
    found = (torch.cat(samples, 3) * weights).sum(3)  # (N * heads, D, Q)
    return found.view(batch, heads * channels, -1).transpose(1, 2).to(value.dtype)


def attention(t, device):
    """mmcv's multi-scale deformable attention, (name, run): its kernel, which CUDA alone has, and its PyTorch path."""
    if load("mmcv")[0] is None:
        return
    module = import_module("mmcv.ops.multi_scale_deform_attn")
    by_pytorch, function = module.multi_scale_deformable_attn_pytorch, module.MultiScaleDeformableAttnFunction
    value, maps, locations, weights = t.values()
    start = (maps.prod(1).cumsum(0) - maps.prod(1)).contiguous()

    def kernel():  # it lacks bfloat16, and float16 gives NaN
        found = function.apply(as_under_autocast(value), maps, start, locations, as_under_autocast(weights), 64)
        return found.to(value.dtype)

    def pytorch():
        return by_pytorch(as_under_autocast(value), maps, locations, as_under_autocast(weights)).to(value.dtype)

    if device == "cuda":
        yield "mmcv", kernel
    yield "mmcv grid_sample" if device == "cuda" else "mmcv", pytorch


def inference(case, t, device, threads):
    """The inference runtimes, (name, run of their dense convolution, run), where they are claimed to be fast: NCHW
    float32 on the CPU.
    """
    if device != "cpu" or case.dtype != torch.float32 or case.channels_last:
        return
    dense = dict(input=t["input"], weight=t["weight"])
    for name, build in dict(openvino=_openvino, onnxruntime=_onnxruntime).items():
        if load(name)[0]:
            yield name, *(_built_when_run(build, case, fed, threads) for fed in (dense, t))


def _built_when_run(build, case, tensors, threads):
    """The graph is compiled by the first run, where failing leaves the peer out."""

    @cache
    def built():
        return build(case, {name: x.detach().numpy() for name, x in tensors.items() if x is not None}, threads)

    return lambda: built()()


def _openvino(case, arrays, threads):
    """A compiled graph of one convolution: deformable where there are offsets. Inputs and outputs are bound once."""
    import numpy as np
    import openvino
    from openvino import opset8

    fed = {name: array for name, array in arrays.items() if name != "weight"}
    nodes = {name: opset8.parameter(array.shape, dtype=np.float32, name=name) for name, array in fed.items()}
    weight = arrays["weight"]
    pads = [case.padding] * 2
    geometry = [case.stride] * 2, pads, pads, [case.dilation] * 2
    if "offset" in arrays:
        options = dict(group=case.groups, deformable_group=case.deform_groups, bilinear_interpolation_pad=True)
        output = opset8.deformable_convolution(
            nodes["input"], nodes["offset"], weight, *geometry, nodes.get("mask"), **options
        )
    elif case.groups == 1:
        output = opset8.convolution(nodes["input"], weight, *geometry)
    else:
        grouped = weight.reshape(case.groups, -1, *weight.shape[1:])
        output = opset8.group_convolution(nodes["input"], grouped, *geometry)
    model = openvino.Model([output], list(nodes.values()), "convolution")
    options = dict(INFERENCE_PRECISION_HINT="f32", PERFORMANCE_HINT="LATENCY", NUM_STREAMS="1")
    options["INFERENCE_NUM_THREADS"] = str(threads)
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    for index, array in enumerate(fed.values()):
        request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))

    def run():
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def _onnxruntime(case, arrays, threads):
    """As :func:`_openvino`, in ONNX Runtime."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    fed = {name: array for name, array in arrays.items() if name != "weight"}
    deformable = "offset" in arrays
    names = ["input", "weight"] + (["offset", "", "mask"] if "mask" in arrays else ["offset"] if deformable else [])
    node = helper.make_node(
        "DeformConv" if deformable else "Conv",
        names,
        ["output"],
        group=case.groups,
        kernel_shape=[case.kernel] * 2,
        strides=[case.stride] * 2,
        pads=[case.padding] * 4,
        dilations=[case.dilation] * 2,
        **dict(offset_group=case.deform_groups) if deformable else {},
    )
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in fed.items()]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [None] * 4)
    weight = numpy_helper.from_array(np.ascontiguousarray(arrays["weight"]), "weight")
    graph = helper.make_graph([node], "convolution", inputs, [output], [weight])
    # An IR version that the runtime reads: the newest onnx writes newer ones.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or it takes cores from the next contender
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in fed.items():
        binding.bind_cpu_input(name, array)
    (output,) = session.run(None, fed)
    binding.bind_output("output", "cpu", 0, output.dtype, output.shape, output.ctypes.data)

    def run():
        session.run_with_iobinding(binding)
        return torch.from_numpy(output)

    return run
