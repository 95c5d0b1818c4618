"""Reading and writing checkpoint files."""

import os
import pickle
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from dcn_plugin.targets import listed

from .offsets import State

# Where a checkpoint may keep its state dict, in this order; else it is one.
CONTAINERS = ("state_dict", "model", "model_state_dict", "model_state")
HOLDS_MORE = (
    "it is damaged, or holds more than tensors, and that could run code when it is read; if you trust where it comes "
    "from, --trust reads it"
)


class _ArraysOnly(pickle.Unpickler):
    """Reads what detectron2's .pkl files hold: NumPy's arrays in plain containers."""

    _allowed = {
        *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),  # how Python 3 pickles bytes for Python 2
    }

    def find_class(self, module, name):
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def load(path: Path, trust: bool = False):
    """What a file of torch's or a pickle of NumPy's arrays holds, on the CPU.

    Raises:
        ValueError: it holds, or is, something else. With ``trust`` it may hold anything, and what it says is run.
    """
    with path.open("rb") as file:
        plain_pickle = path.suffix == ".pkl" and file.read(2) != b"PK"  # else a zip file, torch's format
        file.seek(0)
        try:
            if plain_pickle:
                return (pickle.Unpickler if trust else _ArraysOnly)(file, encoding="latin1").load()
            return torch.load(file, map_location="cpu", weights_only=not trust)
        except Exception as error:  # a damaged file may raise anything
            unsafe = isinstance(error, pickle.UnpicklingError) and not trust
            hint = HOLDS_MORE if unsafe else "is it a checkpoint, and complete?"
            reason = next(iter(str(error).splitlines()), repr(error))
            raise ValueError(f"cannot read {path} ({hint}): {reason}") from error


def state_dict_of(checkpoint, source) -> tuple[State, list[str]]:
    """A checkpoint's state dict, arrays as tensors, and what else the checkpoint holds.

    Raises:
        ValueError: there is none.
    """
    state, beside = checkpoint, []
    if isinstance(state, dict):
        for container in CONTAINERS:
            if isinstance(state.get(container), (dict, nn.Module)):
                beside = [str(key) for key in state if key not in (container, "meta")]
                state = state[container]
                break
    if isinstance(state, nn.Module):
        state = state.state_dict()
    if not isinstance(state, dict):
        raise ValueError(f"{source} holds a {type(state).__name__}, not a state dict")
    tensors: State = OrderedDict()
    for name, value in state.items():
        if not isinstance(name, str):
            beside.append(repr(name))
        elif isinstance(value, Tensor):
            tensors[name] = value
        elif type(value).__module__ == "numpy" and value.dtype.kind in "biuf":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # arrays of a pickle are read-only; they are copied
                tensors[name] = torch.as_tensor(value).clone()
        else:
            beside.append(str(name))
    if not tensors:
        raise ValueError(f"{source} holds no tensors under {', '.join(CONTAINERS)} or at the top, but {listed(beside)}")
    if hasattr(state, "_metadata"):
        tensors._metadata = state._metadata  # type: ignore[attr-defined]
    return tensors, beside


def save(checkpoint: dict, path: Path) -> None:
    """Writes a file whole, or not at all.

    Raises:
        OSError: it cannot be written; on a full disk, say.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # PyTorch's writer: "unexpected pos 64 vs 0"
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's file is its owner's alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
