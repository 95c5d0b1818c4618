"""The source distribution: what it holds, and that what is built from it works."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import dcn_plugin

ROOT = Path(__file__).parents[2]
CPU_ALONE = dict(os.environ, DCN_PLUGIN_CUDA="0", PYTHONPATH="")

USE = """
import importlib.metadata
import pathlib
import torch
import dcn_plugin
from dcn_plugin.ops import deform_conv2d, reference

assert not (pathlib.Path(dcn_plugin.__file__).parents[1] / "setup.py").exists()
assert pathlib.Path(dcn_plugin.__file__).with_name("py.typed").exists()
print(importlib.metadata.version("dcn_plugin"), dcn_plugin.__version__)
tensors = [torch.rand(2, 4, 6, 6), torch.rand(2, 18, 4, 4), torch.rand(3, 4, 3, 3)]
expected = reference.deform_conv2d(*(t.double() for t in tensors))
torch.testing.assert_close(deform_conv2d(*tensors).double(), expected, atol=1e-5, rtol=1e-5)
"""


def test_lists_every_source(sdist):
    with tarfile.open(sdist) as archive:
        listed = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert any(name.endswith(".cuh") for name in csrc)
    assert csrc <= listed
    assert {"setup.py", "pyproject.toml", "tools/cuda_toolkit.py", "README.md", "LICENSE", "CHANGELOG.md"} <= listed
    assert not [name for name in listed if name.endswith((".so", ".o"))]


@pytest.fixture(scope="module")
def clean_environment(tmp_path_factory):
    """A virtual environment that sees this one's packages, but not what is installed of dcn_plugin."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # The finder of an editable install is started by a .pth file, which Python reads in its own folders alone.
    (site_packages / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return folder


@pytest.mark.slow
def test_an_operator_runs_where_it_was_built_from_the_sdist(sdist, clean_environment, tmp_path):
    python = clean_environment / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "install", "-q", *options, sdist], check=True, env=CPU_ALONE, cwd=tmp_path)

    def run(*command):
        done = subprocess.run(command, env=CPU_ALONE, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(python, "-c", USE).split() == [dcn_plugin.__version__] * 2
    where = re.search(r"^python -c \"(.*_cpu.so.*)\"$", (ROOT / "docs/deployment.md").read_text(), re.MULTILINE)[1]
    assert Path(run(python, "-c", where).strip()).is_relative_to(clean_environment)
    assert run(clean_environment / "bin/dcn-plugin", "--help").startswith("usage: ")
