"""The norms for PyTorch's CPU tensors, with the signatures of `torch.nn.functional`.

The tensors' memory is read in place and the results are NumPy's memory under tensors: no copies.

There are three roads. An ordinary call takes an autograd.Function. One that PyTorch transforms
(torch.func, torch.compile, a dispatch mode), where tensors have no memory, takes custom operators,
which compute the same and cost a small call 50 us more each way. One that is written down, to be
run without this module (torch.jit, torch.export, ONNX), is left to PyTorch's own function.
"""

import math
from collections.abc import Callable
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError("bn_fast.torch needs PyTorch: pip install torch") from error

from . import _checks
from ._torch_batch import apply_batch_norm
from ._torch_checks import (
    check_channels,
    check_parameters,
    check_running,
    check_tensor,
    epsilon_of,
    momentum_of,
    shape_of,
)
from ._torch_norms import apply_norm
from ._torch_transforms import done_elsewhere, is_transformed, replace

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]

# Taken before anybody puts this module's functions in their place.
_pytorchs = torch.nn.functional.batch_norm
_pytorchs_layer_norm = torch.nn.functional.layer_norm
_pytorchs_rms_norm = torch.nn.functional.rms_norm
_pytorchs_group_norm = torch.nn.functional.group_norm
_pytorchs_instance_norm = torch.nn.functional.instance_norm


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    r"""`torch.nn.functional.batch_norm` for CPU tensors, computed by bn_fast.

    Same arguments in the same order with the same meaning, so it can stand in its place, also for
    the modules: ``torch.nn.functional.batch_norm = bn_fast.torch.batch_norm``.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...)
        Any floating dtype (bfloat16 needs ml_dtypes, NumPy's name for it), on the CPU, any strides
        (channels_last and others are read in place). It is kept for the backward pass; changing it
        before that is an error, as in PyTorch.
    running_mean, running_var : Tensor, shape (C,), or None
        With ``training=False`` the statistics to normalize with. With ``training=True`` they are
        updated in place, or may both be None. No gradient flows through them.
    weight, bias : Tensor, shape (C,), or None
        Scale and shift; None is 1 and 0.
    training : bool, default False
        Normalize with the statistics of this batch.
    momentum : float, default 0.1
        PyTorch's, the weight of the *new* value (1 minus that of `bn_fast.batchnorm_forward`):
        ``running = (1 - momentum) * running + momentum * batch``.
    eps : float, default 1e-5
        Added to the variance; at least 0.

    Returns
    -------
    Tensor
        Shape, dtype and memory format of `input`.

    Raises
    ------
    TypeError
        If an argument is no dense CPU tensor of a floating dtype.
    ImportError
        For bfloat16 without ml_dtypes.
    ValueError
        If a shape or value is wrong; with ``training=True`` also if there is one value per channel,
        as in PyTorch. The running statistics are then as before.

    Notes
    -----
    The batch is normalized with its biased variance (÷M), and ``running_var`` receives the unbiased
    one (÷(M - 1)), as in PyTorch. An empty batch leaves the running statistics as they are. In
    contrast to PyTorch the results do not depend on the number of threads, ``eps=0`` is allowed
    in training, the parameters may be of another dtype than `input`, and a negative
    ``running_var`` is an error.

    Second derivatives (``create_graph=True``, for gradient penalties) are computed by
    `bn_fast.batchnorm_double_backward`; a third derivative and forward-mode differentiation are
    errors. torch.func's other transforms and torch.compile work, by way of operators that cost a
    small call more. torch.jit, torch.export and torch.onnx.export write down PyTorch's own batch
    norm, so that what they give needs no bn_fast. docs/conventions.md has it as a table.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import torch
    >>> from bn_fast.torch import batch_norm
    >>> x = torch.tensor([[1.0], [2.0], [6.0]], requires_grad=True)
    >>> running_mean, running_var = torch.zeros(1), torch.ones(1)
    >>> y = batch_norm(x, running_mean, running_var, training=True)
    >>> y[0].backward()
    >>> x.grad.T
    tensor([[ 0.1763, -0.2204,  0.0441]])
    >>> running_mean, running_var
    (tensor([0.3000]), tensor([1.6000]))
    """
    # TorchScript compiles what follows, and never looks into the first branch.
    if not torch.jit.is_scripting():
        return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _pytorchs(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    training: Any,
    momentum: Any,
    eps: Any,
) -> torch.Tensor:
    given = input, running_mean, running_var, weight, bias
    transformed = is_transformed(input)
    done = done_elsewhere(
        batch_norm, _pytorchs, given, transformed, (*given, training, momentum, eps)
    )
    if done is not None:
        return done
    check_channels(input, weight, bias, running_mean, running_var)
    check_running(running_mean, running_var, "training", training)
    if training and input.shape[0] == 1 == math.prod(input.shape[2:]):
        raise ValueError(
            "input must have more than 1 value for each channel when training, got shape"
            f" {tuple(input.shape)}"
        )
    return apply_batch_norm(
        input, weight, bias, running_mean, running_var, bool(training),
        momentum_of(momentum), epsilon_of(eps), transformed,
    )  # fmt: skip


