import sys

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_default_scope():
    """What a test makes MMEngine's default scope ends with it."""
    yield
    if "mmengine" in sys.modules:
        from mmengine.registry import DefaultScope

        DefaultScope._instance_dict.clear()


@pytest.fixture
def set_matmul_precision():
    """Sets how PyTorch multiplies float32 matrices on CUDA ("ieee", "tf32"), until the test ends."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda precision: setattr(matmul, "fp32_precision", precision)
    matmul.fp32_precision = before


@pytest.fixture
def mmcv_ops():
    """mmcv.ops with its own operators, which dcn_plugin.mmdet, once imported, runs on ours."""
    ops = pytest.importorskip("mmcv.ops", reason="compares with mmcv's operators where they are installed")
    if type(sys.modules["mmcv._ext"]).__module__.startswith("dcn_plugin"):
        pytest.skip("compares with mmcv's operators, and mmcv-lite has none")
    ours = sys.modules.get("dcn_plugin.mmdet.mmcv_ops")
    changed = ours.restore() if ours else []
    yield ops
    if changed:
        ours.replace()
