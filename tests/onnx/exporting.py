"""One exported model for many calls of an operator: exporting is what takes time, not running."""

import warnings

import torch
from torch import nn

import dcn_plugin.onnx


class Calls(nn.Module):
    """Calls ``function`` once for each case, a pair of tensors by name (or None) and options."""

    def __init__(self, function, cases):
        super().__init__()
        self.function, self.cases = function, cases

    def inputs(self):
        return tuple(t for tensors, _ in self.cases for t in tensors.values() if t is not None)

    def forward(self, *inputs):
        inputs = iter(inputs)
        outputs = []
        for tensors, options in self.cases:
            given = {name: None if t is None else next(inputs) for name, t in tensors.items()}
            outputs.append(self.function(**given, **options))
        return outputs


def export(model, inputs, path, **options):
    options = dict(dynamo=True, custom_translation_table=dcn_plugin.onnx.translations(), verbose=False) | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own about itself
        torch.onnx.export(model.eval(), inputs, str(path), **options)
    return str(path)


def feed(names, inputs):
    return {name: t.numpy() for name, t in zip(names, inputs, strict=True)}


def onnxruntime(path, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(o) for o in session.run(None, feed([i.name for i in session.get_inputs()], inputs))]


def reference_evaluator(path, inputs):
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(path)
    return [torch.from_numpy(o) for o in evaluator.run(None, feed(evaluator.input_names, inputs))]


RUNTIMES = dict(onnxruntime=onnxruntime, reference_evaluator=reference_evaluator)
