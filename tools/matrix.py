#!/usr/bin/env python3
"""Runs the tests with one wheel in fresh environments, and writes the table of README.md and docs/install.md.

An environment is a version of PyTorch ("2.14.1"), which runs the operators' tests, or "fork": onedl-mmdetection,
onedl-mmengine and onedl-mmcv as pip installs them, whose mmcv has no compiled operators, which runs the tests of what
registers in MMEngine and MMDetection, and trains and tests a detector.

The wheel is built with the PyTorch of the Python that runs this, without CUDA operators. Each environment is made
with pip in build/matrix, takes 1 to 7 GB (PyPI's PyTorch needs its NVIDIA packages to be imported, on a machine without
a GPU too), and is deleted when its tests have run. An interrupted run goes on where it was: an environment whose tests
have run with these very sources is not run again.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "matrix"
RECORD = ROOT / "docs" / "tested.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "install.md")
BEGIN, END = "<!-- written by tools/matrix.py -->\n", "<!-- until here -->"

TORCH = ["2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"]
FORK = ["onedl-mmdetection==3.5.1", "onedl-mmengine==0.10.12", "onedl-mmcv==2.3.6"]
FORK_TORCH = "torch==2.13.0"
TOOLS = ["pytest", "pytest-xdist", "filelock"]
OPERATORS = ["tests/ops"]
DETECTORS = ["tests/mmengine", "tests/mmdet", "tests/convert", "tests/projects/test_digits.py"]
# It asks whether the package is the checkout's, and here it is the wheel's.
OPTIONS = ["--deselect=tests/projects/test_digits.py::test_is_this_checkout"]

PACKAGE = ("csrc", "dcn_plugin", "tools/cuda_toolkit.py", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TESTS = ("tests", "configs", "projects", "pyproject.toml")
BUILT = shutil.ignore_patterns("*.so", "__pycache__")


def requirements(name):
    if name == "fork":
        return [FORK_TORCH, *FORK, "scikit-learn"]  # whose digits the detector is trained on
    return [f"torch=={name}", "numpy"]


def tests_of(name):
    return DETECTORS if name == "fork" else OPERATORS


def run(*command, **options):
    print("$", *command, flush=True)
    return subprocess.run([str(part) for part in command], **options)


def copy(names, folder):
    """The named files and folders of the project without what is built, in place of what the folder held."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=BUILT)
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(source, folder / name)
    return folder


def digest(*tops, said=""):
    """Of what is said and of the sources below some folders."""
    found = hashlib.sha256(said.encode())
    for top in tops:
        for path in sorted(top.rglob("*") if top.is_dir() else [top]):
            if path.suffix in (".py", ".cpp", ".h"):
                found.update(f"{path.relative_to(BUILD)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def build_wheel(sources):
    wheels = BUILD / "wheel" / digest(sources)
    if not list(wheels.glob("*.whl")):
        shutil.rmtree(BUILD / "wheel", ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--wheel-dir", wheels]
        run(*pip, ".", cwd=sources, env={**os.environ, "DCN_PLUGIN_CUDA": "0"}, check=True)
    (wheel,) = wheels.glob("*.whl")
    return wheel


def test(name, wheel, tests, keep):
    """Makes the environment, runs its tests, and returns what the record says of it."""
    folder, report = BUILD / name, BUILD / f"{name}.xml"
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "venv", folder, check=True)
    run(python, "-m", "pip", "install", "-q", *requirements(name), *TOOLS, check=True)
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel, check=True)
    report.unlink(missing_ok=True)
    pytest = [python, "-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider", *OPTIONS, f"--junitxml={report}"]
    # Nothing but the copy of the tests is beside the working directory: the package comes from the wheel.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    status = run(*pytest, *tests_of(name), cwd=tests, env=env).returncode
    if status not in (0, 1):  # 1: tests failed
        raise SystemExit(f"error: pytest ended with status {status} in {folder}")
    show = (
        "import importlib.metadata as m, json, platform, sys;"
        "print(json.dumps([platform.python_version(), {name: m.version(name) for name in sys.argv[1:]}]))"
    )
    names = ["torch", *(re.split("=", one)[0] for one in (FORK if name == "fork" else []))]
    version, packages = json.loads(subprocess.check_output([python, "-c", show, *names], text=True))
    if not keep:
        shutil.rmtree(folder)
    return dict(packages=packages, python=version, date=str(date.today()), **outcome(report))


def outcome(report):
    """Counts of pytest's report, and the names of the tests that failed."""
    counts = dict(passed=0, failed=0, skipped=0)
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind == "failed":
            failures.append(f"{case.get('classname')}.{case.get('name')}")
    return dict(**counts, failures=failures)


def table(record):
    """The record as Markdown: the versions of PyTorch in order, then the fork."""
    lines = ["| environment | tests | passed | failed | skipped | date |", "|---|---|---|---|---|---|"]
    for name in sorted(record, key=lambda name: [int(n) for n in re.findall(r"\d+", name)] or [999]):
        one = record[name]
        tests = "operators" if name != "fork" else "MMEngine, MMDetection, conversion, the demo's detector"
        versions = ", ".join(f"{package} {version}" for package, version in one["packages"].items())
        lines.append(f"| {versions} | {tests} | {one['passed']} | {one['failed']} | {one['skipped']} | {one['date']} |")
    return "\n".join(lines) + "\n"


def write(record):
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    for page in PAGES:
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{table(record)}\n{END}{rest.partition(END)[2]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", nargs="*", default=TORCH, help=f"default: {' '.join(TORCH)}")
    parser.add_argument("--keep", action="store_true", help="keep the environments in build/matrix")
    parser.add_argument("--again", action="store_true", help="run the tests again where they have run already")
    args = parser.parse_args()
    for name in args.environment:
        if name != "fork" and not re.fullmatch(r"\d+\.\d+\.\d+", name):
            parser.error(f"an environment is a version of PyTorch, as 2.14.1, or fork; got {name!r}")

    sources, tests = copy(PACKAGE, BUILD / "sources"), copy(TESTS, BUILD / "tests")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    digests = {
        name: digest(sources, *(tests / one for one in tests_of(name)), said=" ".join(requirements(name)))
        for name in args.environment
    }
    todo = [name for name in digests if args.again or record.get(name, {}).get("digest") != digests[name]]
    wheel = build_wheel(sources) if todo else None
    for name in todo:
        record[name] = dict(digest=digests[name], **test(name, wheel, tests, args.keep))
        write(record)
    print(table(record))
    failures = {name: record[name]["failures"] for name in args.environment if record[name]["failed"]}
    for name, failed in failures.items():
        print(f"failed in {name}:", *failed, sep="\n  ")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
