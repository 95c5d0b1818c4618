"""What the machine code of the fused kernels says of their speed: counts of the main loop and what they cost at least.

python tools/sass_report.py LIBRARY [--match fused] [--warps 8] [--matrix-trips N]

LIBRARY is dcn_plugin/_cuda.so, or anything else that cuobjdump reads. It and nvdisasm come with the CUDA toolkit, with
the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or with triton.

The main loop is the smallest one that has the most matrix instructions; an iteration of it is one chunk of the depth.
Loops within it count as often as they run where that is a constant; else once (marked +), or N times if they have
matrix instructions. What a branch may skip counts as well. Cycles are a multiprocessor's, for an iteration of a block:
- issue: four instructions a cycle;
- memory: 128 bytes a cycle for loads and stores of any kind, as if they always hit the first-level cache;
- matrix: by the rates in RATES, where they are known for the GPU.
The ratio is to the dense convolution's cycles for the same products. The lower figure assumes that all three overlap,
as with several blocks on a multiprocessor; the upper one that a block waits at its barrier, so that only what stands
between the first and the last matrix instruction overlaps with the products.

"first" is the position of the first matrix instruction in the loop. "smem" is static shared memory and, from 9.0 on, the
1024 bytes that the system reserves; a launch adds what the tile and the shape need.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from ptxas_report import demangle

ISSUED, MEMORY_BYTES = 4, 128  # a cycle
MATRIX = "HMMA", "HGMMA"
COLUMNS = (*MATRIX, "LDSM", "LDG", "LDGSTS", "LDS", "STS", "RED", "ALU")


@dataclass
class Rate:
    """Of the tensor cores of one multiprocessor."""

    products: int  # multiplications and additions a cycle of 16-bit numbers; TF32 has half
    synchronous: float  # the share that HMMA reaches; HGMMA reaches all
    dense: float  # the share that dense convolutions and products reach


# Of the published peaks. The shares of 9.0 are what its notes say of PyTorch's own product; those of 8.0 are assumed.
RATES = {"80": Rate(1024, 0.95, 0.85), "90": Rate(2048, 0.62, 0.8)}


@dataclass
class Instruction:
    address: int
    text: str

    def __post_init__(self):
        self.opcode = re.match(r"(?:@!?U?P\w+ )?([\w.]+)", self.text)[1]
        self.name = self.opcode.split(".")[0]
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", self.text)
        self.target = int(target[1], 16) if target else None

    @property
    def column(self):
        name = {"ATOM": "RED", "ATOMG": "RED", "REDG": "RED"}.get(self.name, self.name)
        never = self.text.startswith("@!PT")  # the assembler's spacing
        return name if name in COLUMNS and not never else "ALU"

    @property
    def bytes(self):
        """What a warp moves between registers or global memory and the first-level cache or shared memory."""
        if self.name == "LDSM":
            several = re.search(r"\.([24])$", self.opcode)
            return 128 * (int(several[1]) if several else 1)
        if self.column not in ("LDG", "LDGSTS", "LDS", "STS", "RED") and self.name != "STG":
            return 0
        bits = re.search(r"\.(64|128)\b", self.opcode)
        lanes = re.search(r"F32x([24])", self.opcode)
        return 128 * (int(bits[1]) // 32 if bits else int(lanes[1]) if lanes else 1)

    @property
    def products(self):
        """Multiplications and additions of one warp; an HGMMA's are shared by four."""
        if self.name == "HMMA":  # as 16816: 16 x 8 x 16
            m, n, k = re.search(r"\.(16)(8)(16|8|4)\b", self.opcode).groups()
            return int(m) * int(n) * int(k)
        if self.name == "HGMMA":
            m, n, k = re.search(r"\.(\d+)x(\d+)x(\d+)", self.opcode).groups()
            return int(m) * int(n) * int(k) // 4
        return 0


@dataclass
class Kernel:
    arch: str
    name: str
    instructions: list = field(default_factory=list)
    registers: str = "?"
    shared: str = "?"


