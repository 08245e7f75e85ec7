"""Layer, RMS, group and instance norm, as everyone calls them: rows of `implementations`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from problem import EPS, Calls, NormProblem, named

import bn_fast
from bn_fast import reference


def bn_fast_new(p: NormProblem) -> Calls:
    return _of_module(bn_fast, p)


def bn_fast_out(p: NormProblem) -> Calls:
    """The caller's buffers."""
    return _of_module(bn_fast, p, np.zeros_like(p.x), np.zeros_like(p.x))


def through_numpy(p: NormProblem) -> Calls:
    return _of_module(reference, p)


def _of_module(
    module: Any, p: NormProblem, out: np.ndarray | None = None, dx: np.ndarray | None = None
) -> Calls:
    forward_op, backward_op = (
        getattr(module, f"{p.norm}norm_{way}") for way in ("forward", "backward")
    )

    def forward():
        return forward_op(p.x, *p.parameters, **p.options, out=out)

    y, cache = forward()

    def backward():
        return backward_op(p.dout, cache, out=dx)

    return Calls(forward, backward, lambda: named(y, *backward()))


def prepare_torch(p: NormProblem) -> Calls:
    """The operators behind torch.nn's modules, without autograd's bookkeeping, where there are
    some; RMS norm has them joined, and instance norm is batch norm of (1, N*C, ...)."""
    return _torch(p, lambda function: function)


def prepare_torch_compile(p: NormProblem) -> Calls:
    """The same, which the compiler takes apart and fuses for exactly this shape."""
    import torch

    torch.compiler.reset()
    return _torch(p, lambda function: torch.compile(lambda *a: function(*a), dynamic=False))


def _torch(p: NormProblem, compiled: Callable[[Any], Any]) -> Calls:
    import torch

    aten, needs = torch.ops.aten, [True, True, True]
    x, dout, *parameters = map(torch.from_numpy, (p.x, p.dout, *p.parameters))
    if p.norm == "rms":
        return _torch_rms(p, compiled, x, dout, parameters[0])
    gamma, beta = parameters
    shape = tuple(p.x.shape)
    n, c, places = shape[0], shape[1], int(np.prod(shape[2:]))
    if p.norm == "layer":
        size = shape[-1:]
        forward_op = compiled(lambda *a: aten.native_layer_norm(a[0], size, *a[1:], EPS))
        backward_op = compiled(
            lambda g, x, mean, r, gamma, beta: aten.native_layer_norm_backward(
                g, x, size, mean, r, gamma, beta, needs
            )
        )
    elif p.norm == "group":
        forward_op = compiled(
            lambda *a: aten.native_group_norm(*a, n, c, places, p.num_groups, EPS)
        )
        backward_op = compiled(
            lambda g, x, mean, r, gamma, beta: aten.native_group_norm_backward(
                g, x, mean, r, gamma, n, c, places, p.num_groups, needs
            )
        )
    else:
        one = (1, n * c, *shape[2:])

        def instance(x, gamma, beta):
            y, *statistics = torch.native_batch_norm(
                x.view(one), gamma.repeat(n), beta.repeat(n), None, None, True, 0.1, EPS
            )
            return y.view(shape), *statistics

        def instance_backward(g, x, mean, r, gamma, beta):
            dx, *sums = aten.native_batch_norm_backward(
                g.view(one), x.view(one), gamma.repeat(n), None, None, mean, r, True, EPS, needs
            )
            return dx.view(shape), *(a.view(n, c).sum(0) for a in sums)

        forward_op, backward_op = compiled(instance), compiled(instance_backward)

    def forward():
        return forward_op(x, gamma, beta)

    _, mean, inv_std = forward()

    def backward():
        return backward_op(dout, x, mean, inv_std, gamma, beta)

    return Calls(
        forward, backward, lambda: named(*(a.numpy() for a in (forward()[0], *backward())))
    )


