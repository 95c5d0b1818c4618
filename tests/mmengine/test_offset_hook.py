"""'DeformOffsetHook' in training runs of MMEngine's Runner."""

import json
import logging

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from torch import nn
from torch.utils.checkpoint import checkpoint

from dcn_plugin.layers import (
    DeformConv2dPack,
    DeformPSRoIPool,
    DeformRoIAlign,
    DeformRoIAlignPack,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIAlignPack,
    MultiScaleDeformableAttention,
)
from dcn_plugin.mmengine import DeformOffsetHook

ROIS = torch.tensor([[0, 8.0, 8.0, 24.0, 40.0], [0, 0.0, 16.0, 64.0, 32.0]])


class Net(BaseModel):
    """A v1 1x1, a nested v2 3x3 on maps of 4x6, and RoIs on them."""

    def __init__(self, dtype=torch.float32, checkpointed=False):
        super().__init__()
        self.first = DeformConv2dPack(2, 4, 1)
        self.rest = nn.ModuleDict(dict(second=nn.Sequential(ModulatedDeformConv2dPack(4, 4, 3, padding=1))))
        self.rois = ModulatedDeformRoIAlignPack(2, 4, 8, spatial_scale=1 / 8, gamma=0.1)
        self.dtype, self.checkpointed, self.observed = dtype, checkpointed, []

    def forward(self, inputs, data_samples=None, mode="loss"):
        self.observed.append(self.first.observer is not None)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            x = self.first(inputs)
            second = self.rest["second"]
            x = checkpoint(second, x, use_reentrant=False) if self.checkpointed else second(x)
            return dict(loss=self.rois(x, ROIS).float().square().mean())


class SetsOffsets(Hook):
    """Before iteration i the offsets of the first layer become (dy, dx) = values[i]."""

    priority = "VERY_HIGH"

    def __init__(self, values):
        self.values = values

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        model = getattr(runner.model, "module", runner.model)
        model.first.conv_offset.bias.data.copy_(torch.tensor(self.values[runner.iter]))


def run(model, tmp_path, offsets, wrap=None, compile=None, **hook):
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader=dict(
            dataset=[dict(inputs=torch.randn(2, 4, 6)) for _ in offsets],
            batch_size=1,
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type="default_collate"),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.0)),
        default_hooks=dict(logger=dict(type="LoggerHook", interval=2), checkpoint=None),
        custom_hooks=[SetsOffsets(offsets), dict(type="DeformOffsetHook", **hook)],
        cfg=dict(compile=compile) if compile else None,
        experiment_name=tmp_path.name,
        default_scope="mmengine",
    )
    if wrap:
        runner.model = wrap(runner.model)
    runner.train()
    return runner


def rows(tmp_path):
    [file] = tmp_path.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines() if "offset_mean" in line]


def history(tmp_path, name):
    return [row[name] for row in rows(tmp_path)]


def test_logs_what_is_computed_by_hand(tmp_path):
    model = Net()
    with torch.no_grad():
        model.rois.offset_fc[-1].bias.copy_(torch.tensor([5.0] * 4 + [0.0] * 4))  # x of the four bins, then y
    runner = run(model, tmp_path, [(9, 9), (0.0, 2.5), (9, 9), (3.0, -4.0)], interval=2)
    assert model.observed == [False, True, False, True]
    assert all(layer.observer is None for layer in (model.first, model.rest["second"][0], model.rois))

    assert history(tmp_path, "offset_mean/first") == history(tmp_path, "offset_max/first") == [2.5, 5.0]
    # Columns 0 to 5 moved by 2.5: two of six lie at 6 or beyond. Moved by -4: the columns 0 to 3 at -1 or before (the
    # last of these exactly there), and rows 1 to 3 moved by 3 at 4 or beyond; 1 * 2 of 4 * 6 stay.
    assert history(tmp_path, "offset_outside/first") == [pytest.approx(1 / 3), pytest.approx(22 / 24)]

    assert history(tmp_path, "offset_mean/rest.second.0") == history(tmp_path, "offset_max/rest.second.0") == [0.0, 0.0]
    # Of 3 * 4 rows of taps 10 are on the map, of 3 * 6 columns of taps 16.
    assert history(tmp_path, "offset_outside/rest.second.0") == [pytest.approx(1 - 10 / 12 * 16 / 18)] * 2
    assert history(tmp_path, "mask_mean/rest.second.0") == [0.5, 0.5]

    # The RoIs are 2 and 8 pixels of the map wide: bins move by 0.5 * 2 and 0.5 * 8 in x. The centres of the first were
    # at x = 1, 2, those of the second at 1.5, 5.5 and go to 5.5, 9.5: the latter, in both rows, is beyond 6.
    assert history(tmp_path, "offset_mean/rois") == [pytest.approx(2.5)] * 2
    assert history(tmp_path, "offset_max/rois") == [pytest.approx(4.0)] * 2
    assert history(tmp_path, "offset_outside/rois") == [pytest.approx(1 / 4)] * 2
    assert history(tmp_path, "mask_mean/rois") == [0.5, 0.5]

    assert history(tmp_path, "step") == [2, 4]
    assert "mask_mean/first" not in rows(tmp_path)[0]

    [log] = tmp_path.glob("*/*.log")
    furthest = [line for line in log.read_text().splitlines() if "furthest" in line]
    assert "iteration 2, furthest of 3: first: offset_mean 2.5, offset_max 2.5, offset_outside 0.333" in furthest[0]
    assert len(furthest) == 2
    assert not any("offset" in key for key in runner.message_hub.log_scalars)  # which LoggerHook prints, all of them


