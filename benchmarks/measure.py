"""Makes the row of the record for one run: who takes part, what they take and need, and what is left to gain."""

import os

import torch

from . import memory, peers, remote
from .roofline import gathering, roofline
from .timing import DeviceClock, interleave, quartiles, ratios, wall_clock

# How far results may differ that are said to agree, as a share of the largest value.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
TF32_TOLERANCE = 1e-2


def reason(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def within(environment, call):
    """``call`` with variables of the environment set while it runs."""

    def run():
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            return call()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    return run if environment else call


def call_of(contender, direction):
    """What is timed: a function without arguments that returns its result, with the backward its gradients."""
    if direction == "forward":
        return within(contender.environment, torch.no_grad()(contender.run))
    if direction != "forward+backward":
        return contender.run
    with torch.no_grad():
        outputs = memory.tensors_of(within(contender.environment, contender.run)())
    generator = torch.Generator(outputs[0].device).manual_seed(0)  # the same ones for each, in its memory format
    gradients = [torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator, device=x.device)) for x in outputs]

    def run():
        return torch.autograd.grad(memory.tensors_of(contender.run()), contender.leaves, gradients)

    return within(contender.environment, run)


def disagreement(found, wanted, tolerance):
    """Why a result is not the wanted one, or None."""
    for one, other in zip(memory.tensors_of(found), memory.tensors_of(wanted), strict=True):
        if one.shape != other.shape:
            return f"its result is {tuple(one.shape)}, not {tuple(other.shape)}"
        error = (one.double() - other.double()).abs().max() / other.double().abs().max()
        if not error < tolerance:
            return f"its result differs by {error:.1e} of the largest value"
    return None


def make_call(case, contender, direction, threads):
    """As :func:`call_of`; a peer that lives elsewhere is called there."""
    process = peers.elsewhere.get(contender.name)
    if process is None:
        return call_of(contender, direction)
    run = dict(operator=case.operator, case=case.name, direction=direction, threads=threads, contender=contender.name)
    return remote.Call(process, **run)


def runnable(case, direction, device, threads):
    """(contenders, their calls, why peers do not take part, why others failed), by name; each call has run once.

    A peer that cannot run a case, or computes something else, is left out. What is no peer must run; where it does not,
    it has failed, and the others are measured all the same.
    """
    contenders = {c.name: c for c in case.contenders(device, threads)}
    references = {c.agrees_with for c in contenders.values()}
    calls, skipped, failed, results = {}, {}, {}, {}
    for name, contender in contenders.items():
        if direction == "forward+backward" and not contender.leaves:
            if contender.floor:
                skipped[name] = "inference only"
            continue
        try:
            call = make_call(case, contender, direction, threads)
            result = call()  # warms up too: packed weights, compiled kernels, chosen algorithms
        except Exception as error:
            (skipped if contender.optional else failed)[name] = reason(error)
            continue
        calls[name] = call
        if contender.agrees_with or name in references:
            results[name] = result
    tolerance = TF32_TOLERANCE if case.tf32 else TOLERANCE[case.dtype]
    for name in list(calls):
        reference = contenders[name].agrees_with
        if not reference:
            continue
        wrong = "there is nothing to compare it with"
        if reference in results:
            wrong = disagreement(results[name], results[reference], tolerance)
        if wrong:
            del calls[name]
            (skipped if contenders[name].optional else failed)[name] = wrong
    return contenders, calls, skipped, failed


def cpu_peaks(case, direction, threads, names):
    """{contender: bytes} of those that can be measured; each peer that lives elsewhere in a process of its own kind."""
    names = [name for name in names if name in memory.MEASURED]
    groups = {"": [name for name in names if name not in peers.elsewhere]}
    groups |= {name: [name] for name in names if name in peers.elsewhere}
    found = {}
    for peer, group in groups.items():
        environment = peers.elsewhere[peer].environment if peer else {}
        with remote.Process(**environment, **memory.MALLOC) as process:
            run = dict(operator=case.operator, case=case.name, direction=direction, threads=threads, names=group)
            found |= process.ask("peaks", **run)
    return found


def roofline_of(case, contender, direction, device, threads):
    """Of the operator itself, whoever computes it."""
    with torch.no_grad():
        outputs = memory.bytes_of(contender.run())
    inputs = memory.bytes_of(contender.leaves)
    backward = direction == "forward+backward"
    least = roofline(device, case.dtype, threads, case.tf32, inputs, outputs, contender.operations, backward)
    if contender.gathered and device == "cpu":
        least |= gathering(threads, contender.gathered, backward)
        least["seconds"] = max(least["seconds"], least["gathering_seconds"])
    return least


def timed(case, direction, device, threads, budget):
    """What :func:`measure` adds to the row."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.tf32
    contenders, calls, skipped, failed = runnable(case, direction, device, threads)
    clock = DeviceClock() if device == "cuda" and not case.host_time_counts else wall_clock
    floors = {contenders[name].floor for name in calls}
    samples = interleave(calls, floors, budget, clock)
    found = {}
    for name, values in samples.items():
        taken = [value for value in values if value is not None]
        found[name] = dict(seconds=quartiles(taken), rounds=len(taken))
        floor = contenders[name].floor
        if floor in samples and floor != name:
            found[name] |= dict(floor=floor, ratio=ratios(values, samples[floor]))
        if name != "dcn_plugin" and "dcn_plugin" in samples:
            found[name]["to_ours"] = ratios(values, samples["dcn_plugin"])
    if device == "cuda":
        peaks = {name: memory.cuda_peak(call) for name, call in calls.items()}
    else:
        peaks = cpu_peaks(case, direction, threads, calls) if case.memory else {}
    for name, peak in peaks.items():
        found[name]["peak_mib"] = peak / 2**20
    row = dict(contenders=found, skipped=skipped, failed=failed)
    ours = contenders.get("dcn_plugin")
    if "dcn_plugin" in calls and ours.operations:
        row["roofline"] = roofline_of(case, ours, direction, device, threads)
    return row


def measure(case, direction, device, threads, budget):
    """The row of the JSON: quartiles of each contender's seconds and ratios to its floor and to ours, its peak MiB.

    Whatever is raised is in the row, as why a contender, or the whole run, failed.
    """
    threads = case.threads or threads
    row = case.describe() | dict(direction=direction, threads=threads, contenders={}, skipped={}, failed={})
    try:
        return row | timed(case, direction, device, threads, budget)
    except Exception as error:
        return row | dict(failed={"the run": reason(error)})
