"""Two processes with gloo learn what one process learns: DistributedDataParallel in several ways, and FSDP2."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from dcn_plugin import convert

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch was built without distributed")

if distributed.is_available():
    from . import distributed_worker as worker


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """A function of a way: the weights that two processes end with."""
    folder = tmp_path_factory.mktemp("states")
    command = [sys.executable, "-m", worker.__name__, str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)

    def state(way):
        assert (folder / f"{way}.pth").exists(), done.stderr[-3000:]
        return torch.load(folder / f"{way}.pth")

    return state


@pytest.mark.parametrize("way", worker.WAYS)
def test_two_processes_equal_one(way, states):
    model = worker.Model(way)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    worker.train(model)
    state, expected = states(way), model.state_dict()
    assert state.keys() == expected.keys() and any("conv_offset" in name for name in state)
    for name, value in expected.items():
        assert name not in start or (value != start[name]).any(), f"{name} has not learned"
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-9)


def test_what_is_wrapped_is_not_converted(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3)))
        with pytest.raises(ValueError, match="DistributedDataParallel already: convert first"):
            convert(wrapped)
    finally:
        distributed.destroy_process_group()
