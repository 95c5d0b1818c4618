from importlib.util import find_spec

import pytest
import torch

if find_spec("mmdet"):
    import dcn_plugin.mmdet  # noqa: F401  before any test imports mmdet's models, which mmcv-lite alone cannot


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomised(module):
    """The module in float64 for inference, each parameter and statistic random: offsets of about a pixel among them."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                fan = tensor[0].numel() if tensor.dim() > 1 else 4
                tensor.normal_(std=fan**-0.5)
                if tensor.dim() == 1 and name.endswith("weight"):
                    tensor.add_(1)  # of a norm
    return module.double().eval()


def convert(module, tmp_path, *arguments, **options):
    """What the command makes of a module's state dict, and what it says."""
    from dcn_plugin.commands.convert_checkpoint import convert_checkpoint

    torch.save(options.pop("state", None) or module.state_dict(), tmp_path / "in.pth")
    text = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", *arguments, force=True, **options)
    return torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"], text


def assert_loads(module, state):
    """Loads as MMEngine does, and nothing is missing or left over."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith("num_batches_tracked")]
    module.double().eval()  # of mmdet's ResNet this is None
    return module


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())
