"""Each function of the module that stands for ``mmcv._ext`` on mmcv-lite, beside mmcv's compiled one where there is one
for the CPU, and beside a naive computation of what it means."""

import itertools
import math
from importlib import import_module

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("mmdet")

from dcn_plugin.mmdet.mmcv_ext import _Extension, provide_mmcv_ext
from dcn_plugin.ops import reference

ours = _Extension()
compiled = None if provide_mmcv_ext() else import_module("mmcv._ext")
needs_compiled = pytest.mark.skipif(compiled is None, reason="mmcv-lite: no compiled operators to compare with")
DTYPES = [torch.float32, torch.float64]


def close(actual, expected, **tolerances):
    torch.testing.assert_close(actual, expected.to(actual.dtype), **tolerances)


def boxes_and_scores(count, dtype=torch.float32, ties=False):
    corner, size = torch.rand(count, 2) * 60, torch.rand(count, 2) * 40
    boxes = torch.cat([corner, corner + size], 1)
    boxes[: count // 10] = boxes[count // 10 : 2 * (count // 10)]  # the same box more than once
    boxes[count // 2 : count // 2 + 1, 2:] = boxes[count // 2 : count // 2 + 1, :2]  # without area
    scores = torch.randint(5, (count,)) / 5 if ties else torch.rand(count)
    return boxes.to(dtype), scores.to(dtype)


def overlap(a, b, offset=0):
    width, height = (max(0, min(a[2 + i], b[2 + i]) - max(a[i], b[i]) + offset) for i in (0, 1))
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union else math.nan


def naive_groups(boxes, scores, suppresses):
    """Each box that stays, best first, with those that it suppresses."""
    remaining = sorted(range(len(boxes)), key=lambda i: -scores[i])
    groups = []
    while remaining:
        best, *others = remaining
        gone = [i for i in others if suppresses(boxes[best], boxes[i])]
        groups.append([best, *gone])
        remaining = [i for i in others if i not in gone]
    return groups


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_nms(count, offset, dtype):
    boxes, scores = boxes_and_scores(count, dtype)
    groups = naive_groups(boxes.double().tolist(), scores.tolist(), lambda a, b: overlap(a, b, offset) > 0.3)
    kept = ours.nms(boxes, scores, iou_threshold=0.3, offset=offset)
    assert kept.dtype is torch.int64
    assert kept.tolist() == [group[0] for group in groups]


@needs_compiled
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("count", "threshold", "offset"), [*itertools.product([0, 1, 30, 1000], [0.0, 0.5, 0.9], [0, 1])]
)
def test_nms_as_compiled(count, threshold, offset, ties):
    boxes, scores = boxes_and_scores(count, ties=ties)
    kept = ours.nms(boxes, scores, iou_threshold=threshold, offset=offset)
    assert kept.equal(compiled.nms(boxes, scores, iou_threshold=threshold, offset=offset))


def test_nms_of_half_precision_boxes():
    boxes, scores = boxes_and_scores(50, torch.float16)
    kept = ours.nms(boxes, scores, iou_threshold=0.5, offset=0)
    assert kept.equal(ours.nms(boxes.float(), scores.float(), iou_threshold=0.5, offset=0))


def test_nms_of_cuda_tensors_takes_torchvisions(monkeypatch, device):
    from dcn_plugin.ops import _nms

    def nms(boxes, scores, iou_threshold):
        return ours.nms(boxes.cpu(), scores.cpu(), iou_threshold, 0).to(boxes.device)

    monkeypatch.setattr(_nms, "_torchvision_nms", lambda: nms)
    boxes, scores = boxes_and_scores(100)
    kept = ours.nms(boxes.to(device), scores.to(device), iou_threshold=0.5, offset=1)
    assert kept.device.type == device.type
    assert kept.cpu().equal(ours.nms(boxes, scores, iou_threshold=0.5, offset=1))


def test_nms_match():
    boxes, scores = boxes_and_scores(100)
    groups = naive_groups(boxes.double().tolist(), scores.tolist(), lambda a, b: overlap(a, b) >= 0.3)
    assert ours.nms_match(torch.cat([boxes, scores[:, None]], 1), iou_threshold=0.3) == groups


def test_nms_match_suppresses_at_the_threshold_and_nms_does_not():
    boxes, scores = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2]]), torch.tensor([0.9, 0.8])
    assert ours.nms(boxes, scores, iou_threshold=0.5, offset=0).tolist() == [0, 1]
    assert ours.nms_match(torch.cat([boxes, scores[:, None]], 1), iou_threshold=0.5) == [[0, 1]]