def test_position_sensitive_parts():
    """A RoI 16 x 32 of the image, in pixels of the map 2.125 x 4.125, its parts' offsets of the second class one."""
    layer = DeformPSRoIPool(2, group_size=1, spatial_scale=1 / 8, trans_std=0.5)
    net = nn.Module()
    net.layer = layer
    hook, runner = DeformOffsetHook(interval=1), _FakeRunner(net)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    offset = torch.zeros(1, 4, 2, 2)
    offset[:, 2:] = 1
    layer(torch.randn(1, 2, 5, 4), ROIS[:1], offset)
    hook.after_train_iter(runner, 0)
    width, height = 17 / 8, 33 / 8
    reach = (width**2 + height**2) ** 0.5 / 2
    assert runner.scalars["offset_mean/layer"] == pytest.approx(reach / 2)
    assert runner.scalars["offset_max/layer"] == pytest.approx(reach)
    # Centres at x = 0.5 + width / 4 (1.03, 2.09), moved to 2.09, 3.16: on the map. At y = 0.5 + height / 4 (1.53,
    # 3.59), moved to 3.59, 5.66: two of eight parts beyond 4.5.
    assert runner.scalars["offset_outside/layer"] == pytest.approx(1 / 4)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention_is_measured_in_pixels_of_each_level(coordinates):
    """Two levels of one point, moved by (3, 4) pixels of the level, or of a box's half width and height."""
    net = nn.Module()
    net.layer = layer = MultiScaleDeformableAttention(4, 1, num_levels=2, num_points=1, batch_first=True)
    nn.init.zeros_(layer.sampling_offsets.weight)
    layer.sampling_offsets.bias.data = torch.tensor([3.0, 4.0, 3.0, 4.0])
    hook, runner = DeformOffsetHook(interval=1), _FakeRunner(net)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    shapes = torch.tensor([(16, 16), (8, 8)])
    reference = torch.full((1, 3, 2, 2), 0.5)
    if coordinates == 4:  # as wide and high as two pixels of the larger map, or one of the smaller
        reference = torch.cat([reference, torch.full((1, 3, 2, 2), 1 / 8)], -1)
    layer(torch.randn(1, 3, 4), value=torch.randn(1, 320, 4), reference_points=reference, spatial_shapes=shapes)
    hook.after_train_iter(runner, 0)
    mean, largest = (5.0, 5.0) if coordinates == 2 else (3.75, 5.0)
    assert runner.scalars["offset_mean/layer"] == pytest.approx(mean)
    assert runner.scalars["offset_max/layer"] == pytest.approx(largest)
    # The centre of the smaller map is at pixel 3.5: 4 further down is 7.5, which counts; a larger map has more room.
    assert runner.scalars["offset_outside/layer"] == 0
    assert "mask_mean/layer" not in runner.scalars
    assert layer.observer is None


class _FakeRunner:
    iter = 0

    def __init__(self, model):
        self.model, self.visualizer, self.scalars = model, self, {}
        self.logger = logging.getLogger("fake")

    def add_scalars(self, scalars, step):
        self.scalars = scalars


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_amp_and_gradient_checkpointing(dtype, checkpointed, tmp_path):
    model = Net(dtype, checkpointed)
    run(model, tmp_path, [(0.0, 2.5), (3.0, -4.0)], interval=1)
    assert history(tmp_path, "offset_mean/first") == [2.5, 5.0]
    assert history(tmp_path, "mask_mean/rest.second.0") == [0.5, 0.5]
    assert history(tmp_path, "offset_outside/rest.second.0") == [pytest.approx(1 - 10 / 12 * 16 / 18)] * 2


