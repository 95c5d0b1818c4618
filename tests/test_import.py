"""What importing each floor does, in fresh interpreters: whatever of MMEngine, mmcv and mmdet is there."""

import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import dcn_plugin

ROOT = Path(dcn_plugin.__file__).parents[1]

PRELUDE = """
import sys

class Block:
    '''Makes packages missing, or broken, for whoever imports them.'''

    def find_spec(self, name, path=None, target=None):
        if name in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        if name in {broken!r}:
            raise ImportError("undefined symbol: _ZN3foo")

sys.meta_path.insert(0, Block())
import torch

def build(kind):
    from mmcv.cnn import build_conv_layer
    return build_conv_layer(dict(type=kind, deform_groups=2), 4, 4, 3, padding=1)

def assert_ours(module):
    from dcn_plugin.layers import DeformConv2dPack, ModulatedDeformConv2dPack
    assert type(module) in (DeformConv2dPack, ModulatedDeformConv2dPack), type(module)
    assert module(torch.rand(1, module.in_channels, 5, 5)).shape[:2] == (1, module.out_channels)
"""


def run(code, missing=(), broken=()):
    """Runs code in a fresh interpreter and returns what it prints."""
    script = PRELUDE.format(missing=missing, broken=broken) + code
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def import_error(module, **blocked):
    """The message of the ImportError that importing a module raises."""
    out = run(f"try:\n    import {module}\nexcept ImportError as error:\n    print('ERROR', error)", **blocked)
    return out.partition("ERROR ")[2].strip()


def needs(package):
    return pytest.mark.skipif(not is_there(package), reason=f"needs {package}")


def is_there(name):
    """Whether a package or module is installed, whatever stands in its place in this process."""
    parent, _, _ = name.rpartition(".")
    found = PathFinder.find_spec(parent) if parent else None
    if parent and found is None:
        return False
    return PathFinder.find_spec(name, found.submodule_search_locations if found else None) is not None


def test_torch_alone():
    code = """
import dcn_plugin
from dcn_plugin.layers import DeformConv2dPack, DeformRoIAlignPack, ModulatedDeformConv2dPack
for kind in (DeformConv2dPack, ModulatedDeformConv2dPack):
    assert_ours(kind(4, 4, 3, padding=1))
assert DeformRoIAlignPack(2, 4, 8)(torch.rand(1, 4, 5, 5), torch.zeros(1, 5)).shape == (1, 4, 2, 2)
assert_ours(dcn_plugin.convert(torch.nn.Conv2d(4, 4, 3)))
assert all(hasattr(dcn_plugin, name) for name in dcn_plugin.__all__)
assert not {"numpy", "mmengine", "mmcv", "mmdet"} & set(sys.modules)
"""
    run(code, missing=("numpy", "mmengine", "mmcv", "mmdet"))


@needs("mmdet")
def test_the_core_imports_none_of_openmmlab_where_it_is_installed():
    code = """
before = set(sys.modules)
import dcn_plugin
packages = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not {"mmengine", "mmcv", "mmdet", "torchvision"} & packages, packages
"""
    run(code)


@needs("mmdet")
@needs("mmcv._ext")
def test_the_core_changes_nothing_outside_itself():
    """Each thing that the upper floors change is, after the import of the core, what it was before."""
    code = """
import mmcv.ops, mmdet.models, mmengine.hooks, mmengine.optim, mmengine.runner
from mmdet.registry import MODELS as DETECTORS
from mmengine.registry import HOOKS, MODELS
from torch.nn.modules import module as torch_module

def state():
    registries = [MODELS, *MODELS.children.values(), HOOKS]
    return dict(
        resume=mmengine.runner.Runner.resume,
        launch=[mmengine.dist.utils._init_dist_pytorch, mmengine.model.MMDistributedDataParallel.__init__],
        suppression=sys.modules["mmcv.ops.nms"].NMSop.forward,
        bottleneck=mmdet.models.backbones.resnet.Bottleneck.__init__,
        parameters=mmengine.optim.DefaultOptimWrapperConstructor.add_params,
        packages=[mmengine.config.config.is_installed, mmengine.utils.get_installed_path],
        build=[registry.build_func for registry in registries],
        types=[dict(registry.module_dict) for registry in registries],
        safe_globals=list(torch.serialization.get_safe_globals()),
        hooks={name: dict(value) for name, value in vars(torch_module).items() if name.startswith("_global_")
               and isinstance(value, dict)},
        operators=[vars(module)[name] for module in (mmcv.ops, mmcv.ops.deform_conv, mmcv.ops.deform_roi_pool)
                   for name in sorted(vars(module)) if "deform" in name],
    )

before = state()
assert DETECTORS in MODELS.children.values() and before["operators"] and before["hooks"]
import dcn_plugin
after = state()
assert before == after, [key for key in before if before[key] != after[key]]
import dcn_plugin.mmdet
changed = {key for key, value in state().items() if value != before[key]}
assert changed == before.keys(), before.keys() - changed  # so each of them would have been noticed
"""
    run(code)


