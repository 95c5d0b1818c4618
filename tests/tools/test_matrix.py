"""tools/matrix.py counts what pytest reports, and the documents show what it recorded."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "matrix.py"


@pytest.fixture
def matrix():
    spec = spec_from_file_location("matrix", TOOL)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counts_outcomes(matrix, tmp_path):
    tests = tmp_path / "test_outcomes.py"
    tests.write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def broken():\n    raise OSError\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False\n"
        "def test_cannot_start(broken): pass\n"
        "@pytest.mark.skip\n"
        "def test_is_skipped(): pass\n"
    )
    report = tmp_path / "report.xml"
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", tests]
    subprocess.run(pytest_, cwd=tmp_path, stdout=subprocess.PIPE)
    failures = ["test_outcomes.test_fails", "test_outcomes.test_cannot_start"]
    assert matrix.outcome(report) == dict(passed=1, failed=2, skipped=1, failures=failures)


def test_writes_the_table_between_its_marks_again_and_again(matrix, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{matrix.BEGIN}{matrix.END}\n\nafter\n")
    monkeypatch.setattr(matrix, "PAGES", (page,))
    monkeypatch.setattr(matrix, "RECORD", tmp_path / "record.json")
    counts = dict(passed=1, failed=0, skipped=2, date="2026-01-02")
    record = {name: dict(packages={"torch": name}, **counts) for name in ("2.15.0", "2.9.1")}
    record["fork"] = dict(packages={"torch": "2.13.0", "onedl-mmcv": "2.3.6"}, **counts)
    matrix.write(record)
    first = page.read_text()
    matrix.write(record)
    assert page.read_text() == first
    assert first.startswith("before\n\n") and first.endswith("\n\nafter\n")
    rows = [line for line in first.splitlines() if line.startswith("| torch")]
    assert [row.split(" | ")[0] for row in rows] == [
        "| torch 2.9.1",
        "| torch 2.15.0",
        "| torch 2.13.0, onedl-mmcv 2.3.6",
    ]
    assert rows[0].endswith("| 1 | 0 | 2 | 2026-01-02 |")


def test_the_documents_show_the_record(matrix):
    table = matrix.table(json.loads(matrix.RECORD.read_text()))
    for page in matrix.PAGES:
        assert table in page.read_text(), page


def test_refuses_what_is_no_version():
    done = subprocess.run([sys.executable, TOOL, "latest"], capture_output=True, text=True)
    assert done.returncode == 2 and "got 'latest'" in done.stderr