def test_in_a_distributed_wrapper(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run(Net(), tmp_path, [(0.0, 2.5), (3.0, -4.0)], wrap=MMDistributedDataParallel, interval=1)
    finally:
        torch.distributed.destroy_process_group()
    assert history(tmp_path, "offset_mean/first") == [2.5, 5.0]


def test_compiled_models_stay_compiled(tmp_path):
    model, compilations, calls = Net(), [], []

    def backend(graph, inputs):
        compilations.append(graph)

        def call(*arguments):
            calls.append(arguments)
            return graph.forward(*arguments)

        return call

    model.first.compile(backend=backend)
    run(model, tmp_path, [(1.0, 0.0), (0.0, 2.5), (9.0, 9.0), (3.0, -4.0), (0.0, 0.0)], interval=2)
    assert history(tmp_path, "offset_mean/first") == [2.5, 5.0]
    assert len(compilations) == 1 and len(calls) == 3  # in iterations 1, 3 and 5, by the same code


def test_a_compiled_training_step(tmp_path):
    run(Net(), tmp_path, [(1.0, 0.0), (0.0, 2.5), (9.0, 9.0)], compile=dict(backend="eager"), interval=2)
    assert history(tmp_path, "offset_mean/first") == [2.5]


def test_warns_once_a_layer_of_offsets_that_run_away(tmp_path):
    run(Net(), tmp_path, [(0.0, 9.0), (0.0, 11.0), (0.0, 12.0)], interval=1, threshold=10)
    text = _warnings(tmp_path)
    assert text.count("run away") == 1
    assert "iteration 2, first: the samples run away, displaced by 11.0 pixels on average, 11.0 at most" in text


def test_warns_of_offsets_that_are_not_finite(tmp_path):
    nan = float("nan")
    run(Net(), tmp_path, [(0.0, 1.0), (nan, 0.0), (0.0, float("inf")), (0.0, 1.0)], interval=1)
    text = _warnings(tmp_path)
    assert text.count("first: 24 of 24 displacements are not finite") == 1 and "iteration 2" in text
    assert history(tmp_path, "offset_outside/first")[1:3] == [1.0, 1.0]
    assert history(tmp_path, "offset_mean/first")[0] == history(tmp_path, "offset_mean/first")[3] == 1.0


def _warnings(tmp_path):
    [log] = tmp_path.glob("*/*.log")
    return "\n".join(line for line in log.read_text().splitlines() if "WARNING" in line)


def test_looks_at_the_layers_named(tmp_path):
    run(Net(), tmp_path, [(0.0, 1.0)], interval=1, layers=["rest.*", "first"])
    names = {key.split("/")[-1] for key in rows(tmp_path)[0] if "offset" in key}
    assert names == {"rest.second.0", "first"}
    with pytest.raises(ValueError, match=r"'rset\.\*' matches none of the deformable layers: \['first', "):
        run(Net(), tmp_path / "again", [(0.0, 1.0)], layers="rset.*")


def test_says_that_there_is_nothing_to_look_at(tmp_path):
    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(2, 4, 1)
            self.first.conv_offset, self.first.observer = nn.Conv2d(2, 2, 1), None
            self.rest = nn.ModuleDict(dict(second=nn.Conv2d(4, 4, 1)))
            self.rois = nn.Identity()

        def forward(self, inputs, data_samples=None, mode="loss"):
            return dict(loss=self.first(inputs).mean())

    run(Plain(), tmp_path, [(0.0, 1.0)])
    assert "the model has no deformable layers" in _warnings(tmp_path)


def test_layers_that_do_not_run_or_get_no_rois_log_nothing():
    net = nn.ModuleDict(
        dict(unused=DeformConv2dPack(1, 1, 1), rois=DeformRoIAlignPack(2, 4, 8), straight=DeformRoIAlign(2))
    )
    hook, runner = DeformOffsetHook(interval=1), _FakeRunner(net)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    net["rois"](torch.randn(1, 4, 8, 8), torch.zeros(0, 5))
    net["straight"](torch.randn(1, 4, 8, 8), ROIS)
    hook.after_train_iter(runner, 0)
    assert not runner.scalars


def test_a_layer_called_twice_counts_both():
    net = nn.ModuleDict(dict(conv=DeformConv2dPack(1, 1, 1)))
    hook, runner = DeformOffsetHook(interval=1), _FakeRunner(net)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    for size, reach in ((2, 1.0), (4, 2.0)):
        net["conv"].conv_offset.bias.data.fill_(reach / 2**0.5)
        net["conv"](torch.randn(1, 1, size, size))
    hook.after_train_iter(runner, 0)
    assert runner.scalars["offset_mean/conv"] == pytest.approx((4 * 1 + 16 * 2) / 20)
    assert runner.scalars["offset_max/conv"] == pytest.approx(2)


def test_the_interval_must_be_positive():
    with pytest.raises(ValueError, match="interval must be at least 1"):
        DeformOffsetHook(interval=0)