@needs_compiled
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
def test_nms_match_as_compiled(threshold, ties):
    boxes, scores = boxes_and_scores(300, ties=ties)
    dets = torch.cat([boxes, scores[:, None]], 1)
    assert ours.nms_match(dets, iou_threshold=threshold) == compiled.nms_match(dets, iou_threshold=threshold)


def soft_nms(module, boxes, scores, **options):
    dets = boxes.new_zeros(len(boxes), 5)
    kept = module.softnms(boxes, scores, dets, **options)
    return dets[: len(kept)], kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [0, 1, 2])
@pytest.mark.parametrize("offset", [0, 1])
def test_soft_nms(offset, method, dtype):
    boxes, scores = boxes_and_scores(60, dtype)
    options = dict(iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method, offset=offset)
    remaining, expected = dict(enumerate(scores.double().tolist())), []
    corners = boxes.double().tolist()
    while remaining:
        best = max(remaining, key=remaining.get)
        expected.append([best, remaining.pop(best)])
        for i, score in list(remaining.items()):
            iou = overlap(corners[best], corners[i], offset)
            if method == 2:
                remaining[i] = score * math.exp(-(iou**2) / 0.5)
            elif iou >= 0.3:
                remaining[i] = score * (1 - iou if method == 1 else 0)
            if remaining[i] < 0.05:
                del remaining[i]
    dets, kept = soft_nms(ours, boxes, scores, **options)
    assert kept.tolist() == [index for index, _ in expected]
    close(dets[:, :4], boxes[kept])
    close(dets[:, 4], torch.tensor([score for _, score in expected], dtype=torch.float64))


@needs_compiled
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("count", "method", "offset"), [*itertools.product([0, 1, 300], [0, 1, 2], [0, 1])])
def test_soft_nms_as_compiled(count, method, offset, ties):
    boxes, scores = boxes_and_scores(count, ties=ties)
    options = dict(iou_threshold=0.3, sigma=0.5, min_score=1e-3, method=method, offset=offset)
    (dets, kept), (their_dets, theirs) = (soft_nms(m, boxes, scores, **options) for m in (ours, compiled))
    assert kept.equal(theirs)
    close(dets, their_dets)


def test_nms_refuses_what_does_not_fit():
    boxes, scores = boxes_and_scores(5)
    with pytest.raises(RuntimeError, match=r"boxes must have shape \(N, 4\), got \(5, 3\)"):
        ours.nms(boxes[:, :3], scores, iou_threshold=0.5, offset=0)
    options = dict(iou_threshold=0.3, sigma=0.5, min_score=1e-3, offset=0)
    with pytest.raises(RuntimeError, match=r"scores must have shape \(N,\) = \(5,\), got \(4,\)"):
        soft_nms(ours, boxes, scores[:4], method=0, **options)
    with pytest.raises(RuntimeError, match="method must be 0 .naive., 1 .linear. or 2 .gaussian., got 3"):
        soft_nms(ours, boxes, scores, method=3, **options)


@pytest.mark.parametrize("operator", ["nms_suppressors", "soft_nms"])
def test_nms_operators_are_registered_well(operator):
    boxes, scores = boxes_and_scores(20)
    arguments = (boxes, 0.5, 0) if operator == "nms_suppressors" else (boxes, scores, 0.5, 0.5, 1e-3, 1, 0)
    torch.library.opcheck(getattr(torch.ops.dcn_plugin, operator).default, arguments)


