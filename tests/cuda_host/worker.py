"""Runs the shim's library in a process of its own, since AddressSanitizer must be loaded first and ends it on an error.

Reads pickled requests from its standard input and writes pickled answers: (True, result) or (False, message).
"""

import ctypes
import os
import pickle
import sys

import torch


def main() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not end up among the answers
    torch.set_num_threads(1)
    torch.ops.load_library(sys.argv[1])
    library = ctypes.CDLL(sys.argv[1])
    library.cuda_host_set_order.argtypes = [ctypes.c_uint64]
    library.cuda_host_set_shared_bytes.argtypes = [ctypes.c_int]
    library.cuda_host_set_tensors_on_host.argtypes = [ctypes.c_int]
    library.cuda_host_planted.restype = ctypes.c_char_p
    while True:
        try:
            name, order, fused, shared_kib, on_host, arguments = pickle.load(requests)
        except EOFError:
            return
        library.cuda_host_set_order(order)
        library.cuda_host_set_shared_bytes(shared_kib << 10)
        library.cuda_host_set_tensors_on_host(on_host)
        os.environ["DCN_PLUGIN_FUSED"] = str(int(fused))
        try:
            if name == "planted":
                answer = True, library.cuda_host_planted(arguments[0].encode()).decode()
            else:
                answer = True, getattr(torch.ops.dcn_plugin, name)(*arguments)
        except Exception as error:
            answer = False, str(error)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
