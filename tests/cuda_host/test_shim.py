"""The shim itself: it computes what the kernels say, and it catches planted mistakes."""

import pytest

ORDERS = [0, 1, 7]  # ascending, descending, a random one


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["barrier", "in bounds", "warp barrier", "atomic", "sums"])
def test_right_kernels(cuda_host, name, order):
    assert cuda_host("planted", name, order=order) == ""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["missing barrier", "missing warp barrier"])
def test_missing_barrier(cuda_host, name, order):
    # Fibers change only where they wait, so a missing wait also gives a wrong result.
    expected = {"race": "race: thread", "address": "wrong result"}[cuda_host.checker]
    assert expected in cuda_host("planted", name, order=order)


def test_missing_atomic(cuda_host):
    if cuda_host.checker != "race":
        pytest.skip("seen by the race checker only")
    assert "race: thread" in cuda_host("planted", "missing atomic")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["diverged barrier", "diverged barrier in two places", "diverged warp"])
def test_diverged(cuda_host, name, order):
    assert "diverged" in cuda_host("planted", name, order=order)


def test_unwritten_shared_memory_is_nan(cuda_host):
    assert cuda_host("planted", "unwritten shared memory") == "wrong result"


@pytest.mark.parametrize("name", ["out of bounds", "out of shared bounds", "out of dynamic shared bounds"])
def test_out_of_bounds(cuda_host, name):
    if cuda_host.checker != "address":
        pytest.skip("seen by the address checker only")
    with pytest.raises(RuntimeError, match="heap-buffer-overflow|out of bounds"):
        cuda_host("planted", name)
    assert cuda_host("planted", "barrier") == ""  # a new process
