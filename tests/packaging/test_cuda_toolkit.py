"""For which GPUs setup.py builds, and with which nvcc. The nvcc of these tests compiles nothing and notes its calls."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CUDA_12_4 = {(5, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)}
CUDA_13_0 = {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}

NVCC = """#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release 11.8, V11.8.89" ;;
    --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_90a\\n' ;;
    *)  echo "$@" >>"${0%/*}/calls"
        for word; do :; done
        echo >"$word" ;;
esac
"""


@pytest.fixture
def toolkit():
    spec = importlib.util.spec_from_file_location("cuda_toolkit", ROOT / "tools/cuda_toolkit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_home(tmp_path):
    """A CUDA toolkit whose nvcc notes how it is called and leaves an empty output file."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    return nvcc.parents[1]


def test_newest_nvcc_builds_for_all(toolkit):
    kept, dropped = toolkit.choose_capabilities(toolkit.CAPABILITIES, CUDA_13_0)
    assert (" ".join(kept), dropped) == (toolkit.CAPABILITIES, [])


def test_older_nvcc_leaves_newer_gpus_to_the_driver(toolkit):
    kept, dropped = toolkit.choose_capabilities("8.0 9.0 10.0 12.0+PTX", CUDA_12_4)
    assert (kept, dropped) == (["8.0", "9.0+PTX"], ["10.0", "12.0+PTX"])


@pytest.mark.parametrize(
    ("wanted", "kept", "dropped"),
    [
        ("8.6", ["8.6"], []),
        ("5.0;8.0;9.0a", ["8.0", "9.0a"], ["5.0"]),
        ("8.0+PTX, 9.0", ["8.0+PTX", "9.0"], []),
        ("7.5+PTX", ["7.5"], []),
        ("7.5 12.0+PTX", ["7.5"], ["12.0+PTX"]),
    ],
)
def test_takes_lists_as_pytorch_writes_them(toolkit, wanted, kept, dropped):
    assert toolkit.choose_capabilities(wanted, CUDA_12_4) == (kept, dropped)


def test_lists_that_cannot_be_built_are_errors(toolkit):
    with pytest.raises(ValueError, match="must list compute capabilities, as '8.0 9.0.PTX', got 'Hopper'"):
        toolkit.choose_capabilities("8.0 Hopper", CUDA_12_4)
    with pytest.raises(ValueError, match=r"nothing to build for in '5.0 12.0'"):
        toolkit.choose_capabilities("5.0 12.0", CUDA_12_4)


def test_flags(toolkit):
    assert toolkit.gencode_flags(["8.0", "9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_reads_what_nvcc_says(toolkit, cuda_home, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    nvcc = toolkit.find_nvcc()
    assert nvcc == str(cuda_home / "bin/nvcc")
    assert toolkit.nvcc_version(nvcc) == "11.8"
    assert toolkit.nvcc_capabilities(nvcc) == {(7, 5), (8, 0), (9, 0)}
    monkeypatch.setenv("CUDA_HOME", str(cuda_home / "none"))
    assert toolkit.find_nvcc() is None


class Build:
    """`setup.py build_ext` of the CUDA library alone, with the nvcc that only notes."""

    def __init__(self, sources, cuda_home, folder):
        self.command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", folder, "--build-lib", folder]
        self.sources, self.calls = sources, cuda_home / "bin/calls"
        # In PyTorch's place what setup.py asks of it, since importing PyTorch takes longer than all the rest.
        stand_in = folder.with_name("stand_in")
        (stand_in / "torch").mkdir(parents=True)
        about = f"class version:\n    cuda = {torch.version.cuda!r}\n\n__version__ = {torch.__version__!r}\n"
        (stand_in / "torch/__init__.py").write_text(about)
        for part in ("include", "lib"):
            (stand_in / "torch" / part).symlink_to(Path(torch.__file__).with_name(part))
        self.env = dict(os.environ, CUDA_HOME=str(cuda_home), DCN_PLUGIN_CUDA="only", PYTHONPATH=str(stand_in))

    def __call__(self, program=None, **env):
        """Returns the calls of nvcc and what was printed."""
        self.calls.write_text("")
        command = [sys.executable, "-c", program] if program else self.command
        done = subprocess.run(command, cwd=self.sources, env=self.env | env, capture_output=True, text=True)
        return self.calls.read_text().splitlines(), done.stdout + done.stderr


@pytest.fixture
def build(sources, cuda_home, tmp_path):
    return Build(sources, cuda_home, tmp_path / "build")


def test_setup_builds_for_the_gpus_that_nvcc_has(build):
    *compiled, linked = build()[0]
    assert len(compiled) == len(list((ROOT / "csrc/cuda").glob("*.cu")))
    for call in compiled:
        assert "-gencode=arch=compute_75,code=sm_75 -gencode=arch=compute_80,code=sm_80" in call
        assert "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90" in call
        assert "-gencode=arch=compute_90,code=compute_90" in call
        assert "compute_120" not in call
        assert '-DDCN_CUDA_CAPABILITIES="7.5, 8.0, 9.0+PTX"' in call
    assert "-shared" in linked
    assert "-ltorch_cuda" in linked


def test_setup_builds_again_for_another_list_alone(build):
    assert build()[0]
    assert build()[0] == []
    *compiled, _ = build(TORCH_CUDA_ARCH_LIST="8.0")[0]
    assert compiled
    assert all("code=sm_80" in call and "90" not in call for call in compiled)


def test_setup_says_what_it_cannot_build(build):
    assert "error: nothing to build for in '12.0'" in build(TORCH_CUDA_ARCH_LIST="12.0")[1]
    assert "no nvcc" in build(CUDA_HOME="/nowhere")[1]
    assert "error: DCN_PLUGIN_CUDA must be 0, 1 or only, got 'yes'" in build(DCN_PLUGIN_CUDA="yes")[1]


def test_setup_warns_of_another_cuda_than_pytorchs(build):
    program = f"import runpy, sys, torch; sys.argv[1:] = {[str(word) for word in build.command[2:]]!r}; "
    program += "torch.version.cuda = '13.0'; runpy.run_path('setup.py')"
    printed = build(program)[1]
    assert "nvcc is of CUDA 11.8" in printed
    assert "of CUDA 13.0: the library needs a driver for CUDA 11.8" in printed
