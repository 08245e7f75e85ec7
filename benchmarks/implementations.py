"""The list of implementations; a new one is one function and one row at the end."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import floor
import norms
import numpy as np
from problem import EPS, Calls, NormProblem, Problem, named
from variants import PLAIN, Given, bn_fast_new, bn_fast_out, through_numpy


class Implementation(NamedTuple):
    name: str
    prepare: Callable[[Problem], Calls]
    needs: str  # the module that must be installed
    is_peer: bool = True  # somebody else's work, which bn_fast is to beat

    @property
    def is_importable(self) -> bool:
        return find_spec(self.needs) is not None


def n_cpus() -> int:
    """The CPUs that this process may use: every implementation's default number of threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def through_memory(passes: int, chunk: int = floor.WHOLE) -> Callable[[Problem], Calls]:
    def prepare(p: Problem) -> Calls:
        out = np.zeros_like(p.x)
        given = (p.x, out), (p.x, p.dout, out)
        return Calls(*(floor.traffic(a, passes, chunk, n_cpus()) for a in given), results=dict)

    return prepare


def either(
    batch: Callable[[Problem], Calls], other: Callable[[Any], Calls]
) -> Callable[[Problem], Calls]:
    """Batch norm's way, or that of the other norms."""
    return lambda p: (other if isinstance(p, NormProblem) else batch)(p)


def as_plain(prepare: Callable[[Given], Calls]) -> Callable[[Problem], Calls]:
    return lambda p: prepare(Given(PLAIN, p))


def prepare_torch(p: Problem) -> Calls:
    """The operators behind torch.nn.BatchNorm, without autograd's bookkeeping."""
    import torch

    return _torch(p, torch.native_batch_norm, torch.ops.aten.native_batch_norm_backward)


def prepare_torch_compile(p: Problem) -> Calls:
    """The same operators, which the compiler takes apart and fuses for exactly this shape."""
    import torch

    torch.compiler.reset()  # else the ninth shape counts as one recompilation too many
    forward = torch.compile(lambda *a: torch.native_batch_norm(*a), dynamic=False)
    backward = torch.compile(
        lambda *a: torch.ops.aten.native_batch_norm_backward(*a), dynamic=False
    )
    return _torch(p, forward, backward)


def _torch(p: Problem, forward_op: Any, backward_op: Any) -> Calls:
    import torch

    # Features at axis 1 as PyTorch wants them: a view, which is its channels_last for axis 3.
    x, dout = (torch.from_numpy(np.moveaxis(a, p.axis, 1)) for a in (p.x, p.dout))
    gamma, beta = torch.from_numpy(p.gamma), torch.from_numpy(p.beta)

    def forward():
        return forward_op(x, gamma, beta, None, None, True, 0.1, EPS)

    _, mean, inv_std = forward()
    needs = [True, True, True]

    def backward():
        return backward_op(dout, x, gamma, None, None, mean, inv_std, True, EPS, needs)

    def results():
        (out, *_), (dx, *sums) = forward(), backward()
        large = (np.moveaxis(a.numpy(), 1, p.axis) for a in (out, dx))
        return named(*large, *(a.numpy() for a in sums))

    return Calls(forward, backward, results)


def prepare_jax(p: Problem) -> Calls:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    others = tuple(d for d in range(p.x.ndim) if d != p.axis)
    against_x = [-1 if d == p.axis else 1 for d in range(p.x.ndim)]
    n_values = p.x.size // len(p.gamma)

    @jax.jit
    def forward_op(x, gamma, beta):
        mean = x.mean(others, keepdims=True)
        inv_std = 1 / jnp.sqrt(x.var(others, keepdims=True) + EPS)
        out = (x - mean) * (inv_std * gamma.reshape(against_x)) + beta.reshape(against_x)
        return out, mean, inv_std

    @jax.jit
    def backward_op(dout, x, gamma, mean, inv_std):
        x_hat = (x - mean) * inv_std
        dbeta = dout.sum(others, keepdims=True)
        dgamma = (dout * x_hat).sum(others, keepdims=True)
        scale = gamma.reshape(against_x) * inv_std
        dx = scale * (dout - dbeta / n_values - x_hat * (dgamma / n_values))
        return dx, dgamma.reshape(-1), dbeta.reshape(-1)

    x, dout, gamma, beta = (jnp.asarray(a) for a in (p.x, p.dout, p.gamma, p.beta))
    _, mean, inv_std = forward_op(x, gamma, beta)

    def forward():
        return jax.block_until_ready(forward_op(x, gamma, beta))

    def backward():
        return jax.block_until_ready(backward_op(dout, x, gamma, mean, inv_std))

    def results():
        return named(*(np.asarray(a) for a in (forward()[0], *backward())))

    return Calls(forward, backward, results)


def prepare_numba(p: Problem) -> Calls:
    import numba_kernels as kernels
    from numba import get_num_threads

    if p.axis == p.x.ndim - 1:
        shape = (-1, len(p.gamma))
        forward_op, backward_op = kernels.forward_across, kernels.backward_across
        more = (get_num_threads(),)
    else:
        shape = (len(p.x), len(p.gamma), -1)
        forward_op, backward_op = kernels.forward_along, kernels.backward_along
        more = ()
    x, dout = p.x.reshape(shape), p.dout.reshape(shape)
    eps = p.x.dtype.type(EPS)  # a float64 would make all the arithmetic float64

    def forward():
        return forward_op(x, p.gamma, p.beta, eps, *more)

    _, mean, inv_std = forward()

    def backward():
        return backward_op(dout, x, p.gamma, mean, inv_std, *more)

    def results():
        (out, *_), (dx, *sums) = forward(), backward()
        return named(out.reshape(p.x.shape), dx.reshape(p.x.shape), *sums)

    return Calls(forward, backward, results)


IMPLEMENTATIONS = [
    Implementation("copy", through_memory(passes=1), "numpy", is_peer=False),
    Implementation(
        "floor",
        either(through_memory(passes=2), through_memory(2, floor.CHUNK)),
        "numpy",
        is_peer=False,
    ),
    Implementation(
        "reference", either(as_plain(through_numpy), norms.through_numpy), "numpy", is_peer=False
    ),
    Implementation(
        "bn_fast", either(as_plain(bn_fast_new), norms.bn_fast_new), "bn_fast", is_peer=False
    ),
    Implementation(
        "bn_fast out=", either(as_plain(bn_fast_out), norms.bn_fast_out), "bn_fast", is_peer=False
    ),
    Implementation("torch", either(prepare_torch, norms.prepare_torch), "torch"),
    Implementation(
        "torch.compile", either(prepare_torch_compile, norms.prepare_torch_compile), "torch"
    ),
    Implementation("jax", either(prepare_jax, norms.prepare_jax), "jax"),
    Implementation("numba", either(prepare_numba, norms.prepare_numba), "numba"),
]