ROIS = torch.tensor(
    [
        [0, 10, 12, 70, 44],  # ordinary
        [1, -30, -8, 40, 90],  # beyond the map on every side
        [1, 3, 5, 3.5, 5.25],  # smaller than a pixel
        [0, 60, 2, 79, 63],
        [0, 200, 200, 260, 240],  # outside
    ],
    dtype=torch.float64,
)
HEIGHT, WIDTH = 16, 20


def maps(dtype=torch.float64, channels=3):
    return torch.randn(2, channels, HEIGHT, WIDTH, dtype=dtype)


def naive_roi_align(input, rois, size, spatial_scale, sampling_ratio, mode, aligned):
    shift = 0.5 if aligned else 0
    pooled = []
    for roi in rois:
        x1, y1, x2, y2 = roi[1:] * spatial_scale - shift
        extents = [float(y2 - y1), float(x2 - x1)]
        if not aligned:
            extents = [max(extent, 1) for extent in extents]
        samples = [sampling_ratio or math.ceil(extent / bins) for extent, bins in zip(extents, size, strict=True)]
        y, x = (
            low + (torch.arange(bins * count, dtype=rois.dtype) + 0.5) * extent / (bins * count)
            for low, extent, bins, count in zip((y1, x1), extents, size, samples, strict=True)
        )
        grid = reference._sample_clamped(input[int(roi[0])], *torch.meshgrid(y, x, indexing="ij"))
        pool = F.max_pool2d if mode == "max" else F.avg_pool2d
        pooled.append(pool(grid, tuple(samples)))
    return torch.stack(pooled)


def roi_align(module, input, rois, size, spatial_scale, sampling_ratio, mode, aligned):
    """The output and the gradient for its sum weighted by 1, 2, 3, ..."""
    output = input.new_zeros(len(rois), input.shape[1], *size)
    argmax_y, argmax_x = (output.clone() if mode == "max" else output.new_zeros(0) for _ in range(2))
    options = dict(
        aligned_height=size[0],
        aligned_width=size[1],
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        pool_mode=1 if mode == "avg" else 0,
        aligned=aligned,
    )
    module.roi_align_forward(input, rois, output, argmax_y, argmax_x, **options)
    grad_input = torch.zeros_like(input)
    module.roi_align_backward(weights_of(output), rois, argmax_y, argmax_x, grad_input, **options)
    return output, grad_input


def weights_of(output):
    return (torch.arange(output.numel()) + 1).to(output).reshape(output.shape) / output.numel()


def with_gradients(function, *inputs):
    inputs = [one.detach().clone().requires_grad_() for one in inputs]
    output = function(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, weights_of(output))


roi_align_cases = pytest.mark.parametrize(
    ("mode", "aligned", "sampling_ratio", "size"),
    [*itertools.product(["avg", "max"], [True, False], [0, 2], [(7, 7), (2, 3)])],
)


@roi_align_cases
def test_roi_align(mode, aligned, sampling_ratio, size):
    input, arguments = maps(), (size, 0.25, sampling_ratio, mode, aligned)
    output, grad_input = roi_align(ours, input, ROIS, *arguments)
    expected, expected_grad = with_gradients(lambda input: naive_roi_align(input, ROIS, *arguments), input)
    close(output, expected)
    close(grad_input, expected_grad)


@needs_compiled
@roi_align_cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_roi_align_as_compiled(mode, aligned, sampling_ratio, size, dtype):
    input, rois = maps(dtype), ROIS.to(dtype)
    arguments = (size, 0.25, sampling_ratio, mode, aligned)
    for actual, expected in zip(
        roi_align(ours, input, rois, *arguments), roi_align(compiled, input, rois, *arguments), strict=True
    ):
        close(actual, expected)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align_without_rois(mode):
    output, grad_input = roi_align(ours, maps(), ROIS[:0], (7, 7), 0.25, 0, mode, True)
    assert output.shape == (0, 3, 7, 7)
    assert not grad_input.any()


