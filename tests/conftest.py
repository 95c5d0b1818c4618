import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# What takes a minute and more, though it has few tests.
LONG_FILES = [
    HERE / "cuda/test_build.py",
    HERE / "packaging/test_sdist.py",
    HERE / "cpu/test_oldest_torch.py",
    HERE / "commands/test_export.py",
    HERE / "test_import.py",
    HERE / "zoo/test_mmdet_configs.py",
    HERE / "tools/test_gpu_check.py",
]
assert all(path.exists() for path in LONG_FILES), "LONG_FILES names a file that is not there"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_collection_modifyitems(config, items):
    """Long files first, then those of many tests: so that in the end no process of pytest-xdist waits for another.

    Only in such a process, which alone has a ``workerinput``: one process runs the tests in the order it was given.
    """
    if not hasattr(config, "workerinput"):
        return
    tests = Counter(item.path for item in items)
    place = {path: i for i, path in enumerate(LONG_FILES)}
    items.sort(key=lambda item: (place.get(item.path, len(place)), -tests[item.path], item.path))


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
