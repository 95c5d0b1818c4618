"""The formats in which a network leaves PyTorch: how each is written, and how it is run."""

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from .network import Network, layer_of_error, summary

Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """A network about to be written, with an example of its input."""

    network: Network
    images: Tensor
    names: list[str]
    dynamic: bool
    opset: int

    def program(self) -> torch.export.ExportedProgram:
        """Captured by torch.export; dynamic heights and widths are multiples of 32.

        From 160 on: a map of stride 128, of the coarsest level, that is one pixel wide has a graph of its own.
        """
        shapes = None
        if self.dynamic:
            dim = torch.export.Dim
            height, width = (32 * dim(f"{name}_32", min=5, max=4096) for name in ("height", "width"))
            shapes = ({0: dim("batch", min=1, max=4096), 2: height, 3: width},)
        with layer_of_error(self.network), _quiet():
            return torch.export.export(self.network, (self.images,), dynamic_shapes=shapes, strict=False)


def write_onnx(exported: Exported, path: Path) -> None:
    from dcn_plugin.onnx import translations

    table, program = translations(), exported.program()
    try:
        with _quiet():
            torch.onnx.export(
                program,
                f=str(path),
                input_names=["images"],
                output_names=exported.names,
                opset_version=exported.opset,
                custom_translation_table=table,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(f"{_layer_that_failed(program, error)}ONNX export: {summary(error)}") from error


def _layer_that_failed(program: torch.export.ExportedProgram, error: BaseException | None) -> str:
    """The layer and operator of the node that an exporter's error names."""
    text = ""
    while error is not None:
        text, error = f"{text}\n{error}", error.__cause__
    named = re.search(r"translating node %(\w+)", text)
    for node in program.graph.nodes:
        if named and node.name == named[1]:
            layers = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
            return f"{layers[-1][0].removeprefix('detector.')}: {node.target}: "
    return ""


def load_onnx(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(o) for o in session.run(None, {"images": images.numpy()})]


def write_openvino(exported: Exported, path: Path) -> None:
    import openvino

    from .openvino import convert

    half = exported.images.dtype == torch.float16
    with layer_of_error(exported.network), _quiet():
        traced = torch.jit.trace(exported.network, exported.images, check_trace=False)
    try:
        with _quiet():
            model = convert(traced, exported.images, exported.names, exported.dynamic)
    except openvino.frontend.OpConversionFailure as error:
        # "... conversion of operation __module.LAYER/OPERATOR with schema ...", and a rule's own error further down
        text = str(error)
        found = re.search(r"conversion of operation (?:__module\.)?(\S+) with", text)
        found = found or re.search(r"Conversion is failed for: (.+)", text)
        own = re.search(r"ValueError: (.+)", text)
        where = found[1].removeprefix("detector.") if found else type(exported.network.detector).__name__
        raise ValueError(f"{where} cannot be converted: {own[1] if own else 'OpenVINO has no rule for it'}") from error
    openvino.save_model(model, path, compress_to_fp16=half)


def load_openvino(path: Path, threads: int) -> Run:
    import openvino

    options = {"INFERENCE_NUM_THREADS": str(threads), "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda images: [torch.from_numpy(o.copy()) for o in compiled(images.numpy()).values()]


def write_torch_export(exported: Exported, path: Path) -> None:
    torch.export.save(exported.program(), path)


def load_torch_export(path: Path, threads: int) -> Run:
    module = torch.export.load(path).module()
    return _without_gradients(module)


def write_aoti(exported: Exported, path: Path) -> None:
    program = exported.program()
    with _quiet():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def load_aoti(path: Path, threads: int) -> Run:
    return _without_gradients(torch._inductor.aoti_load_package(str(path)))


@dataclass(frozen=True)
class Format:
    suffix: str
    write: Callable[[Exported, Path], None]
    load: Callable[[Path, int], Run]
    runs_our_library: bool  # what it is shipped with, beside its runtime
    extra: str = ""  # of this package, with which pip installs what it is written and loaded by
    loaded_by: tuple[str, ...] = ()
    written_by: tuple[str, ...] = ()

    def check(self, *packages: str) -> None:
        """Raises ImportError where one of these, of its own packages, is not installed."""
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            needs = " and ".join(missing)
            raise ImportError(
                f"this needs {needs}, which {'is' if len(missing) == 1 else 'are'} not installed: "
                f"`pip install 'dcn_plugin[{self.extra}]'`"
            )


FORMATS = {
    "onnx": Format(".onnx", write_onnx, load_onnx, False, "onnx", ("onnxruntime",), ("onnx", "onnxscript")),
    "openvino": Format(".xml", write_openvino, load_openvino, False, "openvino", ("openvino",)),
    "torch-export": Format(".pt2", write_torch_export, load_torch_export, True),
    "aoti": Format(".pt2", write_aoti, load_aoti, True),
}


@contextmanager
def written_together(path: Path) -> Iterator[Path]:
    """Yields a path of the same name in a temporary folder; without an error, all that is there moves to path's."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder, path.name)
        for file in Path(folder).iterdir():
            os.replace(file, path.with_name(file.name))


def _without_gradients(module) -> Run:
    def run(images):
        with torch.no_grad():
            return list(module(images))

    return run


@contextmanager
def _quiet():
    """Exporters report their progress, and warn of their own internals."""
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield
