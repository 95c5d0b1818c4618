"""Makes tables (.md) and plots (.svg) from the JSON of `python -m benchmarks`, and from nothing else.

python -m benchmarks.report [JSON ...]      all in benchmarks/results, if none is named
"""

import argparse
import json
from pathlib import Path

from .goals import GOALS, judge
from .records import milliseconds, ordered, select, title

RESULTS = Path(__file__).parent / "results"
READING = """Ratios are medians (quartiles) of the ratio to the floor in the same round: the dense convolution of the
same shape, dtype and memory format (openvino and onnxruntime: their own), a peer's RoI align, the plain detector.
Smaller is better. The roofline is the least time by what this processor reaches in a copy and in a product.
[README.md](../README.md) explains the cases."""


def markdown(head, rows):
    """A table, or nothing where there are no rows; the first column is left-aligned, the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) if rows else ""


def ratio_cell(contender):
    if "ratio" not in contender:
        return ""
    low, middle, high = contender["ratio"]
    digits = 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def goal_table(results):
    lines = []
    for goal in GOALS[results["device"]]:
        found, verdict = judge(goal, results)
        figures = ", ".join(f"{case} {value:.3g}" for case, value in found.items())
        wanted = f"{goal.goal:.3g}" if goal.goal else ""
        lines.append([goal.what, wanted, f"{goal.at_most:.3g}", figures, verdict])
    return markdown(["", "goal", "at most", "measured", "the worst of them"], lines)


def roofline_cell(row):
    """Milliseconds, and what sets them."""
    if "roofline" not in row:
        return ""
    found = row["roofline"]
    by = {found["bytes"] / found["copy_bytes_per_second"]: "bytes", found.get("gathering_seconds"): "gathering"}
    return f"{1e3 * found['seconds']:.3g} ({by.get(found['seconds'], 'operations')})"


def ratio_table(rows):
    """A line for each case: the floor and ours in milliseconds, the roofline, and everyone's ratio to the floor."""
    with_roofline = any("roofline" in row for row in rows)
    names = ordered({name for row in rows for name, found in row["contenders"].items() if "ratio" in found})
    floor = next((found["floor"] for row in rows for found in row["contenders"].values() if "floor" in found), "floor")
    lines = []
    for row in rows:
        contenders = row["contenders"]
        times = [milliseconds(contenders.get(name)) for name in (floor, "dcn_plugin")]
        least = [roofline_cell(row)] if with_roofline else []
        lines.append([row["case"], *times, *least, *(ratio_cell(contenders.get(name, {})) for name in names)])
    head = ["case", f"{floor}, ms", "dcn_plugin, ms", *(["roofline, ms"] if with_roofline else []), *names]
    return markdown(head, lines)


def thread_table(results):
    """Cases that were timed with several numbers of threads: milliseconds of ours, and of the dense one, by threads."""
    found = {}
    for row in results["times"]:
        key = row["case"].split(" threads=")[0], row["direction"]
        if {"dense", "dcn_plugin"} <= set(row["contenders"]):
            found.setdefault(key, {})[row["threads"]] = row["contenders"]
    found = {key: times for key, times in found.items() if len(times) > 1}
    counts = sorted({count for times in found.values() for count in times})
    lines = []
    for (case, direction), times in found.items():
        for name in ("dense", "dcn_plugin"):
            cells = [milliseconds(times.get(count, {}).get(name)) for count in counts]
            few, many = (times[pick(times)][name]["seconds"][1] for pick in (min, max))
            lines.append([f"{case}, {direction}", name, *cells, f"{few / many:.2f}"])
    return markdown(["case", "", *(f"{count} threads, ms" for count in counts), "times as fast"], lines)


def detector_table(results):
    lines = []
    for row in results["times"]:
        for name, found in row["contenders"].items() if row["operator"] == "detector" else ():
            seconds = found["seconds"][1]
            cells = f"{seconds:.3f}", f"{seconds / row['images']:.3f}", ratio_cell(found)
            lines.append([f"{row['case']}, {row['direction']}", name, *cells])
    return markdown(["detector", "operators of", "seconds", "an image", "to the floor"], lines)


