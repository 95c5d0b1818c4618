"""Changes to the behaviour of MMEngine and PyTorch, a function each; all may be called more than once."""

import functools
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import mmengine.config.config
import mmengine.dist.utils
import mmengine.hub.hub
import mmengine.utils.package_utils
import numpy as np
import torch
from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import generic_activation_jit
from mmengine.device import get_device
from mmengine.logging import HistoryBuffer
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from dcn_plugin.layers.old_offsets import predicts_offsets, rename_old_offsets
from dcn_plugin.layers.zero_init import ZeroInitConv2d
from dcn_plugin.ops.flops import JIT_HANDLES


def find_packages() -> None:
    """Lets configs have bases of packages, as ``mmdet::...``, with any setuptools.

    MMEngine (all versions up to 0.10.7) looks for packages with pkg_resources, which recent versions of setuptools no
    longer have, and which takes long to import and warns where they do. The standard library finds them too.
    """
    utils = mmengine.utils
    for module in (utils.package_utils, utils, mmengine.config.config, mmengine.hub.hub):
        for function in (is_installed, get_installed_path):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)


def is_installed(package: str) -> bool:
    """Whether there is a distribution, or a package with an ``__init__.py``, of this name."""
    try:
        metadata.distribution(package)
        return True
    except metadata.PackageNotFoundError:
        spec = find_spec(package)
        return spec is not None and spec.origin is not None


def get_installed_path(package: str) -> str:
    """The folder of a package, which may be named by its distribution: 'mmcv-full' is that of mmcv.

    Raises:
        ModuleNotFoundError: nothing of this name is installed.
        RuntimeError: it is a namespace package, or a distribution that names no package.
    """
    spec = find_spec(package)
    if spec is None:
        names = (metadata.distribution(package).read_text("top_level.txt") or "").split()
        spec = find_spec(names[0]) if names else None
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{package} is a namespace package, or a distribution that names no package")
    return str(Path(spec.origin).parent)


