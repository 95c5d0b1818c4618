"""A small regression in float64 whose training mmdet's own train.py runs; configs import this module."""

import os
import signal

import torch
from mmdet.registry import DATASETS, HOOKS, MODELS
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch import nn
from torch.utils.data import Dataset

IMAGES, EPOCHS, BATCH = 8, 3, 4


@DATASETS.register_module(force=True)
class ToyImages(Dataset):
    """Images and what is to be predicted of them, drawn from their index."""

    metainfo = {}

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(
            image=torch.randn(3, 32, 32, generator=generator, dtype=torch.float64),
            wanted=torch.randn(4, generator=generator, dtype=torch.float64),
        )


@MODELS.register_module(force=True)
class ToyModel(BaseModel):
    """The mean over a batch of squared errors, so that the mean over processes is that of the whole batch."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = nn.LazyLinear(4)
        self.head(self.backbone(torch.zeros(1, 3, 32, 32))[-1].mean((2, 3)))
        for name, parameter in self.named_parameters():
            if "conv_offset" in name:
                nn.init.normal_(parameter, std=0.05)  # so that samples lie between pixels
        self.double()

    def init_weights(self):
        pass

    def forward(self, image, wanted, mode="tensor"):
        predicted = self.head(self.backbone(image)[-1].mean((2, 3)))
        return dict(loss=(predicted - wanted).square().mean()) if mode == "loss" else [predicted]


@HOOKS.register_module(force=True)
class KillOnce(Hook):
    """Ends the process, as a machine that fails would, in the middle of the second epoch; not when it resumes."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.epoch == 1 and batch_idx == 0 and not runner._resume:
            os.kill(os.getpid(), signal.SIGKILL)


def settings(work_dir, *, batch=BATCH, accumulate=1, with_cp=False, kill=False):
    """The config of a training, as a dict: of a ResNet with DCNv2, native in its third stage, converted in its last."""
    backbone = dict(
        type="ResNet",
        depth=50,
        base_channels=4,
        stem_channels=4,
        frozen_stages=-1,
        with_cp=with_cp,
        norm_cfg=dict(type="GN", num_groups=2),
        norm_eval=False,
        dcn=dict(type="DCNv2", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, False, True, False),
        deformable=dict(type="DCNv2", targets="layer4.*.conv2"),
    )
    return dict(
        custom_imports=dict(imports=["dcn_plugin.mmdet", "tests.scale.toy"]),
        default_scope="mmdet",
        work_dir=str(work_dir),
        model=dict(type="ToyModel", backbone=backbone),
        train_dataloader=dict(
            batch_size=batch,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type="default_collate"),
            dataset=dict(type="ToyImages"),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=EPOCHS),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01, momentum=0.9), accumulative_counts=accumulate),
        param_scheduler=[dict(type="MultiStepLR", by_epoch=True, milestones=[2])],
        default_hooks=dict(
            checkpoint=dict(type="CheckpointHook", interval=1), logger=dict(type="LoggerHook", interval=1)
        ),
        custom_hooks=[dict(type="EMAHook", momentum=0.1), dict(type="DeformOffsetHook", interval=2)]
        + ([dict(type="KillOnce")] if kill else []),
        env_cfg=dict(dist_cfg=dict(backend="gloo")),
        randomness=dict(seed=0),
        log_level="WARNING",
    )