def layer_norm(
    input: torch.Tensor,
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    r"""`torch.nn.functional.layer_norm` for CPU tensors, computed by bn_fast.

    Same arguments in the same order with the same meaning, so it can stand in its place, also for
    the module: ``torch.nn.functional.layer_norm = bn_fast.torch.layer_norm``.

    Parameters
    ----------
    input : Tensor
        As for `batch_norm`: any floating dtype, on the CPU, any strides. Here its last dimensions
        are normalized.
    normalized_shape : sequence of int, or int
        The shape of these last dimensions; an integer is one of them.
    weight, bias : Tensor, shape `normalized_shape`, or None
        Scale and shift; None is 1 and 0. They may be of another dtype than `input`.
    eps : float, default 1e-5
        Added to the variance; at least 0.

    Returns
    -------
    Tensor
        Shape, dtype and memory format of `input`.

    Raises
    ------
    TypeError
        If an argument is no dense CPU tensor of a floating dtype.
    ImportError
        For bfloat16 without ml_dtypes.
    ValueError
        If a shape or value is wrong.
    NotImplementedError
        For a second derivative, and in forward mode.

    See Also
    --------
    bn_fast.layernorm_forward, bn_fast.layernorm_backward : what is called, with the formulas

    Notes
    -----
    What is said of torch.func, torch.compile, torch.jit and torch.export in `batch_norm` holds
    here, but for the second derivative, which is an error.

    Examples
    --------
    >>> import torch
    >>> from bn_fast.torch import layer_norm
    >>> x = torch.tensor([[1.0, 2.0, 6.0]], requires_grad=True)
    >>> layer_norm(x, (3,))[0, 0].backward()
    >>> x.grad
    tensor([[ 0.1763, -0.2204,  0.0441]])
    """
    if not torch.jit.is_scripting():
        return _rows("layernorm", layer_norm, input, normalized_shape, (weight, bias), eps)
    return _pytorchs_layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm(
    input: torch.Tensor,
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    r"""`torch.nn.functional.rms_norm` for CPU tensors, computed by bn_fast.

    Parameters, results and errors are those of `layer_norm`, but for what follows.

    Parameters
    ----------
    eps : float, optional
        Added to the mean square. None is PyTorch's: ``finfo(float64).eps`` for float64, else
        ``finfo(float32).eps``, for 16 bits too.

    See Also
    --------
    bn_fast.rmsnorm_forward, bn_fast.rmsnorm_backward : what is called, with the formulas

    Examples
    --------
    >>> import torch
    >>> from bn_fast.torch import rms_norm
    >>> rms_norm(torch.tensor([1.0, 7.0]), (2,))
    tensor([0.2000, 1.4000])
    """
    if not torch.jit.is_scripting():
        return _rows("rmsnorm", rms_norm, input, normalized_shape, (weight,), eps)
    return _pytorchs_rms_norm(input, normalized_shape, weight, eps)


def group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    r"""`torch.nn.functional.group_norm` for CPU tensors, computed by bn_fast.

    Parameters, results and errors are those of `layer_norm`, but for what follows.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...)
        As PyTorch's it must have more than one value for each channel of a group, over all samples.
    num_groups : int
        Divides C. A group is C/num_groups channels that are neighbours.
    weight, bias : Tensor, shape (C,), or None
        Scale and shift of each channel; None is 1 and 0.

    See Also
    --------
    bn_fast.groupnorm_forward, bn_fast.groupnorm_backward : what is called, with the formulas

    Examples
    --------
    >>> import torch
    >>> from bn_fast.torch import group_norm
    >>> group_norm(torch.tensor([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0)
    tensor([[-1.,  1., -1.,  1.]])
    """
    if not torch.jit.is_scripting():
        return _group_norm(input, num_groups, weight, bias, eps)
    return _pytorchs_group_norm(input, num_groups, weight, bias, eps)


def instance_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    r"""`torch.nn.functional.instance_norm` for CPU tensors, computed by bn_fast.

    Parameters, results and errors are those of `layer_norm`, but for what follows.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...)
        As PyTorch's it must have more than one spatial element, if `use_input_stats`.
    running_mean, running_var : Tensor, shape (C,), or None
        With ``use_input_stats=False`` the statistics to normalize with: this is `batch_norm` of
        ``training=False``. With True they are updated in place, by the mean over the samples of
        their means and unbiased variances, or may both be None. No gradient flows through them.
    weight, bias : Tensor, shape (C,), or None
        Scale and shift of each channel; None is 1 and 0.
    use_input_stats : bool, default True
        Normalize each sample's channels with their own statistics.
    momentum : float, default 0.1
        The weight of the new value in the running statistics, as in `batch_norm`.

    See Also
    --------
    bn_fast.instancenorm_forward, bn_fast.instancenorm_backward : what is called, with the formulas

    Examples
    --------
    >>> import torch
    >>> from bn_fast.torch import instance_norm
    >>> instance_norm(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]]), eps=0)
    tensor([[[-1.,  1.],
             [-1.,  1.]]])
    """
    if not torch.jit.is_scripting():
        return _instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    return _pytorchs_instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _rows(
    norm: str,
    door: Callable[..., torch.Tensor],
    input: Any,
    normalized_shape: Any,
    parameters: tuple[Any, ...],
    eps: Any,
) -> torch.Tensor:
    """parameters: weight, and bias where there is one."""
    shape = shape_of(normalized_shape)
    transformed = is_transformed(input)
    theirs = _pytorchs_layer_norm if norm == "layernorm" else _pytorchs_rms_norm
    args = input, shape, *parameters, eps
    done = done_elsewhere(door, theirs, (input, *parameters), transformed, args)
    if done is not None:
        return done
    check_tensor(input, "input")
    last = tuple(input.shape[max(0, input.dim() - len(shape)) :])
    if last != shape:
        raise ValueError(
            f"normalized_shape must be the shape of input's last dimensions, got {shape} for input"
            f" {tuple(input.shape)}"
        )
    weight, bias = (*parameters, None)[:2]
    check_parameters(shape, "that of normalized_shape", {"weight": weight, "bias": bias})
    if eps is None and norm == "rmsnorm":
        eps = torch.finfo(torch.float64 if input.dtype is torch.float64 else torch.float32).eps
    return apply_norm(input, weight, bias, norm, len(shape), epsilon_of(eps), transformed)[0]


def _group_norm(input: Any, num_groups: Any, weight: Any, bias: Any, eps: Any) -> torch.Tensor:
    given = input, num_groups, weight, bias, eps
    transformed = is_transformed(input)
    done = done_elsewhere(
        group_norm, _pytorchs_group_norm, (input, weight, bias), transformed, given
    )
    if done is not None:
        return done
    check_channels(input, weight, bias)
    if type(num_groups) is not int:
        num_groups = _checks.integer(num_groups, "num_groups")
    n = input.shape[1]
    if num_groups < 1 or n % num_groups:
        raise ValueError(
            f"num_groups must be at least 1 and divide the {n} channels of input, got {num_groups}"
        )
    if input.shape[0] * (n // num_groups) * math.prod(input.shape[2:]) == 1:
        raise ValueError(
            "input must have more than 1 value for each channel of a group, got shape"
            f" {tuple(input.shape)} and num_groups={num_groups}"
        )
    return apply_norm(input, weight, bias, "groupnorm", num_groups, epsilon_of(eps), transformed)[0]


def _instance_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    use_input_stats: Any,
    momentum: Any,
    eps: Any,
) -> torch.Tensor:
    given = input, running_mean, running_var, weight, bias
    transformed = is_transformed(input)
    all_given = *given, use_input_stats, momentum, eps
    done = done_elsewhere(instance_norm, _pytorchs_instance_norm, given, transformed, all_given)
    if done is not None:
        return done
    check_channels(input, weight, bias, running_mean, running_var)
    check_running(running_mean, running_var, "use_input_stats", use_input_stats)
    momentum, eps = momentum_of(momentum), epsilon_of(eps)
    if not use_input_stats:
        return _batch_norm(*given, False, momentum, eps)
    n_values = math.prod(input.shape[2:])
    if n_values == 1:
        raise ValueError(
            "input must have more than 1 spatial element with use_input_stats=True, got shape"
            f" {tuple(input.shape)}"
        )
    y, stats = apply_norm(input, weight, bias, "instancenorm", 0, eps, transformed)
    if running_mean is not None and input.numel():
        batch = stats.detach().unflatten(1, (input.shape[0], -1)).mean(1)
        unbiased = batch[3] * (n_values / (n_values - 1))
        put = replace if transformed else torch.Tensor.copy_
        for running, new in ((running_mean, batch[0]), (running_var, unbiased)):
            put(running, (1 - momentum) * running.detach() + momentum * new)
    return y