def memory_table(results):
    rows = [row for row in results["times"] if any("peak_mib" in c for c in row["contenders"].values())]
    names = ordered({name for row in rows for name, found in row["contenders"].items() if "peak_mib" in found})
    lines = []
    for row in rows:
        peaks = [row["contenders"].get(name, {}).get("peak_mib") for name in names]
        cells = ["" if peak is None else f"{peak:.1f}" for peak in peaks]
        lines.append([f"{row['operator']} {row['case']}, {row['direction']}", *cells])
    return markdown(["case", *names], lines)


def left_out(results):
    """A line for each peer that did not take part, everywhere or in some runs, and why."""
    lines = [f"- {name}: {reason}" for name, reason in results["machine"]["absent"].items()]
    runs = {}
    for row in results["times"]:
        for name, reason in row["skipped"].items():
            runs.setdefault((name, reason), []).append(title(row["operator"], row["case"], row["direction"]))
    for (name, reason), titles in runs.items():
        lines.append(f"- {name}: {reason} ({', '.join(titles) if len(titles) < 4 else f'{len(titles)} runs'})")
    return "\n".join(lines)


def failures(results):
    """A line for each contender that should have run and did not, and what was not run at all."""
    lines = [
        f"- {title(row['operator'], row['case'], row['direction'])}: {name}: {reason}"
        for row in results["times"]
        for name, reason in row.get("failed", {}).items()
    ]
    not_run = results.get("not_run", [])
    return "\n".join([*lines, *([f"- not run: {', '.join(not_run)}"] if not_run else [])])


def machine_line(results):
    machine = results["machine"]
    peers = ", ".join(f"{name} {version}" for name, version in machine["peers"].items()) or "none"
    threads = f"{machine['threads']} threads on {machine['cores']} cores"
    where = f"{machine['processor']}, {machine['instruction_set']}, {threads}"
    if "gpu" in machine:
        where = f"{machine['gpu']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}, TF32 {machine['tf32']}"
    return (
        f"{where}; Python {machine['python']}, torch {machine['torch']} ({machine['blas']}); peers: {peers}; "
        f"commit {machine['commit']}; load before the run {machine['load_before']}; {results['began'][:10]}; "
        f"{results['seconds'] / 60:.0f} minutes."
    )


def page(results):
    """The whole Markdown page."""
    sections = {"Goals": goal_table(results)}
    for operator in ("deform_conv2d", "deform_roi_align", "deform_ps_roi_pool", "ms_deform_attn"):
        for direction in ("forward", "forward+backward"):
            sections[f"{operator}, {direction}"] = ratio_table(select(results, operator, direction))
    sections |= {
        "Detector": detector_table(results),
        "Peak memory above inputs and outputs, MiB": memory_table(results),
        "Threads": thread_table(results),
        "Left out": left_out(results),
        "Failed": failures(results),
    }
    parts = [f"# Benchmark: {results['name']}", f"`{results['command']}`: {machine_line(results)}", READING]
    parts += [f"## {heading}\n\n{body}" for heading, body in sections.items() if body]
    return "\n\n".join(parts) + "\n"


def write(path):
    """Writes what is made from one JSON file beside it; returns the paths."""
    results = json.loads(path.read_text())
    path.with_suffix(".md").write_text(page(results))
    try:
        from . import plots
    except ImportError as error:
        print(f"no plots: {error}")
        return [path.with_suffix(".md")]
    return [path.with_suffix(".md"), *plots.write(results, path)]


def main():
    parser = argparse.ArgumentParser(
        "python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", nargs="*", type=Path)
    for path in parser.parse_args().json or sorted(RESULTS.glob("*.json")):
        for written in write(path):
            print(f"wrote {written}")


if __name__ == "__main__":
    main()
