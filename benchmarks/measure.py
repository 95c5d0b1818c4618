"""Times contenders that take turns in one process, so that whatever else the machine does falls on each alike."""

import math
import random
import statistics
import time

import torch

from . import memory

LEAST_ROUNDS, MOST_ROUNDS = 5, 200
SHORTEST = 1e-3  # seconds of one sample; quicker calls are repeated within it, to be long beside the clock's own cost
PAUSE = 2e-3  # seconds of quiet before a sample: another contender's worker threads wait spinning for about so long
# How far results may differ that are said to agree, as a share of the largest value.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def wall_clock(call, repeat):
    """Seconds of a call, the mean of ``repeat``; on CUDA, until the device has finished."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    finish()
    time.sleep(PAUSE)
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    finish()
    return (time.perf_counter() - start) / repeat


class DeviceClock:
    """Seconds of one call on the GPU by device events, with cold caches, as between the layers of a network."""

    def __init__(self):
        self.flushed = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, call, repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(2_000_000)  # a millisecond for the host to queue the call: its own time is not measured
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def interleave(calls, floors, budget, clock):
    """Seconds of each call by rounds: {name: [seconds or None, ...]}. The calls have run once before.

    In every round the calls run in random order. A call sits out, None, once it has had ``budget`` seconds and
    LEAST_ROUNDS, so that slow ones do not hold up the others; those that others are compared with, ``floors``,
    run in every round.
    """
    order = random.Random(0)
    repeat = {name: max(1, math.ceil(SHORTEST / clock(call, 1))) for name, call in calls.items()}
    samples, spent = {name: [] for name in calls}, dict.fromkeys(calls, 0.0)
    for done in range(MOST_ROUNDS):
        wanting = [name for name in calls if done < LEAST_ROUNDS or spent[name] < budget]
        if not wanting:
            break
        turn = [name for name in calls if name in wanting or name in floors]
        order.shuffle(turn)
        taken = {name: clock(calls[name], repeat[name]) for name in turn}
        for name in calls:
            samples[name].append(taken.get(name))
            spent[name] += taken.get(name, 0) * repeat[name]
    return samples


def quartiles(values):
    """[first quartile, median, third quartile]"""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def ratios(samples, floor_samples):
    """Quartiles of the ratio to another contender in the same round."""
    pairs = zip(samples, floor_samples, strict=True)
    return quartiles([sample / floor for sample, floor in pairs if sample is not None and floor is not None])


def call_of(contender, direction):
    """What is timed: a function without arguments that returns its result, with the backward its gradients."""
    if direction == "forward":
        return torch.no_grad()(contender.run)
    if direction != "forward+backward":
        return contender.run
    with torch.no_grad():
        outputs = memory.tensors_of(contender.run())
    generator = torch.Generator().manual_seed(0)  # the same ones for each contender, in its memory format
    gradients = [torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator)) for x in outputs]
    return lambda: torch.autograd.grad(memory.tensors_of(contender.run()), contender.leaves, gradients)


def disagreement(found, wanted, tolerance):
    """Why a result is not the wanted one, or None."""
    for one, other in zip(memory.tensors_of(found), memory.tensors_of(wanted), strict=True):
        if one.shape != other.shape:
            return f"its result is {tuple(one.shape)}, not {tuple(other.shape)}"
        error = (one.double() - other.double()).abs().max() / other.double().abs().max()
        if not error < tolerance:
            return f"its result differs by {error:.1e} of the largest value"
    return None


def runnable(case, direction, device, threads):
    """(contenders, their calls, why the others do not take part), by name; each call has run once.

    A peer that cannot run a case, or computes something else, is left out; ours and the dense convolution must run.
    """
    contenders = {c.name: c for c in case.contenders(device, threads)}
    references = {c.agrees_with for c in contenders.values()}
    calls, skipped, results = {}, {}, {}
    for name, contender in contenders.items():
        if direction == "forward+backward" and not contender.leaves:
            if contender.floor:
                skipped[name] = "inference only"
            continue
        try:
            call = call_of(contender, direction)
            result = call()  # warms up too: packed weights, compiled kernels, chosen algorithms
        except Exception as error:
            if not contender.optional:
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            continue
        calls[name] = call
        if contender.agrees_with or name in references:
            results[name] = result
    for name in list(calls):
        reference = contenders[name].agrees_with
        reason = reference and disagreement(results[name], results[reference], TOLERANCE[case.dtype])
        if reason:
            del calls[name]
            skipped[name] = reason
    return contenders, calls, skipped


def measure(case, direction, device, threads, budget):
    """The row of the JSON: quartiles of each contender's seconds and ratios to its floor and to ours, its peak MiB."""
    threads = case.threads or threads
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    contenders, calls, skipped = runnable(case, direction, device, threads)
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
        peaks = memory.measure(case, direction, threads, calls) if case.memory else {}
    for name, peak in peaks.items():
        found[name]["peak_mib"] = peak / 2**20
    return case.describe() | dict(direction=direction, threads=threads, contenders=found, skipped=skipped)
