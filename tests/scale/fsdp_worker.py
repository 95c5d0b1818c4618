"""One of two processes that train a converted model sharded by FSDP2, on the CPU: RANK and a folder for the results."""

import os
import sys

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dcn_plugin


def model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU()]
    net = dcn_plugin.convert(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))
    for name, parameter in net.named_parameters():
        if "conv_offset" in name:
            nn.init.normal_(parameter, std=0.1)
    return net.double()


def data(step):
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(4, *shape, generator=generator, dtype=torch.float64) for shape in ((3, 9, 10), (4,)))


def train(net, part=slice(None)):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for step in range(4):
        images, wanted = (t[part] for t in data(step))
        (net(images) - wanted).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    mesh, net = init_device_mesh("cpu", (2,)), model()
    for layer in net:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    train(net, slice(2 * rank, 2 * rank + 2))
    try:
        dcn_plugin.convert(net[-1])
    except ValueError as error:
        assert "convert first" in str(error), error
    else:
        raise SystemExit("converted what is sharded")
    state = {name: value.full_tensor() for name, value in net.state_dict().items()}
    if rank == 0:
        torch.save(state, os.path.join(sys.argv[1], "state.pth"))
    distributed.barrier()
    distributed.destroy_process_group()
