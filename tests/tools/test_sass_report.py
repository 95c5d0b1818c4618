"""tools/sass_report.py on recorded machine code (sass_sample.sass, of sass_sample.cu), and on lines of other kinds."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOOLS = HERE.parents[1] / "tools"


@pytest.fixture
def sass_report(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import sass_report

    return sass_report


@pytest.fixture
def kernel(sass_report):
    (found,) = sass_report.parse_sass((HERE / "sass_sample.sass").read_text())
    return found


def test_reads_every_instruction(kernel):
    assert (kernel.arch, kernel.name) == ("90", "_Z6samplePfPK5uint4i")
    assert len(kernel.instructions) == 80
    assert [x.address for x in kernel.instructions] == list(range(0, 80 * 16, 16))


def test_main_loop_is_the_one_of_products(sass_report, kernel):
    """30 instructions, of which 12 are a loop of three: counted by hand in the recorded file."""
    loop = sass_report.describe(kernel, warps=8)
    assert loop.known
    assert loop.instructions == 18 + 3 * 12
    counts = {name: count for name, count in loop.counts.items() if name != "ALU"}
    assert counts == dict(HMMA=2, LDSM=2, LDGSTS=3)
    assert loop.first_matrix == 24
    assert loop.issue == 54 * 8 / 4
    assert loop.memory == (512 + 256 + 3 * 512) * 8 / 128
    products = 2 * 8 * 16 * 8 * 16
    assert loop.matrix == pytest.approx(products / 2048 / 0.62)
    dense = products / 2048 / 0.8
    before, among, after = 48 * 8 / 4, 3 * 8 / 4, 3 * 8 / 4  # what is issued around the products
    waiting = max(before, loop.memory) + max(among, loop.matrix) + after
    assert loop.ratio == pytest.approx((loop.memory / dense, waiting / dense))


def test_what_is_not_known_is_not_said(sass_report, kernel):
    kernel.arch = "120"
    loop = sass_report.describe(kernel, warps=8)
    assert loop.matrix is loop.ratio is None
    kernel.arch = "80"
    for instruction in kernel.instructions:  # the copies' loop ends with a number that is read from memory
        instruction.text = instruction.text.replace("R8, 0x30, PT", "R8, R9, PT")
    loop = sass_report.describe(kernel, warps=8)
    assert not loop.known
    assert loop.instructions == 30
    assert loop.ratio is not None


def test_loop_of_products_within_the_main_loop(sass_report):
    lines = ["MOV R9, RZ", "HMMA.1688.F32.TF32 R4, R8, R2, R4", "IADD3 R1, R1, 0x1, RZ", "@!P0 BRA 0x10"]
    lines += ["HMMA.1688.F32.TF32 R4, R8, R2, R4", "@P1 BRA 0x0", "EXIT"]
    text = "code for sm_80\nFunction : nested\n" + "".join(
        f"        /*{16 * i:04x}*/   {line} ;   /* 0x0 */\n" for i, line in enumerate(lines)
    )
    (kernel,) = sass_report.parse_sass(text)
    loop = sass_report.describe(kernel, 8)
    assert (loop.instructions, loop.counts["HMMA"], loop.known, loop.matrix) == (6, 2, False, None)
    loop = sass_report.describe(kernel, 8, matrix_trips=5)
    assert (loop.instructions, loop.counts["HMMA"], loop.known) == (3 + 5 * 3, 6, True)
    assert loop.matrix == pytest.approx(6 * 8 * 16 * 8 * 8 / 512 / 0.95)


def test_loop_of_products_that_runs_a_constant_number_of_times(sass_report):
    """It is a part of the main loop's iteration; what it does around the products overlaps but for once each."""
    loads = ["LDG.E.128 R12, desc[UR4][R2.64]"] * 5
    stores = ["STS.128 [R1], R12"] * 7
    lines = ["UMOV UR5, URZ", *loads, "HMMA.16816.F32 R4, R8, R2, R4", *stores, "UIADD3 UR5, UR5, 0x1, URZ"]
    lines += ["UISETP.NE.AND UP0, UPT, UR5, 0x4, UPT", "PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0"]
    lines += ["ISETP.NE.AND P1, PT, R3, 0x9, PT", "@P0 BRA 0x10", "ISETP.GE.AND P1, PT, R3, R4, PT", "@P1 BRA 0x0"]
    (kernel,) = sass_report.parse_sass(
        "code for sm_90\nFunction : repeated\n"
        + "".join(f"        /*{16 * i:04x}*/   {line} ;   /* 0x0 */\n" for i, line in enumerate(lines))
    )
    loop = sass_report.describe(kernel, 8)
    assert (loop.counts["HMMA"], loop.counts["LDG"], loop.counts["STS"], loop.known) == (4, 20, 28, True)
    assert loop.first_matrix == 6
    products = 4 * 8 * 16 * 8 * 16
    dense, memory = products / 2048 / 0.8, 512 * 8 / 128
    assert loop.ratio == pytest.approx((48 * memory / dense, (5 + 36 + 7) * memory / dense))
    assert loop.matrix < 36 * memory


