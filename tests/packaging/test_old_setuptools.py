"""setup.py on a setuptools before 77, which Python 3.11's venvs come with and which cannot read pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import runpy, setuptools, sys
setuptools.__version__ = "65.5.0"
for newer in ("bdist_wheel", "_bdist_wheel"):  # absent there
    sys.modules[f"setuptools.command.{newer}"] = None
sys.modules["setuptools.modified"] = None
import setuptools.config.pyprojecttoml as pyprojecttoml
pyprojecttoml.apply_configuration = lambda *_, **__: sys.exit("invalid pyproject.toml configuration: project.license")
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


def run_setup(*arguments):
    command = [sys.executable, "-c", PROGRAM, *arguments]
    env = dict(os.environ, DCN_PLUGIN_CUDA="0")
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_libraries_can_be_built():
    done = run_setup("build_ext", "--help")
    assert done.returncode == 0, done.stderr
    assert "--inplace" in done.stdout


def test_packages_cannot_and_it_says_why():
    for command in ("bdist_wheel", "egg_info"):
        done = run_setup(command)
        assert done.returncode == 1
        (error,) = done.stderr.splitlines()
        assert error.startswith("error: dcn_plugin needs setuptools >= 77, found 65.5.0: ")
