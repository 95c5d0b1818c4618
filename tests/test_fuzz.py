"""The fuzzer itself: it finds, shrinks and repeats."""

import pytest

from dcn_plugin import ops

from . import fuzz


@pytest.mark.parametrize("operator", fuzz.CHOICES)
def test_simplest_cases_are_equal(operator):
    simplest = {name: choices[0] for name, choices in fuzz.CHOICES[operator].items()}
    assert fuzz.problem(operator, simplest) is None


def test_a_run_without_findings(capsys):
    assert not fuzz.main(["--minutes", "0.02", "--seed", "1"])
    assert "0 failures" in capsys.readouterr().out


def test_a_finding_is_shrunk_to_what_makes_it_fail(monkeypatch, capsys):
    correct = ops.deform_conv2d

    def wrong(*args, stride, **tensors):
        output = correct(*args, stride=stride, **tensors)
        return output * 1.01 if stride[0] == 2 and tensors.get("mask") is not None else output

    monkeypatch.setattr(fuzz.ops, "deform_conv2d", wrong)
    assert fuzz.main(["--minutes", "0.1", "--seed", "1"])
    text = capsys.readouterr().out
    operator, case = fuzz.parsed(text.partition("--repeat ")[2].splitlines()[0].strip("\"'").replace('\\"', '"'))
    simplest = {name: choices[0] for name, choices in fuzz.CHOICES[operator].items()}
    assert {name for name in case if case[name] != simplest[name]} == {"seed", "mask", "stride_h"}
    assert fuzz.main(["--repeat", fuzz.spelled(operator, case)])
    monkeypatch.undo()
    assert not fuzz.main(["--repeat", fuzz.spelled(operator, case)])
