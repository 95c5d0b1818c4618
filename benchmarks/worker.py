"""The other end of `remote.py`: runs, times or measures one contender at a time, as it is told on standard input."""

import json
import os
import sys

import torch

from . import memory, peers
from .cases import cases
from .measure import call_of
from .timing import wall_clock

current = None  # the call that `run` has made


def contenders(case, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return {c.name: c for c in case.contenders("cpu", threads)}


def find(operator, name, threads):
    return next(case for case in cases("cpu", threads) if (case.operator, case.name) == (operator, name))


def version(peer):
    module, found = peers.load(peer)
    if module is None:
        raise ImportError(found)
    return found


def run(operator, case, direction, threads, contender, result):
    """Saves the contender's result to the file ``result``."""
    global current
    current = call_of(contenders(find(operator, case, threads), threads)[contender], direction)
    torch.save([tensor.detach() for tensor in memory.tensors_of(current())], result)


def seconds(repeat):
    return wall_clock(current, repeat)


def peaks(operator, case, direction, threads, names):
    """{contender: bytes} at the peak of one call."""
    case = find(operator, case, threads)
    # First what happens once a process: threads, libraries, code.
    warm_up, measured = contenders(case.small(), threads), contenders(case, threads)
    found = {}
    for name in names:
        call_of(warm_up[name], direction)()
        found[name] = memory.cpu_peak(call_of(measured[name], direction))
    return found


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not come among the answers
    peers.use_only(os.environ.get("DCN_BENCHMARK_PEERS"))
    requests = dict(version=version, run=run, seconds=seconds, peaks=peaks)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            answer = dict(value=requests[what](**arguments))
        except Exception as error:
            answer = dict(error=f"{type(error).__name__}: {error}")
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