def load_mmengine_checkpoints() -> None:
    """Lets ``torch.load`` read the checkpoints that MMEngine's Runner writes.

    Since 2.6 ``torch.load`` refuses all but tensors and plain containers, but MMEngine's checkpoints hold the histories
    of logged scalars too, and up to 0.10.7 it cannot read them back. Their types join PyTorch's list of safe ones.
    """
    # NumPy pickles under the names its modules had in version 1 and, from 2 on, under those they have now.
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    functions = [
        (getattr(multiarray, function), f"numpy.{core}.{function}")
        for function in ("_reconstruct", "scalar")
        for core in ("core.multiarray", "_core.multiarray")
    ]
    types = [HistoryBuffer, np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?"))]
    # By name, as entries of our own: who takes a bare type from the list again, as the fork of MMEngine does after each
    # checkpoint that it loads, takes the bare type of everybody.
    named = [(one, f"{one.__module__}.{one.__qualname__}") for one in types]
    torch.serialization.add_safe_globals([(_statistic_of_history_buffer, "builtins.getattr"), *named, *functions])


def _statistic_of_history_buffer(owner, name):
    """``getattr`` as far as a pickled HistoryBuffer needs it: for its own statistics, and nothing else."""
    if owner is not HistoryBuffer or name.startswith("_"):
        raise ValueError(
            f"a checkpoint asks for attribute {name!r} of {owner!r}, which is not a statistic of MMEngine's"
        )
    return getattr(owner, name)


def apply_offset_learning_rates() -> None:
    """Lets ``dcn_offset_lr_mult`` of ``paramwise_cfg`` reach our layers.

    MMEngine (all versions up to 0.10.7) looks for an ``nn.Conv2d`` named ``conv_offset`` in a layer of mmcv's class and
    passes over others without a word. What predicts our offsets is neither. The method is wrapped, rather than a class
    registered in place of the constructor, so that subclasses and configs that name the class itself follow.
    """
    add_params = DefaultOptimWrapperConstructor.add_params
    if hasattr(add_params, "knows_our_layers"):
        return

    @functools.wraps(add_params)
    def add_params_of(self, params, module, prefix="", is_dcn_module=None):
        if isinstance(module, ZeroInitConv2d) and prefix.rpartition(".")[2] == "conv_offset":
            stand_in = nn.Conv2d.__new__(nn.Conv2d)
            stand_in.__dict__ = module.__dict__  # so its parameters are the module's own
            module, is_dcn_module = stand_in, True
        add_params(self, params, module, prefix=prefix, is_dcn_module=is_dcn_module)

    add_params_of.knows_our_layers = True
    DefaultOptimWrapperConstructor.add_params = add_params_of


def explain_resuming() -> None:
    """Says what to do where a plain model's run is resumed with a model that has offsets by now.

    PyTorch's optimizers (all versions) only say that parameter groups differ.
    """
    resume = Runner.resume
    if hasattr(resume, "explains"):
        return

    @functools.wraps(resume)
    def resume_or_explain(self, filename, *args, **kwargs):
        try:
            resume(self, filename, *args, **kwargs)
        except ValueError as error:
            if "parameter group" not in str(error) or not any(map(predicts_offsets, self.model.modules())):
                raise
            raise ValueError(
                f"{error}. If {filename} is of a run before the model became deformable, it cannot be resumed: start "
                f"from its weights with load_from={str(filename)!r} and resume=False"
            ) from error

    resume_or_explain.explains = True
    Runner.resume = resume_or_explain


def count_flops() -> None:
    """Lets ``get_model_complexity_info``, and so mmdet's ``get_flops.py``, count our operators.

    MMEngine (all versions up to 0.10.7) counts the operators in its own tables and skips others, so that a model would
    cost less by every convolution that is deformable. By its own rule the outputs of convolutions are activations.
    """
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(JIT_HANDLES)
    complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS["dcn_plugin::deform_conv2d"] = generic_activation_jit("conv")


def load_old_offsets() -> None:
    """Lets checkpoints of mmcv before 1.0 load, whose offsets lie beside the layer: ``conv2_offset.*``.

    Loading shows a module only the keys under its own name, so its parent has to rename them, and any module may become
    one. Hence PyTorch's process-wide hook on the registration of submodules.
    """
    if _watch_registration not in _global_registration_hooks().values():
        register_module_module_registration_hook(_watch_registration)


def _watch_registration(parent: nn.Module, name: str, child: nn.Module) -> None:
    if predicts_offsets(child):
        rename_old_offsets(parent)


def _global_registration_hooks() -> dict:
    return torch.nn.modules.module._global_module_registration_hooks


def launch_on_cpus() -> None:
    """Lets ``--launcher pytorch`` train on CPUs.

    MMEngine (all versions up to 0.10.7) makes every process choose a CUDA device and hands that device's number to
    DistributedDataParallel, which both raise without CUDA. Here processes without an accelerator join a group of gloo's
    (in the place of nccl, which is the default and has nothing for CPUs), and models on the CPU get no device numbers.
    """
    join = mmengine.dist.utils._init_dist_pytorch
    if hasattr(join, "knows_cpus"):
        return

    @functools.wraps(join)
    def join_group(backend, init_backend="torch", **kwargs):
        if get_device() == "cpu" and init_backend == "torch":
            torch.distributed.init_process_group("gloo" if backend == "nccl" else backend, **kwargs)
        else:
            join(backend, init_backend=init_backend, **kwargs)

    wrap = MMDistributedDataParallel.__init__

    @functools.wraps(wrap)
    def wrap_module(self, module, *args, **kwargs):
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            kwargs["device_ids"] = None
        wrap(self, module, *args, **kwargs)

    join_group.knows_cpus = True
    mmengine.dist.utils._init_dist_pytorch = join_group
    MMDistributedDataParallel.__init__ = wrap_module
