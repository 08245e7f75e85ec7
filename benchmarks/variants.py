"""The list of options that are timed, and who does the same; a new one is one row at the end.

Each is called as bn_fast's user would, as a NumPy user writes it around the reference, and as
PyTorch's eager mode has it, and is judged by the long double oracle before it is timed.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from cases import DIRECTIONS, Case
from problem import EPS, Calls, Problem, Results, named

import bn_fast
from bn_fast import reference
from bn_fast.reference import ACTIVATIONS
from bn_fast.reference.batch import GRADIENTS

SLOPE = 0.01  # everyone's default of leaky_relu


class Variant(NamedTuple):
    """One way to call batch norm."""

    name: str
    activation: str | None = None
    residual: bool = False
    weights: str | None = None  # mask or real
    needs: tuple[str, ...] = GRADIENTS
    storage: str | None = None  # dtype of x, dout and residual, if it is not that of the case
    second_order: bool = False
    peers: tuple[str, ...] = ("NumPy", "torch")  # who can do the same

    @property
    def is_importable(self) -> bool:
        return self.storage != "bfloat16" or find_spec("ml_dtypes") is not None

    @property
    def directions(self) -> tuple[str, ...]:
        """Those that differ from plain batch norm's."""
        same_forward = self.needs != GRADIENTS or self.second_order
        return DIRECTIONS[1:] if same_forward else DIRECTIONS

    @property
    def users(self) -> list[str]:
        """Keys of USERS."""
        peers = [who for who in self.peers if find_spec(who.lower())]
        return ["plain"] * (self is not PLAIN) + ["bn_fast", "bn_fast out=", *peers]

    def fits(self, case: Case) -> bool:
        return self.storage is None or case.dtype == np.float32


class Given:
    """The arguments of a variant, the same at every run."""

    def __init__(self, variant: Variant, problem: Problem):
        rng = np.random.default_rng(1)
        self.variant, self.problem, self.axis = variant, problem, problem.axis
        self.gamma, self.beta = problem.gamma, problem.beta
        dtype = problem.case.dtype
        storage = dtype
        if variant.storage == "bfloat16":
            from ml_dtypes import bfloat16 as storage
        elif variant.storage:
            storage = np.dtype(variant.storage)
        self.x, self.dout = (a.astype(storage, copy=False) for a in (problem.x, problem.dout))
        self.residual = self.weights = None
        if variant.residual:
            self.residual = rng.standard_normal(self.x.shape, dtype)
        if variant.weights:
            shape = [1 if d == self.axis else n for d, n in enumerate(self.x.shape)]
            w = rng.uniform(0, 1, shape)
            self.weights = w > 0.25 if variant.weights == "mask" else w
        if variant.second_order:
            self.ddx = rng.standard_normal(self.x.shape, dtype)
            self.ddgamma, self.ddbeta = (
                rng.standard_normal(len(self.gamma)).astype(dtype) for _ in range(2)
            )

    @property
    def seconds(self) -> tuple[np.ndarray, ...]:
        return self.ddx, self.ddgamma, self.ddbeta, self.dout


def bn_fast_new(given: Given) -> Calls:
    return _ours(given, None, None)


def bn_fast_out(given: Given) -> Calls:
    """The caller's buffers, where a call takes one."""
    return _ours(given, np.zeros_like(given.x), np.zeros_like(given.x))


def _ours(given: Given, out: np.ndarray | None, dx: np.ndarray | None) -> Calls:
    v = given.variant
    if v.second_order:
        return _second_order(bn_fast, given)
    options: dict[str, Any] = {}
    for name in ("activation", "residual", "weights"):
        if getattr(v, name):
            options[name] = v.activation if name == "activation" else getattr(given, name)
    more: dict[str, Any] = {} if v.needs == GRADIENTS else {"needs": v.needs}
    dx = dx if "dx" in v.needs else None

    def forward():
        return bn_fast.batchnorm_forward(
            given.x, given.gamma, given.beta, axis=given.axis, out=out, **options
        )

    y, cache = forward()

    def backward():
        return bn_fast.batchnorm_backward(given.dout, cache, out=dx, **more)

    return Calls(forward, backward, lambda: named(y, *backward()))


def _second_order(module: Any, given: Given) -> Calls:
    _, cache = module.batchnorm_forward(given.x, given.gamma, given.beta, axis=given.axis)

    def call():
        return module.batchnorm_double_backward(*given.seconds, cache)

    return Calls(None, call, lambda: dict(zip(SECOND_RESULTS, call())))


SECOND_RESULTS = "dx", "dgamma", "ddout"


