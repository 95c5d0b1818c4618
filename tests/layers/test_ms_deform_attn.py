"""The attention layer: mmcv's parameters and results, and what mmcv's lacks."""

import copy
import pickle

import pytest
import torch

from dcn_plugin.layers import MultiScaleDeformableAttention

SHAPES = [(6, 9), (3, 5)]
PIXELS = sum(h * w for h, w in SHAPES)


def make(**options):
    """A layer in float64 whose every parameter counts."""
    torch.manual_seed(1)
    layer = MultiScaleDeformableAttention(16, 4, len(SHAPES), 3, **(dict(dropout=0.0) | options)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def arguments(batch_first=False, coordinates=2, queries=7, batch=2, dtype=torch.float64):
    def tensor(count):
        return torch.randn(*((batch, count) if batch_first else (count, batch)), 16, dtype=dtype)

    reference = torch.rand(batch, queries, len(SHAPES), coordinates, dtype=dtype)
    return dict(
        query=tensor(queries),
        value=tensor(PIXELS),
        query_pos=tensor(queries),
        reference_points=reference,
        spatial_shapes=torch.tensor(SHAPES),
        level_start_index=torch.tensor([0, SHAPES[0][0] * SHAPES[0][1]]),
    )


@pytest.fixture
def mmcvs(mmcv_ops):
    """mmcv's layer with the parameters of one of ours."""

    def of(ours, **options):
        theirs = mmcv_ops.MultiScaleDeformableAttention(16, 4, len(SHAPES), 3, **(dict(dropout=0.0) | options))
        theirs.double().load_state_dict(ours.state_dict())
        return theirs

    return of


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 2.0])
def test_equals_mmcvs(mmcvs, batch_first, coordinates, ratio):
    options = dict(batch_first=batch_first, value_proj_ratio=ratio)
    layer = make(**options)
    results = []
    given = arguments(batch_first, coordinates)
    given["identity"] = torch.randn_like(given["query"])
    given["key_padding_mask"] = torch.rand(2, PIXELS) < 0.3
    for one in (layer, mmcvs(layer, **options)):
        leaves = {name: t.clone() for name, t in given.items()}
        floating = [t.requires_grad_() for t in leaves.values() if t.is_floating_point()]
        output = one(**leaves)
        output.square().sum().backward()
        results.append([output, *(t.grad for t in floating), *(p.grad for p in one.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_starts_as_mmcvs_does(mmcv_ops):
    torch.manual_seed(3)
    ours = MultiScaleDeformableAttention(24, 6, 2, 3).state_dict()
    torch.manual_seed(3)
    theirs = mmcv_ops.MultiScaleDeformableAttention(24, 6, 2, 3).state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)


def test_values_default_to_the_query():
    layer = make(batch_first=True)
    given = arguments(True, queries=PIXELS)
    given.pop("value")
    torch.testing.assert_close(layer(**given), layer(**given, value=given["query"], identity=given["query"]))


def test_dropout_is_of_the_output_and_not_of_the_identity():
    layer = make(dropout=1.0)
    given = arguments()
    assert torch.equal(layer(**given), given["query"])
    assert not torch.equal(layer.eval()(**given), given["query"])


def test_the_old_name_of_identity():
    layer, given = make(), arguments()
    other = torch.randn_like(given["query"])
    with pytest.warns(DeprecationWarning, match="use identity"):
        old = layer(**given, residual=other)
    assert torch.equal(old, layer(**given, identity=other))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_reference_points_and_shapes_in_other_forms(coordinates):
    """Points that all levels share, and sizes as a list."""
    layer, given = make(), arguments(coordinates=coordinates)
    given["reference_points"] = given["reference_points"][:, :, :1]
    expected = layer(**given | dict(reference_points=given["reference_points"].expand(-1, -1, len(SHAPES), -1)))
    assert torch.equal(layer(**given | dict(spatial_shapes=SHAPES)), expected)


@pytest.mark.parametrize("queries, batch", [(0, 2), (5, 0)])
def test_empty(queries, batch):
    layer, given = make(), arguments(queries=queries, batch=batch)
    output = layer(**given)
    assert output.shape == (queries, batch, 16)
    output.sum().backward()
    assert layer.value_proj.weight.grad.abs().sum() == 0


def test_autocast_keeps_positions_in_float32():
    layer, given = make().float(), arguments(dtype=torch.float32)
    located = []
    layer.observer = lambda shapes, reference, locations, mask: located.append(locations)
    expected = layer(**given)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(**given)
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert located[1].dtype is torch.float32
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()  # bfloat16 has 8 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers(dtype):
    layer, given = make().float(), arguments(dtype=torch.float32)
    expected = layer(**given)
    half = {n: t.to(dtype) if t.is_floating_point() and n != "reference_points" else t for n, t in given.items()}
    located = []
    layer.observer = lambda shapes, reference, locations, mask: located.append(locations)
    output = layer.to(dtype)(**half)
    assert output.dtype is dtype and located[0].dtype is torch.float32
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()


def test_observer_gets_the_locations():
    layer, given = make(), arguments()
    torch.nn.init.zeros_(layer.sampling_offsets.weight)
    torch.nn.init.zeros_(layer.sampling_offsets.bias)
    seen = []
    layer.observer = lambda *observed: seen.append(observed)
    layer(**given)
    [(shapes, reference, locations, mask)] = seen
    assert shapes is given["spatial_shapes"] and mask is None
    assert locations.shape == (2, 7, 4, 2, 3, 2)
    assert torch.equal(locations, reference[:, :, None, :, None].expand_as(locations))


def test_offsets_are_pixels_of_the_level_x_first():
    layer, given = make(), arguments()
    seen = []
    layer.observer = lambda *observed: seen.append(observed)
    torch.nn.init.zeros_(layer.sampling_offsets.weight)
    with torch.no_grad():
        layer.sampling_offsets.bias.view(-1, 2).copy_(torch.tensor([2.0, -1.0]))
    layer(**given)
    _, reference, locations, _ = seen[0]
    for level, (height, width) in enumerate(SHAPES):
        moved = (locations - reference[:, :, None, :, None])[:, :, :, level]
        torch.testing.assert_close(moved, torch.tensor([2 / width, -1 / height]).double().expand_as(moved))


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (dict(reference_points=None), ValueError, "needs reference_points and spatial_shapes"),
        (dict(spatial_shapes=None), ValueError, "needs reference_points and spatial_shapes"),
        (dict(reference_points=torch.zeros(2, 7, 2, 3)), ValueError, r"must be .2, 7, 2, 2. or .2, 7, 2, 4., got"),
        (dict(reference_points=torch.zeros(2, 7, 3, 2)), ValueError, r"got \(2, 7, 3, 2\)"),
        (
            dict(spatial_shapes=torch.tensor([(6, 9), (3, 4)])),
            RuntimeError,
            r"spatial_shapes must have as many pixels as value has keys, got 6 x 9, 3 x 4 and .* \(2, 69, 4, 4\)",
        ),
        (
            dict(spatial_shapes=[(6, 9), (3, 4), (1, 3)]),
            ValueError,
            r"spatial_shapes .*num_levels, 2\) = \(2, 2\), got \(3, 2",
        ),
        (dict(spatial_shapes=[(1, 69)]), ValueError, r"spatial_shapes .*num_levels, 2\) = \(2, 2\), got \(1, 2\)"),
        (dict(key_padding_mask=torch.zeros(69, 2)), ValueError, r"key_padding_mask .* = \(2, 69\), got \(69, 2\)"),
        (dict(key_padding_mask=torch.zeros(2, 68)), ValueError, r"key_padding_mask .* = \(2, 69\), got \(2, 68\)"),
    ],
)
def test_errors(changed, error, message):
    with pytest.raises(error, match=message):
        make()(**arguments() | changed)


