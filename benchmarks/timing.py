"""Clocks, and contenders that take turns in one process, so that whatever else the machine does falls on each alike."""

import math
import random
import statistics
import time

import torch

LEAST_ROUNDS, MOST_ROUNDS = 5, 200
SHORTEST = 1e-3  # seconds of one sample; quicker calls are repeated within it, to be long beside the clock's own cost
PAUSE = 2e-3  # seconds of quiet before a sample: another contender's worker threads wait spinning for about so long


def wall_clock(call, repeat):
    """Seconds of a call, the mean of ``repeat``; on CUDA, until the device has finished.

    A call of another process (`remote.py`) is timed there, by this function.
    """
    if hasattr(call, "seconds"):
        return call.seconds(repeat)
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
