"""bn_fast.torch stands in the place of torch.nn.functional.batch_norm."""

import numpy as np
import pytest

from .arrays import normal
from .judge import check, check_gradients

pytest.importorskip("torch")

import torch
import torch.nn.functional as F

from bn_fast import set_num_threads
from bn_fast.torch import batch_norm

from . import oracle

DTYPES = [torch.float32, torch.float64]
SHAPES = [(40, 7), (2, 1), (5, 6, 9), (4, 3, 14, 14), (2, 3, 4, 5, 6)]
FORMATS = {
    "contiguous": lambda x: x,
    "features last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


def tensors(shape, dtype, seed=0):
    """x, running_mean, running_var, weight, bias, dout of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    n = shape[1]
    sizes = [shape, (n,), (n,), (n,), (n,), shape]
    x, mean, var, weight, bias, dout = (
        torch.randn(size, generator=generator, dtype=dtype) for size in sizes
    )
    return 3 + 2 * x, mean, var**2 + 0.5, 1 + weight / 4, bias, dout


def run(function, x, mean, var, weight, bias, dout, training, **settings):
    """Output, gradients and running statistics; nothing that was handed in is changed."""
    mean, var = (None if a is None else a.clone() for a in (mean, var))
    leaves = [None if a is None else a.detach().requires_grad_() for a in (x, weight, bias)]
    y = function(leaves[0], mean, var, *leaves[1:], training, **settings)
    y.backward(dout)
    return [y.detach(), *(a if a is None else a.grad for a in leaves), mean, var]


NAMES = ["y", "dx", "dweight", "dbias", "mean", "var"]


def assert_all_close(got, expected, eps):
    for name, a, b in zip(NAMES, got, expected):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            error = (a.double() - b.double()).abs().max() if a.numel() else 0
            assert error <= eps * max(1, b.abs().max()), name


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_agrees_with_torch(shape, training, layout):
    given = tensors(shape, torch.float64)
    x, dout = FORMATS[layout](given[0]), FORMATS[layout](given[-1])
    if layout == "expanded":  # a dout that follows x everywhere has dx = 0
        dout = given[-1]
    settings = {"momentum": 0.3, "eps": 1e-3}
    got, expected = (
        run(f, x, *given[1:-1], dout, training, **settings) for f in (batch_norm, F.batch_norm)
    )
    assert_all_close(got, expected, 1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_float32_is_right_to_roundings(training, memory_format):
    x, mean, var, weight, bias, dout = tensors((4, 3, 14, 14), torch.float32)
    x, dout = (a.to(memory_format=memory_format) for a in (x, dout))
    got = run(batch_norm, x, mean, var, weight, bias, dout, training)
    arrays = [a.numpy() for a in (x, weight, bias, dout)]
    frozen = {} if training else {"mean": mean.numpy(), "var": var.numpy()}
    check("y", got[0].numpy(), oracle.forward(*arrays[:3], **frozen), arrays[0])
    expected = oracle.backward(arrays[3], *arrays[:2], **frozen)
    check_gradients([a.numpy() for a in got[1:4]], expected, arrays[0])
    assert got[0].is_contiguous(memory_format=memory_format)
    assert got[1].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("parameters", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_half_is_storage(dtype, training, parameters):
    """The float32 call, rounded once; parameters of 32 bits or of the input's."""
    if dtype is torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    given = [a.to(dtype) for a in tensors((40, 6, 7), torch.float32)]
    given[1:-1] = [a.to(parameters or dtype) for a in given[1:-1]]
    got = run(batch_norm, *given, training)
    expected = run(batch_norm, *(a.float() for a in given), training)
    for name, a, b, like in zip(
        NAMES, got, expected, (given[0], *given[:1], *given[3:5], *given[1:3])
    ):
        assert a.dtype == like.dtype, name
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3), (2, 3, 2, 2)])
def test_gradcheck(shape, training):
    x, mean, var, weight, bias, _ = tensors(shape, torch.float64)
    leaves = [a.requires_grad_() for a in (x, weight, bias)]

    def function(x, weight, bias):
        return batch_norm(x, mean.clone(), var.clone(), weight, bias, training)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_penalty_agrees_with_torch(training, affine, dtype):
    x, mean, var, weight, bias, dout = tensors((9, 4, 3), dtype)
    parameters = [weight, bias] if affine else []
    leaves = [a.requires_grad_() for a in (x, *parameters, dout)]

    def second_derivatives(function):
        statistics = None if training else mean.clone(), None if training else var.clone()
        y = function(x, *statistics, *parameters, training=training)
        (dx,) = torch.autograd.grad(y, x, dout, create_graph=True)
        return torch.autograd.grad((dx**2).sum() + y.sum(), leaves)

    eps = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    expected = second_derivatives(F.batch_norm)
    for a, b in zip(second_derivatives(batch_norm), expected):
        assert (a - b).abs().max() <= eps * max(1, b.abs().max())


def test_third_derivative_is_refused():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = batch_norm(x, None, None, training=True).sin().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


