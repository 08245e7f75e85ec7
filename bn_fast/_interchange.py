"""What the layers of PyTorch and Keras call their settings and state, and back.

Neither library is imported: a module or layer that is handed in brings what is needed. Both name
the same numbers, with three differences (docs/conventions.md): PyTorch's momentum is the weight of
the new value, its running variance is the unbiased one, and Keras' arrays are a list.
"""

import sys
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _layer_checks

State = dict[str, NDArray[Any]]

# PyTorch's names of the layer's state.
TORCH_NAMES = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "running_mean",
    "running_var": "running_var",
    "num_batches_tracked": "num_batches",
}


def _complement(momentum: float | None) -> float | None:
    """1 - momentum in decimals, so that 0.9 and 0.1 are each other's, not 0.09999999999999998."""
    return None if momentum is None else float(1 - Decimal(repr(float(momentum))))


def _demand(value: Any, name: str, kind: str, known: list[type], method: str) -> None:
    """That a value is of a known class, or of a subclass that computes nothing else."""
    got = type(value).__name__
    base = next((each for each in known if isinstance(value, each)), None)
    if base is None:
        raise TypeError(f"{name} must be a {kind}, got {got}")
    for each in (method, "__call__"):
        if each in vars(value) or getattr(type(value), each) is not getattr(base, each):
            raise TypeError(
                f"{name} must be a {kind} that does nothing else, got {got}, which has a {each} of"
                " its own"
            )


def _demand_torch(module: Any) -> None:
    kind = "torch.nn.BatchNorm1d, 2d, 3d or SyncBatchNorm"
    names = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"]
    torch = sys.modules.get("torch")  # whoever has a module has imported it
    _demand(
        module, "module", kind, [getattr(torch.nn, n) for n in names] if torch else [], "forward"
    )
    more = [f"{key!r} in its state" for key in module.state_dict() if key not in TORCH_NAMES]
    if module._forward_hooks or module._forward_pre_hooks:
        more.append("forward hooks")
    if more:  # parametrizations, weight norm, submodules; or nobody knows what
        raise TypeError(f"module must be a {kind} that does nothing else, got one with {more[0]}")
    if module.running_var is None or not module.track_running_stats:
        raise ValueError(
            "module must keep running statistics, got track_running_stats=False: what it computes"
            " from each batch alone is here forward(x, training=True)"
        )
    if module.running_var.is_meta:
        raise ValueError("module must have numbers, got one on the meta device")


def from_torch(module: Any) -> tuple[dict[str, Any], State]:
    """The constructor's arguments, and the state, of a module."""
    _demand_torch(module)
    state = {}
    for theirs, ours in TORCH_NAMES.items():
        tensor = getattr(module, theirs)
        if tensor is not None:
            tensor = tensor.detach().cpu()
            state[ours] = (tensor if ours == "num_batches" else tensor.double()).numpy()
    settings = {
        "num_features": module.num_features,
        "eps": module.eps,
        "momentum": _complement(module.momentum),
        "affine": module.weight is not None,
        "ddof": 1,
        "dtype": "float64" if str(module.running_var.dtype) == "torch.float64" else "float32",
    }
    if settings["affine"]:
        state.setdefault("beta", np.zeros(module.num_features))
    state.setdefault("num_batches", np.array(0))
    return settings, state


def to_torch(module: Any, state: State, eps: float, momentum: float | None) -> None:
    """Write the state and settings into a module."""
    _demand_torch(module)
    tensors = module.state_dict()
    state = _fitting(state, module.num_features, "module", "weight" in tensors, "bias" in tensors)
    fitted = {}
    for key, old in tensors.items():
        value = state[TORCH_NAMES[key]]
        new = fitted[key] = old.new_tensor(value)
        held = (new.double() if new.is_floating_point() else new).cpu().numpy()
        _check_held(value, held, f"module's {key}", old.dtype, eps)
    module.load_state_dict(fitted)
    module.eps, module.momentum = eps, _complement(momentum)


def _check_held(value: NDArray[Any], held: NDArray[Any], name: str, dtype: Any, eps: float) -> None:
    """That the other side holds what it is given: what is finite so, what is counted exactly, and a
    variance beside eps not as 0."""
    if value.dtype.kind == "i":
        lost = value != held
    else:
        lost = np.isfinite(value) & ~np.isfinite(held)
        if name.endswith("running_var"):
            lost |= (value + eps != eps) & (held == 0)
    _layer_checks.refuse_lost(lost, value, held, name, dtype)


def _keras_weights(layer: Any) -> list[str]:
    """Our names of a Keras layer's arrays, in its order."""
    kind = "keras.layers.BatchNormalization"
    known = [
        each
        for each in type(layer).__mro__
        if each.__name__ == "BatchNormalization"
        and each.__module__.partition(".")[0] in ("keras", "tf_keras", "tensorflow")
    ]
    _demand(layer, "layer", kind, known, "call")
    names = ["gamma"] * bool(layer.scale) + ["beta"] * bool(layer.center)
    names += ["running_mean", "running_var"]
    found = len(layer.get_weights())
    if found == 0:
        raise ValueError("layer must be built, got one without arrays: call layer.build(shape)")
    if found != len(names):
        raise ValueError(f"layer must have the arrays {names}, got {found} (renorm=True has more)")
    return names


def from_keras(layer: Any) -> tuple[dict[str, Any], State]:
    """The constructor's arguments, and the state, of a built layer."""
    state = dict(zip(_keras_weights(layer), layer.get_weights()))
    var = state["running_var"]
    axis = layer.axis
    if not isinstance(axis, int):  # a list of one, in tf.keras
        (axis,) = axis
    settings = {
        "num_features": len(var),
        "axis": axis,
        "eps": layer.epsilon,
        "momentum": layer.momentum,
        "affine": bool(layer.scale or layer.center),
        "ddof": 0,
        "dtype": "float64" if var.dtype == np.float64 else "float32",
    }
    if settings["affine"]:
        state.setdefault("gamma", np.ones(len(var)))
        state.setdefault("beta", np.zeros(len(var)))
    return settings, state | {"num_batches": np.array(0)}


def to_keras(layer: Any, state: State, eps: float, momentum: float | None) -> None:
    """Write the state and settings into a built layer."""
    names = _keras_weights(layer)
    if momentum is None:
        raise ValueError("layer cannot keep a cumulative average (momentum=None): Keras has none")
    old = layer.get_weights()
    state = _fitting(state, len(old[-1]), "layer", "gamma" in names, "beta" in names)
    fitted = [_layer_checks.rounded(state[name], weight.dtype) for name, weight in zip(names, old)]
    for name, new in zip(names, fitted):
        _check_held(state[name], new, f"layer's {name}", new.dtype, eps)
    layer.set_weights(fitted)
    layer.epsilon, layer.momentum = eps, momentum


def _fitting(state: State, n_features: int, name: str, has_gamma: bool, has_beta: bool) -> State:
    """The state with gamma and beta, if they are as the other side can keep them."""
    own = len(state["running_var"])
    if own != n_features:
        raise ValueError(f"{name} must have {own} features, got {n_features}")
    state = {"gamma": np.ones(own), "beta": np.zeros(own)} | state
    if not (has_gamma or np.all(state["gamma"] == 1)):
        raise ValueError(f"{name} must have a scale, or gamma, which is not 1, would be lost")
    if not (has_beta or np.all(state["beta"] == 0)):
        raise ValueError(f"{name} must have a shift, or beta, which is not 0, would be lost")
    return state
