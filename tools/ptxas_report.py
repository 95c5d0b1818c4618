"""Registers, shared memory and spills of every CUDA kernel, from the logs that setup.py leaves (nvcc -Xptxas -v).

python tools/ptxas_report.py FOLDER [--no-spills]      FOLDER is searched for *.log; --no-spills makes a spill an error
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def demangle(names: list[str]) -> list[str]:
    if not names or shutil.which("c++filt") is None:
        return names
    text = subprocess.check_output(["c++filt"], input="\n".join(names), text=True)
    return [re.sub(r"\(.*|void |dcn::cuda::|\(anonymous namespace\)::|__nv_", "", line) for line in text.splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-spills", action="store_true")
    options = parser.parse_args()
    found = [m.groupdict() for log in sorted(options.folder.rglob("*.log")) for m in KERNEL.finditer(log.read_text())]
    if not found:
        print(f"no kernels in the logs under {options.folder}")
        return int(options.no_spills)
    kernels: dict[str, dict[str, str]] = {}
    spilling = []
    for kernel, name in zip(found, demangle([k["name"] for k in found]), strict=True):
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        spills = int(kernel["stores"]) + int(kernel["loads"])
        kernels.setdefault(name, {"smem": shared[1] if shared else "0"})[kernel["arch"]] = kernel["registers"] + (
            f" (spills {spills} B)" if spills else ""
        )
        if spills:
            spilling.append(f"{name} on sm_{kernel['arch']}")
    archs = sorted({k["arch"] for k in found}, key=lambda a: int(re.match(r"\d+", a)[0]))
    print(f"{'kernel':<60} {'smem':>7}" + "".join(f"{'regs sm_' + a:>14}" for a in archs))
    for name, row in sorted(kernels.items()):
        print(f"{name:<60} {row['smem']:>7}" + "".join(f"{row.get(a, ''):>14}" for a in archs))
    summary = f"{len(spilling)} spill registers: {'; '.join(spilling)}" if spilling else "none spills registers"
    print(f"{len(kernels)} kernels, {summary}")
    return int(options.no_spills and bool(spilling))


if __name__ == "__main__":
    sys.exit(main())