@needs("mmengine")
def test_the_core_changes_nothing_of_mmengine():
    """The same where there is no compiled mmcv, of what the floor above the core changes."""
    code = """
import mmengine.analysis, mmengine.hooks, mmengine.model, mmengine.optim, mmengine.runner
from mmengine.analysis import complexity_analysis
from mmengine.registry import HOOKS, MODELS

def state():
    return dict(
        resume=mmengine.runner.Runner.resume,
        launch=[mmengine.dist.utils._init_dist_pytorch, mmengine.model.MMDistributedDataParallel.__init__],
        parameters=mmengine.optim.DefaultOptimWrapperConstructor.add_params,
        packages=[mmengine.config.config.is_installed, mmengine.utils.get_installed_path],
        build=MODELS.build_func,
        types=dict(MODELS.module_dict),
        hooks=dict(HOOKS.module_dict),
        flops=[dict(complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS),
               dict(complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS)],
        safe_globals=list(torch.serialization.get_safe_globals()),
    )

before = state()
import dcn_plugin
assert state() == before
import dcn_plugin.mmengine
changed = {key for key, value in state().items() if value != before[key]}
assert changed == before.keys(), before.keys() - changed  # so each of them would have been noticed
"""
    run(code, missing=("mmcv", "mmdet"))


@needs("mmcv._ext")
@pytest.mark.parametrize("order", ["import mmcv.ops, dcn_plugin.mmengine", "import dcn_plugin.mmengine, mmcv.ops"])
def test_overrides_mmcv_in_either_order(order):
    code = f"""
{order}
assert "_ext" in str(sys.modules["mmcv._ext"])
for kind in ("DCN", "DCNv2"):
    assert_ours(build(kind))
"""
    run(code, missing=("mmdet",))


@needs("mmcv")
def test_mmcv_lite():
    code = """
import dcn_plugin.mmengine
for kind in ("DCN", "DCNv2"):
    assert_ours(build(kind))
"""
    run(code, missing=("mmcv._ext", "mmdet"))


