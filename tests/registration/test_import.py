"""`import dcn_plugin` in fresh interpreters: what it registers, whatever of MMEngine, mmcv and mmdet is there."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import dcn_plugin

ROOT = Path(dcn_plugin.__file__).parents[1]

PRELUDE = """
import sys, warnings

class Block:
    '''Makes packages missing, or broken, for whoever imports them.'''

    def find_spec(self, name, path=None, target=None):
        if name in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        if name in {broken!r}:
            raise ImportError("undefined symbol: _ZN3foo")

sys.meta_path.insert(0, Block())
warnings.simplefilter("ignore")
import torch
caught = warnings.catch_warnings(record=True)
record = caught.__enter__()
warnings.simplefilter("ignore")
warnings.filterwarnings("always", message=".*dcn_plugin")

def build(kind):
    from mmcv.cnn import build_conv_layer
    return build_conv_layer(dict(type=kind, deform_groups=2), 4, 4, 3, padding=1)

def assert_ours(module):
    import dcn_plugin.layers
    assert type(module) in (dcn_plugin.layers.DCN, dcn_plugin.layers.DCNv2), type(module)
    assert module(torch.rand(1, module.in_channels, 5, 5)).shape[:2] == (1, module.out_channels)
"""


def run(code, missing=(), broken=()):
    """Runs code in a fresh interpreter; returns the messages of dcn_plugin's warnings."""
    script = PRELUDE.format(missing=missing, broken=broken) + code + "\nfor w in record: print('WARNED', w.message)"
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("WARNED ") for line in done.stdout.splitlines() if line.startswith("WARNED ")]


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}")


def test_torch_alone():
    code = """
import dcn_plugin.ops
from dcn_plugin.layers import DCN, DCNv2, DeformRoIAlignPack
for kind in (DCN, DCNv2):
    assert_ours(kind(4, 4, 3, padding=1))
assert DeformRoIAlignPack(2, 4, 8)(torch.rand(1, 4, 5, 5), torch.zeros(1, 5)).shape == (1, 4, 2, 2)
assert not {"numpy", "mmengine", "mmcv", "mmdet"} & set(sys.modules)
"""
    assert run(code, missing=("numpy", "mmengine", "mmcv", "mmdet")) == []


@needs("mmcv")
@pytest.mark.parametrize("order", ["import mmcv.ops, dcn_plugin", "import dcn_plugin, mmcv.ops"])
def test_overrides_mmcv_in_either_order(order):
    code = f"""
{order}
assert "_ext" in str(sys.modules["mmcv._ext"])
for kind in ("DCN", "DCNv2"):
    assert_ours(build(kind))
"""
    assert run(code, missing=("mmdet",)) == []


@needs("mmcv")
def test_mmcv_lite():
    code = """
import dcn_plugin
for kind in ("DCN", "DCNv2"):
    assert_ours(build(kind))
"""
    assert run(code, missing=("mmcv._ext", "mmdet")) == []


@needs("mmcv")
def test_mmcv_lite_has_nothing_to_replace():
    code = """
try:
    import dcn_plugin.replace_mmcv_ops
except ImportError as error:
    assert "found no operators of mmcv's to replace (No module named 'mmcv._ext')" in str(error), error
    assert "import 'dcn_plugin' instead" in str(error)
else:
    raise SystemExit("imported")
"""
    assert run(code, missing=("mmcv._ext", "mmdet")) == []


@needs("mmdet")
def test_mmcvs_operators_stay_until_a_config_asks(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("custom_imports = dict(imports=['dcn_plugin.replace_mmcv_ops'])\n")
    code = f"""
import dcn_plugin, mmcv.ops
from mmdet.models.dense_heads import tood_head
assert tood_head.deform_conv2d is mmcv.ops.deform_conv2d
assert tood_head.deform_conv2d == mmcv.ops.deform_conv.DeformConv2dFunction.apply
from mmengine.config import Config
Config.fromfile({str(config)!r})
import dcn_plugin.replace_mmcv_ops as ours
assert tood_head.deform_conv2d is mmcv.ops.deform_conv2d is ours.deform_conv2d
"""
    assert run(code) == []


@needs("mmengine")
def test_without_mmcv():
    code = """
import dcn_plugin
from mmengine.registry import MODELS
for kind in ("DCN", "DCNv2"):
    assert_ours(MODELS.build(dict(type=kind, in_channels=4, out_channels=4, kernel_size=3, padding=1)))
"""
    assert run(code, missing=("mmcv", "mmdet")) == []


@needs("mmdet")
def test_broken_mmcv_warns_of_what_does_not_work():
    code = """
import dcn_plugin
assert_ours(build("DCNv2"))
"""
    mmcv, mmdet = run(code, broken=("mmcv._ext",))
    assert "importing mmcv.ops failed with ImportError: undefined symbol" in mmcv
    assert "could not register 'DeformRoIExtractor': importing mmdet failed with ImportError" in mmdet


@needs("mmengine")
def test_broken_mmengine_warns_and_the_layers_work():
    code = """
from dcn_plugin.layers import DCN
assert_ours(DCN(4, 4, 3, padding=1))
"""
    warned = run(code, broken=("mmengine",), missing=("mmdet",))
    assert len(warned) == 1
    assert "could not register its convolutions 'DCN' and 'DCNv2': importing mmengine failed" in warned[0]


def test_missing_native_operators_are_an_error_not_a_warning():
    code = """
sys.modules["dcn_plugin.ops"] = None
try:
    import dcn_plugin
except ImportError:
    pass
else:
    raise SystemExit("imported")
"""
    run(code)


@needs("mmdet")
def test_custom_imports_is_all_a_config_needs(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "custom_imports = dict(imports=['dcn_plugin'])\n"
        "default_scope = 'mmdet'\n"
        "model = dict(type='ResNet', depth=50, base_channels=4, stem_channels=4,\n"
        "    dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),\n"
        "    stage_with_dcn=(False, True, True, True))\n"
    )
    code = f"""
from mmengine.config import Config
config = Config.fromfile({str(config)!r})
from mmengine.registry import init_default_scope
from mmdet.registry import MODELS
init_default_scope("mmdet")
for block in MODELS.build(config.model).layer2:
    assert_ours(block.conv2)
"""
    assert run(code) == []


@needs("mmengine")
def test_registers_once_more_without_harm():
    code = """
import importlib, dcn_plugin
importlib.reload(dcn_plugin)
for name in ("conv_layers", "deformable_key", "roi_extractors"):
    if f"dcn_plugin.registration.{name}" in sys.modules:
        importlib.reload(sys.modules[f"dcn_plugin.registration.{name}"])
from dcn_plugin.layers import DCN
from mmengine.registry import MODELS
assert MODELS.get("DCN") is DCN
key = dict(type="DCN", in_channels=4, out_channels=4, kernel_size=1, deformable=None)
assert_ours(MODELS.build(key))
"""
    assert run(code) == []


def test_version_is_that_of_the_project():
    stated = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated is None or stated[1] == dcn_plugin.__version__
