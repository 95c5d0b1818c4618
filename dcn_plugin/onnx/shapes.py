"""What both exporters read off the shapes of a deformable convolution."""

OPSET = 19  # the first with DeformConv


def conv_groups(input, weight, offset) -> tuple[int, int]:
    """groups and deform_groups, from shapes whose channels must be known."""
    channels, group_channels, predicted = input[1], weight[1], offset[1]
    for name, size in (("input", channels), ("offset", predicted)):
        if not isinstance(size, int):
            raise ValueError(f"a deformable convolution's {name} needs a fixed number of channels to become DeformConv")
    return channels // group_channels, predicted // (2 * weight[2] * weight[3])
