"""Derivatives of every order, in reverse and in forward mode, and vmap, for an operator and its backward.

First derivatives run the kernels. Second ones, and all in forward mode, run what :mod:`._compositions` composes of
PyTorch's own operations: as exact, and slower.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from ._library import NAMESPACE, implement, raises_out_of_memory


def register_derivatives(
    operator: str,
    setup_context: Callable,
    backward: Callable,
    composition: Callable[..., Tensor],
    gradients: Callable[..., tuple[Tensor, ...]],
) -> None:
    """Makes ``operator`` and ``operator_backward`` differentiable, by autograd and by the transforms of torch.func.

    (``torch.library.register_autograd`` makes functions that torch.func refuses, and that drop forward mode's tangents
    without a word.)

    Args:
        setup_context, backward: as of a ``torch.autograd.Function``; they are the operator's first derivatives.
        composition: computes what the operator computes, of the same arguments.
        gradients: computes what the operator's backward computes, of the same arguments, differentiably
            (:func:`gradients_of`).
    """
    _register(operator, setup_context, backward, forward_mode=composition)

    def setup_second(ctx, inputs, output):
        tensors = [value if isinstance(value, Tensor) else None for value in inputs]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.set_materialize_grads(False)

    def inputs_of(ctx):
        return [rest if tensor is None else tensor for tensor, rest in zip(ctx.saved_tensors, ctx.rest, strict=True)]

    def second(ctx, *cotangents):
        inputs = inputs_of(ctx)
        needed = [index for index, needed in enumerate(ctx.needs_input_grad) if needed]
        outputs, pull_back = _vjp(gradients, inputs, needed)
        cotangents = (torch.zeros_like(o) if c is None else c for o, c in zip(outputs, cotangents, strict=True))
        results = dict(zip(needed, pull_back(tuple(cotangents)), strict=True))
        return tuple(results.get(index) for index in range(len(inputs)))

    def tangents(ctx, tangent, *others):
        if any(other is not None for other in others):
            raise NotImplementedError(
                f"forward mode reached the backward pass of {operator}, whose forward pass ran outside of it: run both "
                "inside (torch.func.jvp of a function that calls torch.func.grad, say)"
            )
        return getattr(torch.ops.dcn_plugin, f"{operator}_backward")(tangent, *inputs_of(ctx)[1:])

    _register(f"{operator}_backward", setup_second, second, jvp=tangents)


def gradients_of(
    function: Callable[..., Tensor],
    grad_output: Tensor,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of ``function(*tensors)`` for those that are needed and not None, differentiable; empty others."""
    chosen = [index for index, tensor in enumerate(tensors) if needed[index] and tensor is not None]
    _, pull_back = _vjp(function, tensors, chosen)
    gradients = dict(zip(chosen, pull_back(grad_output), strict=True))
    return tuple(gradients[i] if i in gradients else grad_output.new_empty(0) for i in range(len(tensors)))


def _vjp(function: Callable, arguments: Sequence[Any], chosen: Sequence[int]):
    """``torch.func.vjp`` of a function of some of its arguments."""

    def of_chosen(*values):
        given = list(arguments)
        for index, value in zip(chosen, values, strict=True):
            given[index] = value
        return function(*given)

    return torch.func.vjp(of_chosen, *(arguments[index] for index in chosen))


def _in_forward_mode() -> bool:
    """Whether the call is inside a level of forward mode, ``forward_ad.dual_level``'s or ``torch.func.jvp``'s.

    What has a tangent would be too narrow a question: in ``torch.func.jvp`` of ``torch.func.grad`` the arguments get
    theirs at the outer level, after grad's own has saved them for a backward pass that then meets tangents in all of
    them. PyTorch has no public function for it; its compiler's guards read this same variable.
    """
    return forward_ad._current_level >= 0


def _register(operator: str, setup_context, backward, *, forward_mode=None, jvp=None) -> None:
    """An autograd kernel, which like those of PyTorch's own operators serves one level of torch.func at a time.

    In forward mode it computes ``forward_mode`` in the operator's place, if given, or else takes the tangents of
    ``jvp``.
    """
    overload = getattr(getattr(torch.ops, NAMESPACE), operator).default
    defaults = [argument.default_value for argument in overload._schema.arguments]

    def forward(*args):
        # Gradients stay enabled for the other levels of torch.func, which the call goes on to.
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    methods = dict(forward=forward, setup_context=setup_context, backward=backward)
    methods |= {"jvp": jvp} if jvp else {}
    function = type(operator, (_SingleLevelFunction,), {name: staticmethod(f) for name, f in methods.items()})

    def kernel(*args):
        args = (*args, *defaults[len(args) :])  # the dispatcher leaves out what equals its default
        if _in_forward_mode() and forward_mode:
            with torch.no_grad():
                forward(*args)  # for its errors
            return forward_mode(*args)
        if (
            _in_forward_mode()
            or torch.is_grad_enabled()
            and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        ):
            with enable_single_level_autograd_function():
                return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    implement(operator, raises_out_of_memory(kernel), "Autograd")
