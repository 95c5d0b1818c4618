"""Trainings through mmdet's own train.py end with equal weights: in two processes, killed and resumed, in pieces."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="the trainings run in MMDetection")

import mmdet
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

import dcn_plugin
import dcn_plugin.mmdet

from . import toy

ROOT = Path(dcn_plugin.__file__).parents[1]
TRAIN = Path(mmdet.__file__).parent / ".mim/tools/train.py"
pytestmark = pytest.mark.skipif(not TRAIN.exists(), reason="this mmdet was installed without its tools")


def weights(work_dir, epoch=toy.EPOCHS):
    """The model's and its moving average's, of a checkpoint; EMAHook exchanges them where it saves."""
    checkpoint = torch.load(work_dir / f"epoch_{epoch}.pth", map_location="cpu")
    for stage in ("layer3", "layer4"):
        assert any(stage in name and "conv_offset" in name for name in checkpoint["state_dict"])
    average = {f"average {name}": value for name, value in checkpoint["state_dict"].items()}
    return average | {f"model {name}": value for name, value in checkpoint["ema_state_dict"].items()}


def assert_equal(values, expected, tolerance=0.0):
    assert values.keys() == expected.keys()
    assert all(value.abs().max() < 100 for value in expected.values())  # else a tolerance would say nothing
    furthest = max(float((values[name].double() - expected[name].double()).abs().max()) for name in expected)
    assert furthest <= tolerance


def train_here(work_dir, **settings):
    Runner.from_cfg(Config(toy.settings(work_dir, **settings))).train()
    return weights(work_dir)


def launch(work_dir, *arguments, processes=None, **settings):
    """Runs mmdet's train.py, under torchrun for several processes, on a config file."""
    config = work_dir.with_suffix(".py")
    Config(toy.settings(work_dir, **settings)).dump(str(config))
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        arguments = ("--launcher", "pytorch", *arguments)
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", MKL_CBWR="COMPATIBLE")
    return subprocess.run(
        [*command, "-m", "dcn_plugin.mmdet", "tools/train.py", str(config), *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    """Of a training in one process."""
    folder = tmp_path_factory.mktemp("trained")
    train_here(folder)
    return folder


@pytest.fixture(scope="module")
def trained(work_dir):
    """The weights that one process ends with."""
    return weights(work_dir)


def test_two_processes_equal_one_with_the_whole_batch(trained, tmp_path):
    done = launch(tmp_path / "two", processes=2, batch=toy.BATCH // 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(weights(tmp_path / "two"), trained, 1e-9)


def test_killed_and_resumed_equals_uninterrupted(trained, tmp_path):
    killed = launch(tmp_path / "run", kill=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pth")) == ["epoch_1.pth"]
    resumed = launch(tmp_path / "run", "--resume", kill=True)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    # Nearly always bit for bit. PyTorch's products of float64 matrices may differ in the last bit from process to
    # process, with the alignment of their memory.
    assert_equal(weights(tmp_path / "run"), trained, tolerance=1e-13)


def test_checkpoints_load_once_the_package_is_imported(work_dir):
    """As docs/scaling.md says: PyTorch alone refuses them, for what MMEngine keeps beside the weights."""
    program = f"""
import pickle, torch
try:
    torch.load({str(work_dir / f"epoch_{toy.EPOCHS}.pth")!r})
except pickle.UnpicklingError as error:
    assert "HistoryBuffer" in str(error), error
else:
    raise SystemExit("it loads without dcn_plugin")
import dcn_plugin.mmengine
torch.load({str(work_dir / f"epoch_{toy.EPOCHS}.pth")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_gradient_checkpointing_changes_nothing(trained, tmp_path):
    assert_equal(train_here(tmp_path, with_cp=True), trained, 1e-12)


def test_accumulated_gradients_equal_the_whole_batch(trained, tmp_path):
    """But for the moving average, which counts iterations."""
    accumulated = train_here(tmp_path, batch=toy.BATCH // 2, accumulate=2)
    models = ({k: v for k, v in w.items() if k.startswith("model module.")} for w in (accumulated, trained))
    assert_equal(*models, 1e-9)


def test_conversion_to_synchronised_batch_norm_keeps_the_layers():
    """MMEngine converts where a config says ``sync_bn='torch'``, and reverts in one process."""
    from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm

    model = nn.Sequential(dcn_plugin.layers.ModulatedDeformConv2dPack(3, 4, 3), nn.BatchNorm2d(4)).eval()
    nn.init.normal_(model[0].conv_offset.weight)
    x = torch.rand(2, 3, 6, 6)
    expected, names = model(x), list(model.state_dict())
    converted = convert_sync_batchnorm(model, "torch")
    assert isinstance(converted[1], nn.SyncBatchNorm) and list(converted.state_dict()) == names
    reverted = revert_sync_batchnorm(converted).eval()
    assert type(reverted[0]) is dcn_plugin.layers.ModulatedDeformConv2dPack
    assert torch.equal(reverted(x), expected)
