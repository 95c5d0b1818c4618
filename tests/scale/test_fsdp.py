"""FSDP2 with gloo: a converted model, sharded over two processes, learns what one process learns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from dcn_plugin import convert

from . import fsdp_worker

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch was built without distributed")


def test_two_shards_equal_one_process(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [*command, "-m", "tests.scale.fsdp_worker", str(tmp_path)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state, expected = torch.load(tmp_path / "state.pth"), fsdp_worker.train(fsdp_worker.model()).state_dict()
    assert state.keys() == expected.keys() and any("conv_offset" in name for name in state)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-9)


def test_what_is_wrapped_is_not_converted(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3)))
        with pytest.raises(ValueError, match="DistributedDataParallel already: convert first"):
            convert(wrapped)
    finally:
        distributed.destroy_process_group()
