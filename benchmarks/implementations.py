"""The list of implementations; a new one is one function and one row at the end."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import floor
import numpy as np
from problem import EPS, Problem

import bn_fast
from bn_fast import reference

Results = tuple[np.ndarray, ...]


class Calls(NamedTuple):
    """What is timed. Conversions and compilation are done before."""

    forward: Callable[[], Any]
    backward: Callable[[], Any]
    # Runs both and returns (out, dx, dgamma, dbeta) as NumPy arrays; None: nothing to judge.
    results: Callable[[], Results] | None


class Implementation(NamedTuple):
    name: str
    prepare: Callable[[Problem], Calls]
    needs: str  # the module that must be installed
    tolerance: dict[str, tuple[float, float]]  # of its errors, for each dtype
    is_peer: bool = True  # somebody else's work, which bn_fast is to beat

    @property
    def is_importable(self) -> bool:
        return find_spec(self.needs) is not None


def n_cpus() -> int:
    """The CPUs that this process may use: every implementation's default number of threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_floor(p: Problem) -> Calls:
    out = np.zeros_like(p.x)
    n_threads = n_cpus()
    copy, add = floor.copy(p.x, out, n_threads), floor.add(p.x, p.dout, out, n_threads)
    return Calls(copy, add, None)


def prepare_reference(p: Problem) -> Calls:
    return _fresh(reference, p)


def prepare_bn_fast(p: Problem) -> Calls:
    return _fresh(bn_fast, p)


def _fresh(module: Any, p: Problem) -> Calls:
    """Forward and backward of bn_fast or its reference, with new arrays at each call."""
    _, cache = module.batchnorm_forward(p.x, p.gamma, p.beta, axis=p.axis)

    def forward():
        return module.batchnorm_forward(p.x, p.gamma, p.beta, axis=p.axis)

    def backward():
        return module.batchnorm_backward(p.dout, cache)

    return Calls(forward, backward, lambda: (forward()[0], *backward()))


def prepare_bn_fast_out(p: Problem) -> Calls:
    """The caller's buffers, as a training loop keeps them."""
    out, dx = np.zeros_like(p.x), np.zeros_like(p.x)
    _, cache = bn_fast.batchnorm_forward(p.x, p.gamma, p.beta, axis=p.axis, out=out)

    def forward():
        return bn_fast.batchnorm_forward(p.x, p.gamma, p.beta, axis=p.axis, out=out)

    def backward():
        return bn_fast.batchnorm_backward(p.dout, cache, out=dx)

    return Calls(forward, backward, lambda: (forward()[0], *backward()))


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
        return *large, *(a.numpy() for a in sums)

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
        return tuple(np.asarray(a) for a in (forward()[0], *backward()))

    return Calls(forward, backward, results)


def prepare_numba(p: Problem) -> Calls:
    import numba_kernels as kernels

    if p.axis == p.x.ndim - 1:
        shape = (-1, len(p.gamma))
        forward_op, backward_op = kernels.forward_across, kernels.backward_across
    else:
        shape = (len(p.x), len(p.gamma), -1)
        forward_op, backward_op = kernels.forward_along, kernels.backward_along
    x, dout = p.x.reshape(shape), p.dout.reshape(shape)
    eps = p.x.dtype.type(EPS)  # a float64 would make all the arithmetic float64

    def forward():
        return forward_op(x, p.gamma, p.beta, eps)

    _, mean, inv_std = forward()

    def backward():
        return backward_op(dout, x, p.gamma, mean, inv_std)

    def results():
        (out, *_), (dx, *sums) = forward(), backward()
        return out.reshape(p.x.shape), dx.reshape(p.x.shape), *sums

    return Calls(forward, backward, results)


# What is allowed of out and dx, and of the sums dgamma and dbeta, which cancel. The others must
# only have computed the same thing: in float32 their sums over the first axis lose digits, up to
# 1e-2 of the largest value for a million rows.
EXACT = {"float32": (4e-6, 1.6e-5), "float64": (1e-14, 1e-12)}
ROUGH = {"float32": (1e-2, 1e-2), "float64": (1e-9, 1e-9)}

IMPLEMENTATIONS = [
    Implementation("floor", prepare_floor, "numpy", {}, is_peer=False),
    Implementation("reference", prepare_reference, "numpy", ROUGH, is_peer=False),
    Implementation("bn_fast", prepare_bn_fast, "bn_fast", EXACT, is_peer=False),
    Implementation("bn_fast out=", prepare_bn_fast_out, "bn_fast", EXACT, is_peer=False),
    Implementation("torch", prepare_torch, "torch", ROUGH),
    Implementation("torch.compile", prepare_torch_compile, "torch", ROUGH),
    Implementation("jax", prepare_jax, "jax", ROUGH),
    Implementation("numba", prepare_numba, "numba", ROUGH),
]


def judge(implementation: Implementation, calls: Calls, p: Problem) -> dict[str, float]:
    """The largest errors; an AssertionError if one is too large, or NaN."""
    if calls.results is None:
        return {}
    errors = p.errors(calls.results())
    limit, limit_of_sums = implementation.tolerance[str(p.x.dtype)]
    for name, error in errors.items():
        allowed = limit_of_sums if name in ("dgamma", "dbeta") else limit
        assert error <= allowed, (
            f"{implementation.name} is wrong on {p.case.name}: the error of {name} is {error:.1e},"
            f" {allowed:.1e} is allowed"
        )
    return errors