def through_numpy(given: Given) -> Calls:
    """What is around the reference is written as NumPy's users write it."""
    v = given.variant
    if v.second_order:
        return _second_order(reference, given)
    weights: dict[str, Any] = {} if given.weights is None else {"weights": given.weights}

    def forward():
        y, cache = reference.batchnorm_forward(
            given.x, given.gamma, given.beta, axis=given.axis, **weights
        )
        if v.residual:
            y = y + given.residual
        if v.activation == "relu":
            y = np.maximum(y, 0)
        elif v.activation:
            y = ACTIVATIONS[v.activation][0](y, SLOPE)
        return y, cache

    y, cache = forward()

    def backward():
        g = given.dout
        if v.activation == "relu":
            g = g * (y > 0)
        elif v.activation:
            g = ACTIVATIONS[v.activation][1](g, y, SLOPE)
        gradients = reference.batchnorm_backward(g, cache)
        return (*gradients, g) if v.residual else gradients

    return Calls(forward, backward, lambda: named(y, *backward()))


def through_torch(given: Given) -> Calls:
    """Features are moved to axis 1, as a view. The graph of the first derivative is kept."""
    import torch
    from torch.nn import functional

    def tensor(a: np.ndarray) -> Any:
        kept = a
        if a.dtype.name == "bfloat16":
            kept = a.view(np.int16)
        t = torch.from_numpy(kept)
        t = t if kept is a else t.view(torch.bfloat16)
        return t if a.ndim == 1 else t.movedim(given.axis, 1)

    def array(name: str, t: Any) -> np.ndarray:
        t = t.detach() if t.ndim == 1 else t.detach().movedim(1, given.axis)
        return (t.float() if t.dtype == torch.bfloat16 else t).numpy()

    v = given.variant
    x, dout, gamma, beta = map(tensor, (given.x, given.dout, given.gamma, given.beta))
    leaves = {"dx": x, "dgamma": gamma, "dbeta": beta}
    if v.residual:
        leaves["dresidual"] = tensor(given.residual)
    leaves = {name: leaves[name].requires_grad_() for name in leaves if name in v.needs}

    def forward():
        y = functional.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)
        if v.residual:
            y = y + leaves["dresidual"]
        return getattr(functional, v.activation)(y) if v.activation else y

    y = forward()
    if v.second_order:
        dout.requires_grad_()
        first = torch.autograd.grad(y, list(leaves.values()), dout, create_graph=True)
        given_first = [tensor(a) for a in given.seconds[:3]]

        def second():
            return torch.autograd.grad(first, [x, gamma, dout], given_first, retain_graph=True)

        return Calls(
            None,
            second,
            lambda: {n: array(n, t) for n, t in zip(SECOND_RESULTS, second())},
        )

    def backward():
        return torch.autograd.grad(y, list(leaves.values()), dout, retain_graph=True)

    def results():
        named = {"out": y} | dict(zip(leaves, backward()))
        return {name: array(name, t) for name, t in named.items()}

    return Calls(forward, backward, results)


def without_options(given: Given) -> Calls:
    """What an option costs is the others' time over this one's."""
    return bn_fast_out(Given(PLAIN, given.problem))


USERS = {
    "plain": without_options,
    "bn_fast": bn_fast_new,
    "bn_fast out=": bn_fast_out,
    "NumPy": through_numpy,
    "torch": through_torch,
}


def judge(who: str, results: Results, given: Given) -> dict[str, float]:
    """The errors.

    The gate of a gradient is that of the output it comes with: where z is a rounding away from 0,
    both sides are right.
    """
    p, v = given.problem, given.variant
    x, dout = (p.choose(a).astype(p.case.dtype) for a in (given.x, given.dout))
    gamma, beta = p.choose(given.gamma), p.choose(given.beta)
    shared: dict[str, Any] = {"axis": given.axis, "eps": EPS}
    if v.second_order:
        seconds = map(p.choose, given.seconds)
        right = dict(
            zip(SECOND_RESULTS, reference.oracle_double_backward(*seconds, x, gamma, **shared))
        )
    else:
        shared["weights"] = given.weights
        z, _, _ = reference.oracle_forward(x, gamma, beta, **shared)
        if v.residual:
            z = z + p.choose(given.residual)
        g = dout
        if v.activation:
            g = ACTIVATIONS[v.activation][1](dout, p.choose(results["out"]), SLOPE)
            z = ACTIVATIONS[v.activation][0](z, SLOPE)
        right = named(z, *reference.oracle_backward(g, x, gamma, **shared), g)
    rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(v.storage, 0.0)
    return p.judge(f"{who}, {v.name}", results, right, rounding)


PLAIN = Variant("plain")
VARIANTS = [
    PLAIN,
    *(Variant(name, activation=name) for name in ACTIVATIONS),
    Variant("residual", residual=True),
    Variant("residual, relu", activation="relu", residual=True),
    Variant("mask", weights="mask", peers=("NumPy",)),
    Variant("real weights", weights="real", peers=("NumPy",)),
    Variant("dx alone", needs=("dx",), peers=("torch",)),
    Variant("dgamma, dbeta alone", needs=("dgamma", "dbeta"), peers=("torch",)),
    Variant("float16", storage="float16"),
    Variant("bfloat16", storage="bfloat16"),
    Variant("second order", second_order=True),
]