def naive_roi_pool(input, rois, size, spatial_scale):
    output = input.new_zeros(len(rois), input.shape[1], *size)
    for k, (batch, x1, y1, x2, y2) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = x1 * spatial_scale, y1 * spatial_scale, (x2 + 1) * spatial_scale, (y2 + 1) * spatial_scale
        if x2 <= x1 or y2 <= y1:
            continue
        for i, j in itertools.product(range(size[0]), range(size[1])):
            top, bottom = y1 + i * (y2 - y1) / size[0], y1 + (i + 1) * (y2 - y1) / size[0]
            left, right = x1 + j * (x2 - x1) / size[1], x1 + (j + 1) * (x2 - x1) / size[1]
            rows = slice(max(math.floor(top), 0), max(math.ceil(bottom), 0))
            columns = slice(max(math.floor(left), 0), max(math.ceil(right), 0))
            pixels = input[int(batch), :, rows, columns].flatten(1)
            if pixels.shape[1]:
                output[k, :, i, j] = pixels.max(1)[0]
    return output


@pytest.mark.parametrize("size", [(7, 7), (2, 3)])
@pytest.mark.parametrize("roi", [None, [0, 30, 10, 20, 40]])
def test_roi_pool(size, roi):
    input, rois = maps(), ROIS if roi is None else ROIS.new_tensor([roi])
    options = dict(pooled_height=size[0], pooled_width=size[1], spatial_scale=0.25)
    output = input.new_zeros(len(rois), 3, *size)
    argmax = torch.zeros_like(output, dtype=torch.int)
    ours.roi_pool_forward(input, rois, output, argmax, **options)
    grad_input = torch.zeros_like(input)
    ours.roi_pool_backward(weights_of(output), rois, argmax, grad_input, **options)
    leaf = input.clone().requires_grad_()
    expected = naive_roi_pool(leaf, rois, size, 0.25)
    close(output, expected.detach())
    assert (argmax == -1).equal(output == 0)
    if expected.requires_grad:
        close(grad_input, torch.autograd.grad(expected, leaf, weights_of(expected))[0])
    else:
        assert not grad_input.any()


def focal_loss_of(probability, gamma, alpha):
    return -alpha * (1 - probability) ** gamma * probability.log()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(weighted, gamma, dtype):
    input, target = 3 * torch.randn(40, 5, dtype=dtype), torch.randint(6, (40,))  # 5 is the background
    weight = torch.rand(5, dtype=dtype) if weighted else input.new_empty(0)
    of_sample = torch.cat([weight, weight.new_ones(1)])[target][:, None] if weighted else 1

    def naive(input):
        p, positive = input.sigmoid(), F.one_hot(target, 6)[:, :5]
        negative = focal_loss_of(1 - p, gamma, 0.75)
        return (positive * focal_loss_of(p, gamma, 0.25) + (1 - positive) * negative) * of_sample

    loss, grad = torch.zeros_like(input), torch.zeros_like(input)
    ours.sigmoid_focal_loss_forward(input, target, weight, loss, gamma=gamma, alpha=0.25)
    ours.sigmoid_focal_loss_backward(input, target, weight, grad, gamma=gamma, alpha=0.25)
    expected = naive(input)
    leaf = input.double().requires_grad_()
    close(loss, expected)
    close(grad, torch.autograd.grad(naive(leaf).sum(), leaf)[0])


def test_focal_losses_of_certain_predictions_are_finite():
    input, target, weight = torch.tensor([[200.0, -200.0]]), torch.tensor([1]), torch.empty(0)
    loss, grad = torch.zeros(1, 2), torch.zeros(1, 2)
    ours.sigmoid_focal_loss_forward(input, target, weight, loss, gamma=2.0, alpha=0.25)
    ours.sigmoid_focal_loss_backward(input, target, weight, grad, gamma=2.0, alpha=0.25)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert loss.min() > 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_focal_loss(weighted, dtype):
    input, target = 3 * torch.randn(40, 5, dtype=dtype), torch.randint(-1, 5, (40,))  # -1 counts for nothing
    weight = torch.rand(5, dtype=dtype) if weighted else input.new_empty(0)
    of_sample = (weight[target] if weighted else 1) * (target >= 0)

    def naive(input):
        return focal_loss_of(input.softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0], 2.0, 0.25) * of_sample

    softmax, loss, buffer, grad = input.softmax(1), input.new_zeros(40), input.new_zeros(40), torch.zeros_like(input)
    ours.softmax_focal_loss_forward(softmax, target, weight, loss, gamma=2.0, alpha=0.25)
    ours.softmax_focal_loss_backward(softmax, target, weight, buffer, grad, gamma=2.0, alpha=0.25)
    leaf = input.double().requires_grad_()
    close(loss, naive(input))
    close(grad, torch.autograd.grad(naive(leaf).sum(), leaf)[0])