@pytest.mark.parametrize("options", [dict(embed_dims=10, num_heads=4), dict(value_proj_ratio=0.51)])
def test_heads_must_divide_the_widths(options):
    with pytest.raises(ValueError, match="must be divisible by num_heads"):
        MultiScaleDeformableAttention(**options)


@pytest.mark.parametrize("heads", [0, -1])
def test_heads_must_be_positive(heads):
    with pytest.raises(ValueError, match=f"num_heads must be positive, got {heads}"):
        MultiScaleDeformableAttention(num_heads=heads)


def test_an_empty_level_is_sampled_as_zeros():
    layer, given = make(), arguments()
    shapes = torch.tensor([(PIXELS, 1), (0, 5)])
    output = layer(**given | dict(spatial_shapes=shapes))
    output.square().sum().backward()
    assert output.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())
    offsets = layer.sampling_offsets.weight.grad.view(4, len(SHAPES), -1)
    assert offsets[:, 0].any() and not offsets[:, 1].any()


def test_copies_and_pickles():
    layer, given = make(), arguments()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(**given), layer(**given))


def test_compiles_and_exports():
    layer, given = make(batch_first=True).float(), arguments(True, dtype=torch.float32)
    expected = layer(**given)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(**given), expected)
    exported = torch.export.export(layer, (), given)
    torch.testing.assert_close(exported.module()(**given), expected)