@needs("mmdet")
@needs("mmcv._ext")
def test_mmcvs_operators_run_on_ours_once_a_config_is_read(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("custom_imports = dict(imports=['dcn_plugin.mmdet'])\n")
    code = f"""
import mmcv.ops
from mmdet.models.dense_heads import tood_head
assert tood_head.deform_conv2d is mmcv.ops.deform_conv2d
assert tood_head.deform_conv2d == mmcv.ops.deform_conv.DeformConv2dFunction.apply
from mmengine.config import Config
Config.fromfile({str(config)!r})
from dcn_plugin.mmdet import mmcv_ops
assert tood_head.deform_conv2d is mmcv.ops.deform_conv2d is mmcv_ops.deform_conv2d
"""
    run(code)


@needs("mmengine")
def test_without_mmcv():
    code = """
import dcn_plugin.mmengine
from mmengine.registry import MODELS
for kind in ("DCN", "DCNv2"):
    assert_ours(MODELS.build(dict(type=kind, in_channels=4, out_channels=4, kernel_size=3, padding=1, deformable=None)))
"""
    run(code, missing=("mmcv", "mmdet"))


@needs("mmengine")
@pytest.mark.parametrize(
    ("module", "blocked", "message"),
    [
        ("mmengine", dict(missing=("mmengine",)), "needs mmengine, which is not installed: `pip install 'mmengine"),
        ("mmengine", dict(broken=("mmengine",)), "is installed, but importing it fails with ImportError: undefined"),
        ("mmengine", dict(missing=("addict",)), "fails with ModuleNotFoundError: No module named 'addict'"),
        ("mmdet", dict(missing=("mmengine",)), "dcn_plugin.mmengine needs mmengine, which is not installed"),
        ("mmdet", dict(missing=("mmdet",)), "needs mmdet, which is not installed: `pip install 'mmdet"),
        ("mmdet", dict(missing=("mmcv",)), "needs mmcv, which is not installed: `pip install 'mmdet"),
        ("mmdet", dict(broken=("mmdet",)), "MMDetection is installed, but importing it fails with ImportError"),
        ("mmdet", dict(missing=("pycocotools",)), "fails with ModuleNotFoundError: No module named 'pycocotools'"),
        ("mmdet", dict(broken=("mmcv._ext",)), "mmcv.ops does not import (ImportError: undefined symbol"),
    ],
)
def test_what_is_missing_or_broken_is_one_sentence(module, blocked, message):
    text = import_error(f"dcn_plugin.{module}", **blocked)
    assert ("pip install" in text) == ("which is not installed" in text)
    assert message in text and "install" in text and "\n" not in text


@needs("mmdet")
def test_an_mmcv_that_mmdet_refuses_is_one_sentence():
    code = """
import mmcv
mmcv.__version__ = "2.2.0"
try:
    import dcn_plugin.mmdet
except ImportError as error:
    print("ERROR", error)
"""
    text = run(code).partition("ERROR ")[2].strip()
    assert "MMCV==2.2.0 is used but incompatible" in text and "then `pip install mmcv-lite==2.1.0`" in text
    assert "\n" not in text


@needs("mmdet")
def test_custom_imports_is_all_a_config_needs(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "custom_imports = dict(imports=['dcn_plugin.mmdet'])\n"
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
    run(code)


README_CONFIG = """
_base_ = "mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py"
custom_imports = dict(imports=["dcn_plugin.mmdet"])
model = dict(backbone=dict(deformable=dict(type="DCNv2", targets=["stage3", "stage4"], depthwise=False)))
"""


@needs("mmdet")
def test_configs_of_packages_need_no_pkg_resources(tmp_path):
    """The newest setuptools has none, and MMEngine looks for ``mmdet::...`` with it."""
    (tmp_path / "my_config.py").write_text(README_CONFIG)
    (tmp_path / "script.py").write_text(
        "import sys\n"
        "from mmengine.config import Config\n"
        "print(Config.fromfile(sys.argv[1]).model.backbone.deformable.type)\n"
    )
    inspect = f"""
from dcn_plugin.__main__ import main
main(["inspect", {str(tmp_path / "my_config.py")!r}, "--shape", "64", "64"])
"""
    assert "DCNv2" in run(inspect, missing=("pkg_resources",))
    script = f"""
import runpy
sys.argv = ["dcn_plugin.mmdet", {str(tmp_path / "script.py")!r}, {str(tmp_path / "my_config.py")!r}]
runpy.run_module("dcn_plugin.mmdet", run_name="__main__")
"""
    assert run(script, missing=("pkg_resources",)).splitlines()[-1] == "DCNv2"


@needs("mmengine")
def test_finds_packages_as_pkg_resources_does(tmp_path):
    info = tmp_path / "py_yaml-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: py-yaml\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("yaml\n")
    code = f"""
sys.path.append({str(tmp_path)!r})
import mmengine.utils
from dcn_plugin.mmengine import patches
from pathlib import Path
from importlib.metadata import PackageNotFoundError
utils = mmengine.utils
assert utils.is_installed is mmengine.config.config.is_installed is patches.is_installed
assert utils.get_installed_path is mmengine.hub.hub.get_installed_path is patches.get_installed_path
assert [utils.is_installed(name) for name in ("mmengine", "py-yaml", "yaml", "no_such_package")] == [1, 1, 1, 0]
folder = str(Path(mmengine.__file__).parent)
assert utils.get_installed_path("mmengine") == folder
import yaml
for name in ("yaml", "py-yaml"):  # by the package, and by its distribution
    assert Path(utils.get_installed_path(name)) in Path(yaml.__file__).parents, name
try:
    utils.get_installed_path("no_such_package")
except PackageNotFoundError:
    print("not found")
"""
    assert "not found" in run(code, missing=("pkg_resources",))


@needs("mmdet")
def test_every_step_may_be_repeated():
    """Each function that an upper floor's import calls changes nothing when it is called again."""
    code = """
import dcn_plugin.mmdet, mmengine.optim, mmdet.models
from dcn_plugin.mmdet import mmcv_ops, patches, provide_mmcv_ext, register_roi_extractors
from dcn_plugin.mmengine import patches as mmengine_patches, register_conv_layers, register_deformable_key
from dcn_plugin.mmengine import register_offset_hook, register_offset_vis_hook
from mmengine.analysis import complexity_analysis
from mmengine.registry import HOOKS, MODELS

def state():
    return [MODELS.build_func, dict(MODELS.module_dict), dict(HOOKS.module_dict),
            [(child.build_func, dict(child.module_dict)) for child in MODELS.children.values()],
            mmengine.optim.DefaultOptimWrapperConstructor.add_params,
            mmengine.config.config.is_installed, mmengine.utils.get_installed_path,
            mmdet.models.backbones.resnet.Bottleneck.__init__, mmengine.runner.Runner.resume,
            mmengine.dist.utils._init_dist_pytorch, mmengine.model.MMDistributedDataParallel.__init__,
            sys.modules["mmcv.ops.nms"].NMSop.forward, sys.modules["mmcv._ext"],
            dict(complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS),
            len(torch.serialization.get_safe_globals()),
            len(torch.nn.modules.module._global_module_registration_hooks)]

before = state()
steps = [register_conv_layers, register_deformable_key, register_offset_hook, register_offset_vis_hook,
         provide_mmcv_ext, mmcv_ops.replace, register_roi_extractors, mmengine_patches.count_flops,
         mmengine_patches.load_mmengine_checkpoints, mmengine_patches.apply_offset_learning_rates,
         mmengine_patches.load_old_offsets, mmengine_patches.explain_resuming,
         mmengine_patches.launch_on_cpus, mmengine_patches.find_packages, patches.fall_back_on_stride,
         patches.suppress_in_bfloat16]
for step in steps:
    step()
    assert state() == before, step
assert_ours(MODELS.build(dict(type="DCN", in_channels=4, out_channels=4, kernel_size=1, deformable=None)))
"""
    run(code)