ENDINGS = {
    "a counter": [
        "IMAD.MOV.U32 R9, RZ, RZ, RZ",
        "VIADD R9, R9, 0x1",
        "ISETP.NE.AND P0, PT, R9, 0x4, PT",
        "@P0 BRA 0x10",
    ],
    "12.0": ["MOV R9, RZ", "IADD3 R9, PT, PT, R9, 0x1, RZ", "ISETP.NE.AND P0, PT, R9, 0x4, PT", "@P0 BRA 0x10"],
    "uniform": [
        *("UMOV UR6, 0xc200", "UIADD3 UR6, UPT, UPT, UR6, 0x200, URZ", "UISETP.NE.AND UP0, UPT, UR6, 0xca00, UPT"),
        "BRA.U UP0, 0x10",
    ],
    "8.0": [
        *("MOV R9, RZ", "IADD3 R9, R9, 0x1, RZ", "ISETP.NE.AND P0, PT, R9, 0x4, PT", "@!P0 CALL.REL.NOINC 0x7800"),
        "BRA 0x10",
    ],
    "a flag": [
        *("UPLOP3.LUT UP0, UPT, UPT, UPT, UPT, 0x80, 0x8", "UPLOP3.LUT UP1, UPT, UPT, UPT, UP0, 0x80, 0x8"),
        *("UPLOP3.LUT UP0, UPT, UPT, UPT, UPT, 0x40, 0x4", "BRA.U UP1, 0x10"),
    ],
    "a number of the launch": [
        "MOV R9, RZ",
        "IADD3 R9, R9, 0x1, RZ",
        "ISETP.NE.AND P0, PT, R9, R8, PT",
        "@P0 BRA 0x10",
    ],
    "a flag of the launch": ["UPLOP3.LUT UP1, UPT, UPT, UPT, UP0, 0x80, 0x8", "NOP", "BRA.U UP1, 0x10"],
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_how_often_a_loop_runs(sass_report, ending):
    lines = [sass_report.Instruction(16 * i, text) for i, text in enumerate(ENDINGS[ending])]
    count = None if ending.endswith("of the launch") else 2 if ending == "a flag" else 4
    assert sass_report.trips(lines, 1, len(lines) - 1) == count


def test_kernel_without_products(sass_report):
    (kernel,) = sass_report.parse_sass(
        "code for sm_90\nFunction : plain\n /*0000*/ STL [R1], R2 ;\n /*0010*/ BRA 0x0;\n"
    )
    assert sass_report.describe(kernel, 8) is None
    table = sass_report.table([kernel], 8, None)
    assert table.splitlines()[1].split() == ["plain", "90", "?", "1", "?"]


@pytest.mark.parametrize(
    ("text", "column", "bytes", "products"),
    [
        ("LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", "LDG", 512, 0),
        ("LDS R4, [R2]", "LDS", 128, 0),
        ("@!PT LDS RZ, [RZ]", "ALU", 0, 0),
        ("STS.64 [R2], R4", "STS", 256, 0),
        ("STG.E.128 desc[UR4][R2.64], R4", "ALU", 512, 0),
        ("LDSM.16.MT88.4 R8, [R12]", "LDSM", 512, 0),
        ("LDSM.16.M88 R8, [R12]", "LDSM", 128, 0),
        ("RED.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4", "RED", 512, 0),
        ("@P1 REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4", "RED", 128, 0),
        ("HMMA.16816.F32 R4, R8, R2, R4", "HMMA", 0, 2048),
        ("HMMA.1684.F32.TF32 R4, R8, R2, R4", "HMMA", 0, 512),
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24", "HGMMA", 0, 65536),
        ("@!UP0 UIADD3 UR4, UR4, 0x1, URZ", "ALU", 0, 0),
    ],
)
def test_instruction(sass_report, text, column, bytes, products):
    instruction = sass_report.Instruction(0, text)
    assert (instruction.column, instruction.bytes, instruction.products) == (column, bytes, products)


def test_resources(sass_report):
    text = "arch = sm_90\n Function f:\n  REG:16 STACK:0 SHARED:5120 LOCAL:0\n"
    text += "arch = sm_80\n Function f:\n  REG:8 SHARED:0\n"
    assert sass_report.parse_resources(text) == {("90", "f"): ("16", "5120"), ("80", "f"): ("8", "0")}


def test_program(tmp_path):
    """With tools that say what was recorded, and without any."""
    for name, text in {
        "cuobjdump": f'if [ "$1" = -sass ]; then cat "{HERE}/sass_sample.sass"; else printf "arch = sm_90\\n '
        'Function _Z6samplePfPK5uint4i:\\n  REG:16 STACK:0 SHARED:5120\\n"; fi',
        "nvdisasm": "",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def run(*arguments, path=f"{tmp_path}:/usr/bin:/bin"):
        command = [sys.executable, "-S", TOOLS / "sass_report.py", "lib.so", *arguments]
        return subprocess.run(command, env={"PATH": path}, capture_output=True, text=True)

    done = run("--match", "sample")
    assert done.returncode == 0, done.stderr
    heading, line = (text.split("  ") for text in done.stdout.splitlines())
    found = dict(zip(filter(None, heading), filter(None, line), strict=True))
    found = {name.strip(): value.strip() for name, value in found.items()}
    assert (found["regs"], found["smem"], found["loop"], found["HMMA"], found["first"]) == (
        "16",
        "5120",
        "54",
        "2",
        "24",
    )
    assert found["kernel"].startswith(("sample", "_Z6sample"))
    done = run()
    assert done.returncode == 1
    assert "no kernel of lib.so has 'fused' in its name" in done.stdout
