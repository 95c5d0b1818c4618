"""Where attention's samples are drawn, against what is computed by hand."""

import pytest
import torch
from torch import nn

from dcn_plugin.layers import MultiScaleDeformableAttention
from dcn_plugin.ops import ms_deform_attn
from dcn_plugin.visualize import Attention, record
from dcn_plugin.visualize.statistics import Table

SIZES = [(4, 6), (2, 3)]
PIXELS = 4 * 6 + 2 * 3


def attention(locations, weights=None, image=(32, 48)):
    """A call of one head, of two levels of SIZES."""
    locations = torch.as_tensor(locations, dtype=torch.float32)
    weights = torch.ones(locations.shape[:-1]) if weights is None else torch.as_tensor(weights)
    return Attention("name", image, torch.tensor(SIZES), locations, weights)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = MultiScaleDeformableAttention(8, 2, 2, 3, batch_first=True)
        self.decoder = nn.ModuleList([MultiScaleDeformableAttention(8, 2, 2, 3, batch_first=True)])

    def forward(self, image):
        memory = image.new_ones(1, PIXELS, 8)
        shapes = torch.tensor(SIZES)
        self.encoder(memory, reference_points=torch.rand(1, PIXELS, 2, 2), spatial_shapes=shapes)
        queries, reference = image.new_ones(1, 5, 8), torch.rand(1, 5, 2, 2)
        return self.decoder[0](queries, value=memory, reference_points=reference, spatial_shapes=shapes)


def test_records_calls_with_the_names_of_their_layers():
    found = record(Net().eval(), torch.rand(1, 3, 32, 48))
    assert [one.name for one in found.attentions] == ["encoder", "decoder.0"]
    encoder, decoder = found.attentions
    assert encoder.of_pixels and not decoder.of_pixels and encoder.image == (32, 48)
    assert decoder.locations.shape == (5, 2, 2, 3, 2) and decoder.weights.shape == (5, 2, 2, 3)
    assert encoder.sizes.tolist() == [list(size) for size in SIZES]
    assert not found.empty and not found.convolutions and found.chosen_attentions() == found.attentions
    assert found.chosen_attentions(["dec*"]) == [decoder] and found.chosen(["dec*"]) == []
    with pytest.raises(ValueError, match="'neck' matches none of the deformable layers that ran: encoder, decoder.0"):
        found.chosen_attentions(["neck"])


def test_the_last_of_each_kind_is_chosen():
    found = record(nn.Sequential(), torch.rand(1, 3, 8, 8))
    assert found.empty and found.chosen_attentions() == []
    pixels, queries = torch.rand(PIXELS, 1, 2, 1, 2), torch.rand(5, 1, 2, 1, 2)
    found.attentions = [attention(one) for one in (pixels, pixels, queries, queries)]
    assert found.chosen_attentions() == [found.attentions[1], found.attentions[3]]


def test_a_location_is_at_its_share_of_the_image():
    """Of 48 x 32 pixels the corner (0, 0) is half a pixel before the first, (0.5, 0.25) between two."""
    found = attention([[[[[0, 0]], [[0.5, 0.25]]]]]).points(0)
    assert list(zip(found.y.tolist(), found.x.tolist(), strict=True)) == [(-0.5, -0.5), (7.5, 23.5)]
    assert found.counts.all() and found.weight.tolist() == [1, 1] and found.head.tolist() == [0, 0]


def test_the_operator_reads_the_pixel_that_is_drawn():
    """A map with one pixel that is not zero: the operator answers where the drawn point is at that pixel."""
    value = torch.zeros(1, 24, 1, 1)
    value[0, 2 * 6 + 4] = 1
    location = torch.tensor([4.5 / 6, 2.5 / 4]).view(1, 1, 1, 1, 1, 2)
    assert float(ms_deform_attn(value, [(4, 6)], location, torch.ones(1, 1, 1, 1, 1))) == pytest.approx(1)
    call = Attention("", (32, 48), torch.tensor([(4, 6)]), location[0], torch.ones(1, 1, 1, 1))
    y, x = (float(p) for p in call.points(0)[:2])
    assert (y, x) == pytest.approx((2.5 * 8 - 0.5, 4.5 * 8 - 0.5))  # the middle of the eight pixels that it covers


def test_samples_outside_do_not_count():
    # Of the second level, 3 pixels wide, 1.15 is at pixel 2.95, of the first, 6 wide, at 6.4.
    found = attention([[[[[1.15, 0.5]], [[1.15, 0.5]]]]], [[[[0.25], [0.75]]]]).points(0)
    assert found.counts.tolist() == [False, True] and found.weight.tolist() == [0, 1]
    assert not attention([[[[[float("nan"), 0.5]], [[float("inf"), 0.5]]]]]).points(0).counts.any()


def test_references_are_pixels_or_means():
    of_pixels = attention(torch.rand(PIXELS, 1, 2, 1, 2))
    references = of_pixels.references()
    assert references[0].tolist() == pytest.approx([0.5 / 6, 0.5 / 4])
    assert references[7].tolist() == pytest.approx([1.5 / 6, 1.5 / 4])
    assert references[-1].tolist() == pytest.approx([2.5 / 3, 1.5 / 2])
    # Pixel (1, 4) of the first level is at (1.5 * 8 - 0.5, 4.5 * 8 - 0.5); to (7.5, 39.5) one of the second is nearer.
    assert of_pixels.query_at(11.5, 35.5) == 6 + 4
    assert of_pixels.query_at(7.5, 39.5) < 24

    of_objects = attention(
        [[[[[0.2, 0.2]], [[0.6, 0.4]]]], [[[[0.9, 0.9]], [[float("nan"), 0.0]]]]], [[[[1.0], [3.0]]], [[[1.0], [1.0]]]]
    )
    torch.testing.assert_close(of_objects.references(), torch.tensor([[0.5, 0.35], [0.9, 0.9]]))
    assert of_objects.query_at(0, 0) == 0 and of_objects.query_at(31, 47) == 1


def test_table():
    """Queries of pixels, moved by 3 pixels of their level to the right."""
    call = attention(torch.zeros(PIXELS, 1, 2, 1, 2))
    moved = call.references()[:, None, None, None].repeat(1, 1, 2, 1, 1)
    moved[:, :, 0, :, 0] += 3 / 6
    moved[:, :, 1, :, 0] += 3 / 3
    recording = record(nn.Sequential(), torch.rand(1, 3, 32, 48))
    recording.attentions = [attention(moved)]
    table = Table()
    table.add(recording, torch.zeros(0, 4), (2.0, 2.0))
    name, *cells = str(table).splitlines()[-1].split()
    # A level's pixel is 8 or 16 of what the model got, and twice as many of the image.
    assert [name, *cells[:4]] == ["name", "3.00", "3.00", "72.00", "96.00"]
    assert cells[5:] == ["-"] * 5