def parse_sass(text):
    """The kernels of `cuobjdump -sass`."""
    kernels, arch = [], "?"
    for line in text.splitlines():
        if found := re.search(r"code for sm_(\w+)", line) or re.search(r"EF_CUDA_SM(\d+\w*) ", line):
            arch = found[1]
            if kernels and not kernels[-1].instructions:
                kernels[-1].arch = arch
        elif found := re.search(r"Function : (\S+)", line):
            kernels.append(Kernel(arch, found[1]))
        elif kernels and (found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", line)):
            kernels[-1].instructions.append(Instruction(int(found[1], 16), found[2]))
    return kernels


def parse_resources(text):
    """{(arch, kernel): (registers, static shared memory)} of `cuobjdump -res-usage`."""
    found, arch, name = {}, "?", None
    for line in text.splitlines():
        if heading := re.search(r"arch = sm_(\w+)", line):
            arch = heading[1]
        elif heading := re.search(r"Function (\S+):", line):
            name = heading[1]
        elif used := re.search(r"REG:(\d+).*?SHARED:(\d+)", line):
            found[arch, name] = used.groups()
    return found


def loops(instructions):
    """[(first, last), ...], as indices: from the target of a branch backwards to the branch."""
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    backward = ((i, instruction) for i, instruction in enumerate(instructions) if instruction.target is not None)
    return [(index[x.target], i) for i, x in backward if index.get(x.target, i) < i]


def trips(instructions, first, last):
    """How often a loop runs, or None where that is no constant: a counter that is set before it, raised by a constant
    and compared with one, or a flag that is set before it and cleared in its first iteration.
    """
    body, before = (
        [x.text.replace(".reuse", "") for x in part] for part in (instructions[first:last], instructions[:first])
    )
    # Before a branch without a condition, 8.0 leaves the loop by a call.
    ending = [instructions[last].text, body[-1] if ".NOINC" in body[-1] else ""]
    branch = re.search(r"^@!?(U?P\d) |^BRA\.U !?(UP\d),", next((t for t in ending if not t.startswith("BRA ")), ""))
    if not branch:
        return None
    predicate = branch[1] or branch[2]
    copies = [re.match(rf"U?PLOP3\.LUT {predicate}, U?PT, U?PT, U?PT, (UP\d), 0x80,", t) for t in body]
    predicate = next((found[1] for found in reversed(copies) if found), predicate)
    number = r"(0x[0-9a-f]+)"
    compare = [re.match(rf"U?ISETP\.\w+(?:\.U32)?\.AND {predicate}, U?PT, (U?R\d+), {number}, U?PT", t) for t in body]
    compare = [found for found in compare if found]
    if not compare:
        constant = rf"UPLOP3\.LUT {predicate}, UPT, UPT, UPT, UPT, (0x\d+),"
        cleared = [found[1] for t in body if (found := re.match(constant, t))]
        set_to = [found[1] for t in before if (found := re.match(constant, t))][-1:]
        return 2 if any(copies) and (set_to, cleared) == (["0x80"], ["0x40"]) else None
    counter, end = compare[-1][1], int(compare[-1][2], 16)
    steps = [re.match(rf"(?:VIADD|U?IADD3) {counter}, (?:U?PT, U?PT, )?{counter}, {number}", t) for t in body]
    steps = [int(found[1], 16) for found in steps if found]
    setting = next((t for t in reversed(before) if re.match(rf"\S+ {counter},", t)), "")
    start = re.match(rf"(?:U?MOV|IMAD\.MOV\.U32) {counter}, (?:RZ, RZ, )?(U?RZ|{number})$", setting)
    if len(steps) != 1 or not start:
        return None
    begin = 0 if start[1].endswith("RZ") else int(start[1], 16)
    return ceil((end - begin) / steps[0])


def main_loop(kernel, matrix_trips):
    """(its instructions, with how often each runs in an iteration and how often the loops of products within that hold
    it do; whether that is known, and known of the matrix instructions), or None.
    """
    found = loops(kernel.instructions)
    if not found:
        return None

    def matrix(loop):
        return sum(x.name in MATRIX for x in kernel.instructions[loop[0] : loop[1] + 1])

    # Of loops with the same matrix instructions, one of constant length is a part of an iteration.
    constant = {loop: trips(kernel.instructions, *loop) for loop in found}
    first, last = max(found, key=lambda loop: (matrix(loop), constant[loop] is None, loop[0] - loop[1]))
    if not matrix((first, last)):
        return None
    times, repeats, known, matrix_known = [1] * (last + 1 - first), [1] * (last + 1 - first), True, True
    for begin, end in found:
        if first <= begin and end <= last and (begin, end) != (first, last):
            count = constant[begin, end] or (matrix_trips if matrix((begin, end)) else None)
            known = known and count is not None
            matrix_known = matrix_known and (count is not None or not matrix((begin, end)))
            for i in range(begin, end + 1):
                times[i - first] *= count or 1
                repeats[i - first] *= count if count and matrix((begin, end)) else 1
    return list(zip(kernel.instructions[first : last + 1], times, repeats, strict=True)), known, matrix_known


@dataclass
class Loop:
    """The figures of one kernel's main loop, an iteration of one block."""

    counts: Counter
    known: bool  # how often the loops within it run
    first_matrix: int
    issue: float
    memory: float
    matrix: float | None  # cycles; None: the rates of this GPU, or how often matrix instructions run, are not known
    ratio: tuple | None  # to the dense convolution: with everything overlapping, with waiting at the barrier

    @property
    def instructions(self):
        return self.counts.total()


def describe(kernel, warps, matrix_trips=None):
    """The kernel's :class:`Loop`, or None if it has none with matrix instructions."""
    found = main_loop(kernel, matrix_trips)
    if found is None:
        return None
    body, known, matrix_known = found
    counts = Counter()
    for instruction, times, _ in body:
        counts[instruction.column] += times
    at = [i for i, (instruction, _, _) in enumerate(body) if instruction.name in MATRIX]
    whole = [(instruction, times) for instruction, times, _ in body]
    # A loop of products runs into the next: it has something before its first ones and after its last ones only once.
    before = [(instruction, times / repeats) for instruction, times, repeats in body[: at[0]]]
    after = [(instruction, times / repeats) for instruction, times, repeats in body[at[-1] + 1 :]]
    among = [*whole, *((instruction, -times) for instruction, times in (*before, *after))]

    def issue(part):
        return sum(times for _, times in part) * warps / ISSUED

    def memory(part):
        return sum(instruction.bytes * times for instruction, times in part) * warps / MEMORY_BYTES

    matrix = ratio = None
    rate = RATES.get(kernel.arch.rstrip("af"))
    if rate and matrix_known:
        matrix = dense = 0.0
        for instruction, times in whole:
            half = 0.5 if ".TF32" in instruction.opcode else 1
            cycles = instruction.products * times * warps / (rate.products * half)
            dense += cycles / rate.dense
            matrix += cycles / (rate.synchronous if instruction.name == "HMMA" else 1)
        alone, overlapping, last = (max(issue(part), memory(part)) for part in (before, among, after))
        waiting = alone + max(overlapping, matrix) + last
        ratio = max(issue(whole), memory(whole), matrix) / dense, waiting / dense
    return Loop(counts, known, at[0], issue(whole), memory(whole), matrix, ratio)


def table(kernels, warps, matrix_trips):
    head = ["kernel", "sm", "regs", "spills", "smem", "loop", *COLUMNS, "first", "issue", "memory", "matrix", "ratio"]
    lines = []
    for kernel, name in zip(kernels, demangle([k.name for k in kernels]), strict=True):
        spills = sum(x.name in ("LDL", "STL") for x in kernel.instructions)
        line = [name, kernel.arch, kernel.registers, spills, kernel.shared]
        if loop := describe(kernel, warps, matrix_trips):
            line += [f"{loop.instructions}{'' if loop.known else '+'}", *(loop.counts[c] for c in COLUMNS)]
            line += [loop.first_matrix, f"{loop.issue:.0f}", f"{loop.memory:.0f}"]
            line += [f"{loop.matrix:.0f}", "{:.2f} - {:.2f}".format(*loop.ratio)] if loop.ratio else ["?", "?"]
        lines.append([*line, *[""] * (len(head) - len(line))])
    used = [i for i, h in enumerate(head) if h not in MATRIX or any(line[i] not in ("", 0) for line in lines)]
    rows = [[str(line[i]) for i in used] for line in (head, *lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(used))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def find_tools():
    """The PATH with the folders of cuobjdump and nvdisasm in front, or None if there are none."""
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)] + [Path("/usr/local/cuda/bin")]
    for site in map(Path, sys.path):
        folders += [*site.glob("nvidia/*/bin"), site / "triton/backends/nvidia/bin"]
    places = [next((f for f in folders if shutil.which(tool, path=f)), None) for tool in ("cuobjdump", "nvdisasm")]
    return None if None in places else os.pathsep.join([*map(str, places), os.environ["PATH"]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--match", default="fused", help="kernels whose mangled names contain this (%(default)s)")
    parser.add_argument("--warps", type=int, default=8, help="of a block (%(default)s)")
    parser.add_argument("--matrix-trips", type=int, help="how often loops of products within the main loop run")
    options = parser.parse_args()
    path = find_tools()
    if path is None:
        print("cuobjdump and nvdisasm are not here: python -m pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
        return 2

    def dump(what):
        command = [shutil.which("cuobjdump", path=path), what, options.library]
        return subprocess.run(
            command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
        ).stdout

    kernels = [kernel for kernel in parse_sass(dump("-sass")) if options.match in kernel.name]
    resources = parse_resources(dump("-res-usage"))
    for kernel in kernels:
        kernel.registers, kernel.shared = resources.get((kernel.arch, kernel.name), ("?", "?"))
    if not kernels:
        print(f"no kernel of {options.library} has {options.match!r} in its name")
        return 1
    print(table(sorted(kernels, key=lambda kernel: (kernel.arch, kernel.name)), options.warps, options.matrix_trips))
    return 0


if __name__ == "__main__":
    sys.exit(main())