@pytest.mark.parametrize("needed", range(8))
def test_only_what_needs_a_gradient_gets_one(needed):
    x, mean, var, weight, bias, dout = tensors((6, 3), torch.float64)
    leaves = [a.requires_grad_(bool(needed >> i & 1)) for i, a in enumerate((x, weight, bias))]
    expected = run(F.batch_norm, *(a.detach() for a in (x, mean, var, weight, bias)), dout, True)
    y = batch_norm(x, mean, var, weight, bias, True)
    assert y.requires_grad == bool(needed)
    if needed:
        y.backward(dout)
    for leaf, gradient in zip(leaves, expected[1:4]):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("without", [(), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("running", [True, False])
def test_parameters_may_be_none(without, running):
    names = ["x", "mean", "var", "weight", "bias", "dout"]
    given = dict(zip(names, tensors((9, 4), torch.float64)))
    given |= dict.fromkeys(without)
    if not running:
        given |= {"mean": None, "var": None}
    got, expected = (run(f, *given.values(), True) for f in (batch_norm, F.batch_norm))
    assert_all_close(got, expected, 1e-12)


def test_the_tensors_are_read_in_place(monkeypatch):
    import bn_fast.torch as door

    seen = []

    def spy(function):
        def call(*args, **options):
            result = function(*args, **options)
            seen.append((args, result))
            return result

        return call

    monkeypatch.setattr(door, "batchnorm_forward", spy(door.batchnorm_forward))
    monkeypatch.setattr(door, "batchnorm_backward", spy(door.batchnorm_backward))
    x, mean, var, weight, bias, dout = tensors((4, 3, 5, 5), torch.float32)
    x = x.requires_grad_()
    y = batch_norm(x, mean, var, weight, bias, True)
    y.backward(dout)
    (forward, (out, _)), (backward, (dx, _, _)) = seen
    for array, tensor in zip(forward[:3], (x, weight, bias)):
        assert array.ctypes.data == tensor.data_ptr()
    assert backward[0].ctypes.data == dout.data_ptr()
    assert backward[1].x.ctypes.data == x.data_ptr()
    assert out.ctypes.data == y.data_ptr()
    assert dx.ctypes.data == x.grad.data_ptr()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needed", [(1, 1, 0), (1, 0, 0), (0, 1, 1), (0, 0, 1)])
def test_what_nobody_asked_for_is_not_computed(needed, training, monkeypatch):
    import bn_fast.torch as door

    asked = []

    def spy(*args, needs=("dx", "dgamma", "dbeta")):
        asked.append(tuple(needs))
        return batchnorm_backward(*args, needs=needs)

    batchnorm_backward = door.batchnorm_backward
    x, mean, var, weight, bias, dout = tensors((6, 3, 4), torch.float64)
    leaves = x, weight, bias
    for leaf in leaves:
        leaf.requires_grad_()
    expected = torch.autograd.grad(batch_norm(x, mean, var, weight, bias, training), leaves, dout)
    for leaf, wanted in zip(leaves, needed):
        leaf.requires_grad_(bool(wanted))
    monkeypatch.setattr(door, "batchnorm_backward", spy)
    batch_norm(x, mean, var, weight, bias, training).backward(dout)
    names = zip(("dx", "dgamma", "dbeta"), needed)
    assert asked == [tuple(name for name, wanted in names if wanted)]
    for leaf, wanted, gradient in zip(leaves, needed, expected):
        assert torch.equal(leaf.grad, gradient) if wanted else leaf.grad is None


def test_it_serves_the_modules(monkeypatch):
    """Three steps of a network on real images, and its test mode, as PyTorch does them."""
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    x = torch.from_numpy(images).reshape(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(labels)

    def train():
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(inplace=True),
            torch.nn.Flatten(),
            torch.nn.Linear(288, 32),
            torch.nn.BatchNorm1d(32, momentum=None),
            torch.nn.ReLU(inplace=True),
            torch.nn.Linear(32, 10),
        ).double()
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        losses = []
        for batch in torch.arange(len(x)).split(256)[:3]:
            loss = F.cross_entropy(net(x[batch]), labels[batch])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        net.eval()
        with torch.no_grad():
            return losses, net(x), net.state_dict()

    expected = train()
    monkeypatch.setattr(F, "batch_norm", batch_norm)
    got = train()
    assert got[0] == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-10, atol=1e-10)


def test_bits_do_not_depend_on_threads():
    given = tensors((300, 1000), torch.float32)
    try:
        results = []
        for n in (1, 2, 5):
            set_num_threads(n)
            results.append(run(batch_norm, *given, True))
    finally:
        set_num_threads(None)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_empty_batch_leaves_running_statistics():
    got = run(batch_norm, *tensors((0, 3), torch.float32), True)
    _, mean, var, *_ = tensors((0, 3), torch.float32)
    assert got[0].shape == (0, 3)
    assert torch.equal(got[4], mean)
    assert torch.equal(got[5], var)


def test_running_statistics_may_be_of_another_dtype():
    x, mean, var, *_ = tensors((9, 3), torch.float32)
    wide = mean.double(), var.double()
    batch_norm(x, mean, var, training=True)
    batch_norm(x, *wide, training=True)
    torch.testing.assert_close(wide[0].float(), mean)
    torch.testing.assert_close(wide[1].float(), var)


def test_no_grad_and_inference_mode():
    x, mean, var, weight, bias, _ = tensors((9, 3), torch.float64)
    weight.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = batch_norm(x, mean, var, weight, bias)
        assert not y.requires_grad
        torch.testing.assert_close(y, F.batch_norm(x, mean, var, weight, bias).detach())


def test_a_changed_input_is_noticed():
    x, mean, var, weight, bias, _ = tensors((9, 3), torch.float64)
    y = batch_norm(x, mean, var, weight.requires_grad_(), bias, True)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_statistics_that_change_later_do_not_change_the_gradient():
    x, mean, var, weight, bias, dout = tensors((9, 3), torch.float64)
    expected = run(batch_norm, x, mean, var, weight, bias, dout, False)[1]
    y = batch_norm(x.requires_grad_(), mean, var, weight, bias)
    batch_norm(x, mean, var, training=True)
    y.backward(dout)
    assert torch.equal(x.grad, expected)


def test_hooks_may_move_what_is_saved():
    given = tensors((9, 3), torch.float64)
    with torch.autograd.graph.save_on_cpu():
        got = run(batch_norm, *given, True)
    assert_all_close(got, run(batch_norm, *given, True), 0)


def test_inputs_are_not_changed():
    given = tensors((9, 3), torch.float64)
    copies = [a.clone() for a in given]
    run(batch_norm, *given, True)
    assert all(torch.equal(a, b) for a, b in zip(given, copies))


def test_negative_bit():
    """imag of a conjugate is a view that PyTorch has still to negate."""
    x = torch.view_as_complex(torch.randn(9, 3, 2, dtype=torch.float64)).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(
        batch_norm(x, None, None, training=True), F.batch_norm(x, None, None, training=True)
    )


ONES = torch.ones(3)
BAD = {
    "list": (TypeError, "input must be a torch.Tensor, got list", {"input": [[1.0]]}),
    "ndarray": (TypeError, "weight must be a torch.Tensor", {"weight": np.ones(3)}),
    "meta": (TypeError, "on the CPU, got one on meta", {"input": torch.ones(4, 3, device="meta")}),
    "sparse": (TypeError, "dense tensor", {"input": torch.ones(4, 3).to_sparse()}),
    "8 bits": (TypeError, "float8", {"input": torch.ones(4, 3).to(torch.float8_e4m3fn)}),
    "integers": (TypeError, "int64", {"input": torch.ones(4, 3).long()}),
    "complex": (TypeError, "complex64", {"bias": ONES.cfloat()}),
    "one dimension": (ValueError, r"2 or more .* got shape \(3,\)", {"input": ONES}),
    "weight": (ValueError, r"weight must have shape \(3,\).* \(2,\)", {"weight": ONES[:2]}),
    "var": (ValueError, "running_var must have shape", {"running_var": torch.ones(3, 1)}),
    "no statistics": (
        ValueError,
        "given with training=False, got running_mean=None",
        {"running_mean": None, "running_var": None, "training": False},
    ),
    "one statistic": (ValueError, "got running_var=None", {"running_var": None}),
    "gradient": (
        ValueError,
        "running_mean must not require a gradient",
        {"running_mean": torch.zeros(3, requires_grad=True)},
    ),
    "one value": (ValueError, "more than 1 value for each", {"input": torch.ones(1, 3)}),
    "momentum": (TypeError, "momentum must be a number, got None", {"momentum": None}),
    "infinite momentum": (ValueError, "momentum must be finite", {"momentum": np.inf}),
    "eps": (ValueError, "eps.* must be finite and at least 0", {"eps": -1.0}),
    "negative var": (
        ValueError,
        "running_var.* must not be negative",
        {"running_var": -ONES, "training": False},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    error, message, changes = BAD[case]
    given = {"input": torch.arange(12.0).reshape(4, 3)}
    given |= {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "training": True}
    given |= changes
    tensor = isinstance(given["running_mean"], torch.Tensor)
    before = given["running_mean"].clone() if tensor else None
    with pytest.raises(error, match=message):
        batch_norm(**given)
    if tensor:
        assert torch.equal(given["running_mean"], before)


def test_transforms_are_refused():
    x = torch.from_numpy(normal((4, 3, 2), np.float64))

    def function(x):
        return batch_norm(x, None, None, training=True)

    with pytest.raises(RuntimeError, match=r"functorch transforms \(vmap, grad, jvp"):
        torch.func.vmap(function)(x)
    with pytest.raises(RuntimeError, match=r"functorch transforms \(vmap, grad, jvp"):
        torch.func.grad(lambda x: function(x).sum())(x)
