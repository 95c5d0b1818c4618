"""Loads the native library and holds what every operator's registration shares."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

FOLDER = Path(__file__).parent.parent
NAMESPACE = "dcn_plugin"
OPERATORS = tuple(
    name + suffix
    for name in ("deform_conv2d", "deform_roi_align", "deform_ps_roi_pool", "ms_deform_attn")
    for suffix in ("", "_backward")
)


def _why_missing(library: Path) -> str:
    sources = FOLDER.parent
    if not (sources / "setup.py").exists():
        return f"dcn_plugin's compiled operators are missing from its installation ({library}): install it again."
    for path in map(Path, sys.path):
        installed = (path / FOLDER.name).resolve()
        if installed != FOLDER.resolve() and (installed / library.name).exists():
            return (
                f"Python imports dcn_plugin from its source folder, {sources}, where no operators are compiled, "
                f"and not the installed package, {installed}: run Python in another folder, or install the source "
                f"folder itself with `pip install --no-build-isolation -e {sources}`."
            )
    return (
        f"dcn_plugin's operators have not been compiled ({library} is missing): compile them for this PyTorch with "
        f"`pip install --no-build-isolation -e {sources}`."
    )


def _load(name: str) -> None:
    library = FOLDER / name
    if not library.exists():
        raise ImportError(_why_missing(library))
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"dcn_plugin's compiled operators do not load on PyTorch {torch.__version__} (they need 2.10 or later): "
            "rebuild them with `pip install --no-build-isolation --no-deps --force-reinstall .` in its folder."
        ) from error


def _refuse_cuda(*args, **kwargs):
    raise RuntimeError(
        "dcn_plugin was built without its CUDA operators: with nvcc on the PATH, rebuild it with "
        "`DCN_PLUGIN_CUDA=1 pip install --no-build-isolation --no-deps --force-reinstall .` in its folder."
    )


_load("_cpu.so")
_FRAGMENT = torch.library.Library(NAMESPACE, "FRAGMENT")
if torch.version.cuda is not None and (FOLDER / "_cuda.so").exists():
    _load("_cuda.so")
else:
    for _operator in OPERATORS:
        _FRAGMENT.impl(_operator, _refuse_cuda, "CUDA")


def implement(operator: str, kernel: Callable, key: str) -> None:
    """Registers a Python kernel of ``operator`` for a dispatch key."""
    _FRAGMENT.impl(operator, kernel, key)


def register_autocast(operator: str, keep: tuple[str, ...] = ()) -> None:
    """Lets autocast run ``operator`` as it runs convolutions: floating tensors are cast to autocast's dtype.

    float64 tensors and the arguments named in ``keep`` keep their dtype. (``torch.library.register_autocast`` fixes the
    dtype when it registers; this follows whatever dtype the region asks for.)
    """
    overload = getattr(getattr(torch.ops, NAMESPACE), operator).default
    names = [argument.name for argument in overload._schema.arguments]

    def register(device: str) -> None:
        key = f"Autocast{device.upper()}"
        autocast_off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args, **kwargs):
            dtype = torch.get_autocast_dtype(device)

            def cast(name, value):
                eligible = (
                    name not in keep
                    and isinstance(value, torch.Tensor)
                    and value.is_floating_point()
                    and value.dtype is not torch.float64
                    and value.device.type == device
                )
                return value.to(dtype) if eligible else value

            args = [cast(name, value) for name, value in zip(names, args, strict=False)]
            kwargs = {name: cast(name, value) for name, value in kwargs.items()}
            with torch._C._ExcludeDispatchKeyGuard(autocast_off):
                return overload(*args, **kwargs)

        implement(operator, kernel, key)

    register("cpu")
    register("cuda")


def raises_out_of_memory(function: Callable[P, R]) -> Callable[P, R]:
    """Gives the error of a GPU without enough memory its type in PyTorch, which the stable ABI does not carry."""

    @functools.wraps(function)
    def caller(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if type(error) is RuntimeError and "CUDA out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from None
            raise

    return caller


def overridable(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Lets arguments that override torch's functions (``__torch_function__``) answer a public function's calls.

    torch.fx traces by such arguments: the function becomes one node of the graph.
    """
    call = raises_out_of_memory(function)

    @functools.wraps(function)
    def public(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        values = (*args, *kwargs.values())
        if torch.overrides.has_torch_function(values):
            return torch.overrides.handle_torch_function(public, values, *args, **kwargs)
        return call(*args, **kwargs)

    return public


def check_tensors(**arguments: Tensor) -> None:
    """The check that the dispatcher leaves to the compiled operator, which cannot name the argument."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {value!r}")


def pair(value, name: str) -> list[int]:
    """An int or two ints as two ints; anything else is a ValueError that names the argument."""
    integers = (int, torch.SymInt)
    values = [value, value] if isinstance(value, integers) else value
    if not isinstance(values, (tuple, list)) or len(values) != 2 or not all(isinstance(v, integers) for v in values):
        raise ValueError(f"{name} must be an integer or two integers, got {value!r}")
    return list(values)


def check_devices(input: torch.Tensor, input_name: str = "input", /, **others: torch.Tensor | None) -> None:
    """The check that fake kernels share with csrc/tensor.h, for tensors on the meta device."""
    for name, other in others.items():
        if other is not None and other.device != input.device:
            raise RuntimeError(
                f"{name} must be on {input_name}'s device {input.device}, got {other.device} "
                f"(shapes: {input_name} {tuple(input.shape)}, {name} {tuple(other.shape)})"
            )


def memory_format_of(tensor: torch.Tensor) -> torch.memory_format:
    """The layout in which an operator answers a (N, C, H, W) tensor; csrc/tensor.h has the same rule."""
    (_, channels, _, width), (_, c, h, w) = tensor.shape, tensor.stride()
    if c == 1 and channels > 1 and w >= channels and h >= w * width:
        return torch.channels_last
    return torch.contiguous_format


def check_onnx_export(operator: str) -> None:
    """Where ``torch.onnx.export`` is about to fail for want of this package's translations, says how to give it them.

    Fake kernels ask, since the exporter runs these first. What is not imported cannot have been passed.
    """
    exporter = sys.modules.get("torch.onnx")
    if exporter is not None and exporter.is_in_onnx_export() and f"{NAMESPACE}.onnx" not in sys.modules:
        raise RuntimeError(
            f"torch.onnx.export knows {NAMESPACE}::{operator} by dcn_plugin.onnx alone: import it and pass "
            "custom_translation_table=dcn_plugin.onnx.translations()"
        )
