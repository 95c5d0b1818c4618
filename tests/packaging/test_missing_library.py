"""What importing says where the compiled operators are missing: which of the reasons it is, and what to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path):
    shutil.copytree(ROOT / "dcn_plugin", tmp_path / "clone/dcn_plugin", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "clone/setup.py").touch()
    return tmp_path / "clone"


def error_of_import(folder, *path):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, path)))
    command = [sys.executable, "-c", "import dcn_plugin.ops"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_nothing_was_compiled(clone):
    # -P and the like aside, Python looks into the current folder first: the one that `error_of_import` runs it in.
    error = error_of_import(clone)
    assert error.startswith("ImportError: dcn_plugin's operators have not been compiled")
    assert error.endswith(f"`pip install --no-build-isolation -e {clone}`.")


def test_source_folder_hides_the_installed_package(clone, tmp_path):
    installed = tmp_path / "site-packages/dcn_plugin"
    installed.mkdir(parents=True)
    (installed / "_cpu.so").touch()
    error = error_of_import(clone, installed.parent)
    assert f"from its source folder, {clone}, where no operators are compiled, and not the" in error
    assert f"installed package, {installed}: run Python in another folder" in error


def test_installation_lost_its_library(clone):
    (clone / "setup.py").unlink()
    assert error_of_import(clone).endswith(f"({clone / 'dcn_plugin/_cpu.so'}): install it again.")
