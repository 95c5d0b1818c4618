import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

import dcn_plugin.mmengine  # noqa: F401


def check_that_histories_load(path):
    history = HistoryBuffer()
    for value in (1.0, 2.0, 6.0):
        history.update(np.float64(value))
    torch.save(dict(state_dict={}, message_hub=dict(log_scalars={"train/loss": history})), path)
    loaded = torch.load(path, weights_only=True)["message_hub"]["log_scalars"]["train/loss"]
    assert loaded.mean() == 3.0
    assert loaded.current() == 6.0


def test_mmengine_histories_load(tmp_path):
    check_that_histories_load(tmp_path / "a.pth")


def test_they_load_after_others_allowed_the_same_for_a_while(tmp_path):
    with torch.serialization.safe_globals([HistoryBuffer, np.ndarray, np.dtype, type(np.dtype("f8"))]):
        pass
    check_that_histories_load(tmp_path / "a.pth")


class _Fetches:
    def __init__(self, *what):
        self.what = what

    def __reduce__(self):
        return getattr, self.what


@pytest.mark.parametrize("what", [(HistoryBuffer, "__init__"), (np.ndarray, "tofile")])
def test_nothing_else_can_be_fetched(what, tmp_path):
    torch.save(_Fetches(*what), tmp_path / "a.pth")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        torch.load(tmp_path / "a.pth", weights_only=True)