def naive_carafe(features, masks, kernel, groups, scale):
    batch, channels, height, width = features.shape
    padded = F.pad(features, [kernel // 2] * 4)
    output = features.new_zeros(batch, channels, height * scale, width * scale)
    for y, x, i, j in itertools.product(range(height * scale), range(width * scale), range(kernel), range(kernel)):
        weight = masks.unflatten(1, (groups, kernel, kernel))[:, :, i, j, y, x]
        weight = weight.repeat_interleave(channels // groups, 1)
        output[:, :, y, x] += weight * padded[:, :, y // scale + i, x // scale + j]
    return output


@pytest.mark.parametrize("name", ["carafe", "carafe_naive"])
@pytest.mark.parametrize(("kernel", "groups", "scale"), [(5, 1, 2), (3, 2, 2), (1, 1, 1), (3, 2, 3)])
def test_carafe(name, kernel, groups, scale):
    features = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    masks = torch.randn(2, groups * kernel**2, 3 * scale, 5 * scale, dtype=torch.float64)
    options = dict(kernel_size=kernel, group_size=groups, scale_factor=scale)
    output = features.new_zeros(2, 4, 3 * scale, 5 * scale)
    grads = torch.zeros_like(features), torch.zeros_like(masks)
    if name == "carafe":
        kept, buffer = torch.zeros_like(features), torch.zeros(0)
        ours.carafe_forward(features, masks, kept, buffer, buffer, output, **options)
        ours.carafe_backward(weights_of(output), kept, masks, buffer, buffer, buffer, buffer, *grads, **options)
    else:
        ours.carafe_naive_forward(features, masks, output, **options)
        ours.carafe_naive_backward(weights_of(output), features, masks, *grads, **options)
    expected = with_gradients(lambda f, m: naive_carafe(f, m, kernel, groups, scale), features, masks)
    for actual, one in zip((output, *grads), expected, strict=True):
        close(actual, one)


@pytest.mark.parametrize(("kernel", "padding"), [((3, 3), (1, 1)), ((1, 1), (0, 0)), ((3, 5), (1, 2))])
def test_masked_conv(kernel, padding):
    input, weight = maps()[:1], torch.randn(4, 3, *kernel, dtype=torch.float64)
    mask = torch.rand(HEIGHT, WIDTH) > 0.7
    y, x = mask.nonzero(as_tuple=True)
    columns = input.new_zeros(3 * kernel[0] * kernel[1], len(y))
    sizes = dict(kernel_h=kernel[0], kernel_w=kernel[1], pad_h=padding[0], pad_w=padding[1])
    ours.masked_im2col_forward(input, y, x, columns, **sizes)
    output = input.new_zeros(1, 4, HEIGHT, WIDTH)
    ours.masked_col2im_forward(weight.flatten(1) @ columns, y, x, output, height=HEIGHT, width=WIDTH, channels=4)
    close(output, F.conv2d(input, weight, padding=padding) * mask)


def deform_conv_inputs(dtype, modulated):
    offset = 2 * torch.randn(2, 2 * 2 * 9, HEIGHT // 2, WIDTH // 2, dtype=dtype)
    tensors = [maps(dtype, channels=4), torch.randn(6, 2, 3, 3, dtype=dtype), offset]
    return [*tensors, torch.rand(2, 2 * 9, HEIGHT // 2, WIDTH // 2, dtype=dtype)] if modulated else tensors


def deform_conv(module, input, weight, offset):
    sizes = dict(kW=3, kH=3, dW=2, dH=2, padW=1, padH=1, dilationW=1, dilationH=1)
    sizes |= dict(group=2, deformable_group=2, im2col_step=2)
    output = input.new_zeros(2, 6, *offset.shape[2:])
    module.deform_conv_forward(input, weight, offset, output, input.new_empty(0), input.new_empty(0), **sizes)
    grad = weights_of(output)
    grads = [torch.zeros_like(one) for one in (input, offset, weight)]
    module.deform_conv_backward_input(input, offset, grad, grads[0], grads[1], weight, input.new_empty(0), **sizes)
    buffers = input.new_empty(0), input.new_empty(0)
    module.deform_conv_backward_parameters(input, offset, grad, grads[2], *buffers, scale=1, **sizes)
    return output, *grads


def modulated_deform_conv(module, input, weight, offset, mask):
    sizes = dict(kernel_h=3, kernel_w=3, stride_h=2, stride_w=2, pad_h=1, pad_w=1, dilation_h=1, dilation_w=1)
    sizes |= dict(group=2, deformable_group=2, with_bias=True)
    output, bias, buffers = (
        input.new_zeros(2, 6, *offset.shape[2:]),
        weight[:, 0, 0, 0].clone(),
        [input.new_empty(0)] * 2,
    )
    module.modulated_deform_conv_forward(input, weight, bias, buffers[0], offset, mask, output, buffers[1], **sizes)
    grads = [torch.zeros_like(one) for one in (input, weight, bias, offset, mask)]
    module.modulated_deform_conv_backward(
        input, weight, bias, buffers[0], offset, mask, buffers[1], *grads, weights_of(output), **sizes
    )
    return output, *grads


@pytest.mark.parametrize("modulated", [False, True])
def test_deform_conv(modulated):
    input, weight, offset, *mask = deform_conv_inputs(torch.float64, modulated)
    if modulated:
        actual = modulated_deform_conv(ours, input, weight, offset, *mask)
        inputs = [input, weight, weight[:, 0, 0, 0], offset, *mask]
        expected = with_gradients(
            lambda x, w, b, o, m: reference.deform_conv2d(x, o, w, b, stride=2, padding=1, mask=m), *inputs
        )
    else:
        actual = deform_conv(ours, input, weight, offset)
        expected = with_gradients(
            lambda x, o, w: reference.deform_conv2d(x, o, w, stride=2, padding=1), input, offset, weight
        )
    for one, other in zip(actual, expected, strict=True):
        close(one, other)


@needs_compiled
@pytest.mark.parametrize("modulated", [False, True])
def test_deform_conv_as_compiled(modulated):
    inputs = deform_conv_inputs(torch.float64, modulated)
    run = modulated_deform_conv if modulated else deform_conv
    for actual, expected in zip(run(ours, *inputs), run(compiled, *inputs), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("with_offset", [False, True])
def test_deform_roi_pool(with_offset):
    input, offset = maps(), torch.randn(5, 2, 2, 3, dtype=torch.float64)
    offset = offset if with_offset else offset.new_zeros(0)
    options = dict(pooled_height=2, pooled_width=3, spatial_scale=0.25, sampling_ratio=2, gamma=0.1)
    output = input.new_zeros(5, 3, 2, 3)
    ours.deform_roi_pool_forward(input, ROIS, offset, output, **options)
    grads = torch.zeros_like(input), torch.zeros_like(offset)
    ours.deform_roi_pool_backward(weights_of(output), input, ROIS, offset, *grads, **options)

    def naive(input, offset=None):
        return reference.deform_roi_align(input, ROIS, offset, (2, 3), 0.25, 2, 0.1)

    expected = with_gradients(naive, *([input, offset] if with_offset else [input]))
    for one, other in zip((output, *grads), expected, strict=False):
        close(one, other)
    assert grads[1].any() == with_offset


def test_autocast_leaves_the_dtypes_alone(device):
    input, rois = maps(torch.float32).to(device), ROIS.float().to(device)
    arguments = ((7, 7), 0.25, 0, "avg", True)
    plain = roi_align(ours, input, rois, *arguments)
    with torch.autocast(device.type, torch.bfloat16):
        assert roi_align(ours, input, rois, *arguments)[0].equal(plain[0])
