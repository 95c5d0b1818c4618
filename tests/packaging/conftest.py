import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """The project's folder as a fresh clone has it: nothing built, and no list of files from an earlier build."""
    folder = tmp_path_factory.mktemp("sources") / "dcn_plugin"
    ignored = shutil.ignore_patterns(
        *(".git", ".venv", "build", "dist", "site", "data", "work_dirs"), *("*.egg-info", "__pycache__", "*.so")
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


@pytest.fixture(scope="session")
def sdist(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    program = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, out], cwd=sources, check=True, stdout=subprocess.PIPE)
    (archive,) = out.iterdir()
    return archive
