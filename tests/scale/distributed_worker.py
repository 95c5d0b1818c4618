"""Trains a small model in one process, or distributed over two on the CPU, in several ways; a program and a module.

python -m tests.scale.distributed_worker FOLDER    trains distributed in each of WAYS, for FOLDER/<way>.pth
"""

import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import dcn_plugin
from dcn_plugin.layers import DeformConv2dPack, DeformRoIAlignPack, ModulatedDeformConv2dPack

PROCESSES, STEPS, IMAGES = 2, 4, 4
# By name, arguments of DistributedDataParallel; fsdp takes none.
WAYS = {
    "plain": {},
    "find_unused_parameters": dict(find_unused_parameters=True),
    "static_graph": dict(static_graph=True),
    "gradient_as_bucket_view": dict(gradient_as_bucket_view=True),
    "no_sync": dict(broadcast_buffers=False),
    "converted": {},
    "compile": dict(bucket_cap_mb=1),  # of which the model has two: the compiler divides it there
    "fsdp": None,
}


class Model(nn.Module):
    """Deformable convolutions, or some to convert, and a deformable RoI layer; images 2 and 3 have no RoIs at times."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        native = way != "converted"
        second, third = (DeformConv2dPack, ModulatedDeformConv2dPack) if native else (nn.Conv2d, nn.Conv2d)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8).eval(), nn.ReLU())
        self.body = nn.Sequential(second(8, 8, 3, padding=1, groups=2), nn.GroupNorm(2, 8), nn.ReLU())
        self.extra = third(8, 8, 3, padding=1)
        self.pool = DeformRoIAlignPack(2, 8, deform_fc_channels=400, spatial_scale=0.5)
        self.head, self.roi_head = nn.Linear(8, 4), nn.Linear(32, 2)
        if not native:
            dcn_plugin.convert(self)
        for name, parameter in self.named_parameters():
            if "offset" in name:
                nn.init.normal_(parameter, std=0.1)
        self.double()

    def forward(self, images, rois, step):
        x = self.body(self.stem(images))
        if self.way == "static_graph":
            x = x + checkpoint(self.extra, x, use_reentrant=True)
        elif self.way != "find_unused_parameters" or step % 2:
            x = x + self.extra(x)
        return self.head(x.mean((2, 3))), self.roi_head(self.pool(x, rois).flatten(1))


def data(step, images):
    """Of some of the images of a step: these, what is wanted of them, and RoIs."""
    generator = torch.Generator().manual_seed(step)

    def draw(*shape):
        return torch.randn(IMAGES, *shape, generator=generator, dtype=torch.float64)[images.start : images.stop]

    left = torch.tensor([[image] for image in images])
    rois = torch.cat([torch.arange(len(images))[:, None], left, left * 0, left + 9, left + 12], 1).double()
    return draw(3, 9, 10), draw(4), rois[(left < 2).squeeze(1) | (step % 2 > 0)]


def loss(model, step, images):
    """A sum over images, over their number in all processes."""
    inputs, wanted, rois = data(step, images)
    scores, of_rois = model(inputs, rois, step)
    return ((scores - wanted).square().sum() + of_rois.sin().sum()) / IMAGES


def train(model, images=range(IMAGES), processes=1, pieces=1, no_sync=nullcontext):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)  # Adam would not notice a factor
    size = len(images) // pieces
    for step in range(STEPS):
        parts = [images[i : i + size] for i in range(0, len(images), size)]
        for part in parts:
            with no_sync() if part is not parts[-1] else nullcontext():
                (processes * loss(model, step, part)).backward()  # processes' gradients are averaged
        optimizer.step()
        optimizer.zero_grad()


def train_distributed(way, images):
    model = Model(way)
    if way == "fsdp":
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for part in (*model.children(), model):
            fully_shard(part, mesh=mesh)
        try:
            dcn_plugin.convert(model.head)
        except ValueError as error:
            assert "convert first" in str(error), error
        else:
            raise AssertionError("converted what is sharded")
        train(model, images, PROCESSES)
        state = model.state_dict().items()
        return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state}
    wrapped = DistributedDataParallel(model, **WAYS[way])
    if way == "compile":
        train(torch.compile(wrapped, backend="aot_eager"), images, PROCESSES)  # inductor takes minutes
    elif way == "no_sync":
        train(wrapped, images, PROCESSES, pieces=2, no_sync=wrapped.no_sync)
    else:
        train(wrapped, images, PROCESSES)
    return model.state_dict()


def work(rank, folder):
    torch.set_num_threads(1)
    group = dict(rank=rank, world_size=PROCESSES, timeout=timedelta(minutes=2))
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", **group)
    images = range(IMAGES)[rank * IMAGES // PROCESSES :][: IMAGES // PROCESSES]
    for way in WAYS:
        state = train_distributed(way, images)
        if rank == 0:
            torch.save(state, folder / f"{way}.pth")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.start_processes(work, (Path(sys.argv[1]),), nprocs=PROCESSES, start_method="fork")
