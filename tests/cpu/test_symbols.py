"""Objects of csrc/cpu/simd share no function with the rest of the library.

They are compiled once for each instruction set. Of a function that several objects define as a weak symbol the linker
keeps one copy, which may use instructions that the processor lacks. Optimised objects rarely show this, because most
inline functions leave no copy; so they are compiled without optimisation here, where all of them do.
"""

import shutil
import subprocess

import pytest

from .native import CXX, INSTRUCTION_SETS, ROOT, run_all


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_no_weak_symbols_outside_the_namespace(name, tmp_path):
    flags = ["-std=c++20", "-O0", "-fvisibility=hidden", *INSTRUCTION_SETS[name], f"-DDCN_ISA={name}"]
    sources = sorted((ROOT / "csrc/cpu/simd").glob("*.cpp"))
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    assert not run_all([CXX, *flags, "-c", source, "-o", to] for source, to in zip(sources, objects, strict=True))
    listing = subprocess.check_output(["nm", "-C", "--defined-only", *objects], text=True)
    symbols = [line.split(maxsplit=2) for line in listing.splitlines() if len(line.split(maxsplit=2)) == 3]
    assert any(f"dcn::cpu::{name}::" in symbol for _, _, symbol in symbols)
    assert not [symbol for _, kind, symbol in symbols if kind in "VWu" and f"dcn::cpu::{name}::" not in symbol]