def _torch_rms(p: NormProblem, compiled: Callable[[Any], Any], x: Any, dout: Any, gamma: Any):
    """PyTorch has no operator for the backward pass on the CPU: autograd's, of the forward call."""
    import torch

    size = x.shape[-1:]
    leaves = [a.clone().requires_grad_() for a in (x, gamma)]
    forward_op = compiled(lambda *a: torch.nn.functional.rms_norm(a[0], size, a[1], EPS))

    def forward():
        return forward_op(x, gamma)

    y = forward_op(*leaves)

    def backward():
        return torch.autograd.grad(y, leaves, dout, retain_graph=True)

    return Calls(forward, backward, lambda: named(*(a.numpy() for a in (forward(), *backward()))))


def prepare_jax(p: NormProblem) -> Calls:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    axes, has_mean = p.axes, p.norm != "rms"
    others = tuple(d for d in range(len(axes.shape)) if d not in axes.along)

    def mean_of(a):
        return a.mean(axes.over, keepdims=True)

    @jax.jit
    def forward_op(x, gamma, beta):
        x = x.reshape(axes.shape)
        mean = mean_of(x) if has_mean else 0
        centered = x - mean
        inv_std = 1 / jnp.sqrt(mean_of(centered**2) + EPS)
        out = centered * inv_std * gamma.reshape(axes.parameter_shape)
        return (out + beta.reshape(axes.parameter_shape)).reshape(p.x.shape), mean, inv_std

    @jax.jit
    def backward_op(dout, x, gamma, mean, inv_std):
        x, dout = x.reshape(axes.shape), dout.reshape(axes.shape)
        x_hat = (x - mean) * inv_std
        t = dout * gamma.reshape(axes.parameter_shape)
        rest = mean_of(t) if has_mean else 0
        dx = inv_std * (t - rest - x_hat * mean_of(t * x_hat))
        dgamma, dbeta = ((dout * x_hat).sum(others), dout.sum(others))
        return dx.reshape(p.x.shape), dgamma.reshape(-1), dbeta.reshape(-1)

    given = (*p.parameters, np.zeros_like(p.parameters[0]))[:2]
    x, dout, gamma, beta = (jnp.asarray(a) for a in (p.x, p.dout, *given))
    _, mean, inv_std = forward_op(x, gamma, beta)

    def forward():
        return jax.block_until_ready(forward_op(x, gamma, beta))

    def backward():
        return jax.block_until_ready(backward_op(dout, x, gamma, mean, inv_std))

    def results():
        return named(*(np.asarray(a) for a in (forward()[0], *backward()[: 1 + len(p.parameters)])))

    return Calls(forward, backward, results)


def prepare_numba(p: NormProblem) -> Calls:
    import numba_kernels as kernels
    from numba import get_num_threads

    n_threads = get_num_threads()

    eps, has_mean = p.x.dtype.type(EPS), p.norm != "rms"
    given = (*p.parameters, np.zeros_like(p.parameters[0]))[:2]
    # Rows of runs of one gamma: layer and RMS norm have one value each, the others a channel.
    length = 1 if p.norm in ("layer", "rms") else int(np.prod(p.x.shape[2:]))
    n_rows = int(np.prod(p.axes.stats_shape))
    shape = (n_rows, p.x.size // n_rows // length, length)
    x, dout = p.x.reshape(shape), p.dout.reshape(shape)
    # Which gammas a row has: all, or those of its group.
    n_sets = len(given[0]) // shape[1]
    gamma, beta = (a.reshape(n_sets, shape[1]) for a in given)

    def forward():
        return kernels.forward_rows(x, gamma, beta, eps, has_mean)

    _, mean, inv_std = forward()

    def backward():
        return kernels.backward_rows(dout, x, gamma, mean, inv_std, has_mean, n_threads)

    def results():
        (out, *_), (dx, *sums) = forward(), backward()
        sums = [a.reshape(-1) for a in sums][: len(p.parameters)]
        return named(out.reshape(p.x.shape), dx.reshape(p.x.shape), *sums)

    return Calls(forward, backward, results)
