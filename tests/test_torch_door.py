"""bn_fast.torch stands in the place of torch.nn.functional.batch_norm."""

import copy
import shutil

import numpy as np
import pytest

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
    import bn_fast._torch_batch as door

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
    import bn_fast._torch_batch as door

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


@pytest.mark.parametrize("momentum", [np.float32(0.25), torch.tensor(0.25), np.array(0.25), 1])
def test_momentum_may_be_any_number(momentum):
    x, mean, var, *_ = tensors((9, 3), torch.float64)
    expected = mean.clone(), var.clone()
    batch_norm(x, mean, var, training=True, momentum=momentum)
    F.batch_norm(x, *expected, training=True, momentum=float(momentum))
    torch.testing.assert_close((mean, var), expected)


@pytest.mark.parametrize("training", [True, False])
def test_statistics_may_be_parameters_where_no_gradient_is_recorded(training):
    x, mean, var, *_ = tensors((9, 3), torch.float64)
    expected = mean.clone(), var.clone()
    mean, var = torch.nn.Parameter(mean), torch.nn.Parameter(var)
    with torch.no_grad():
        y = batch_norm(x, mean, var, training=training)
    torch.testing.assert_close(y, F.batch_norm(x, *expected, training=training))
    torch.testing.assert_close((mean.detach(), var.detach()), expected)


@pytest.mark.parametrize("shape", [(2, 0), (0, 0), (2, 0, 3), (1, 0, 2), (0, 0, 2)])
def test_no_channels(shape):
    for training in (True, False):
        x = torch.zeros(shape, requires_grad=True)
        y = batch_norm(x, torch.zeros(0), torch.ones(0), training=training)
        assert y.shape == F.batch_norm(x, torch.zeros(0), torch.ones(0), training=training).shape
        y.sum().backward()
        assert x.grad.shape == shape
    with pytest.raises(ValueError, match="more than 1 value"):
        batch_norm(torch.zeros(1, 0), None, None, training=True)


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
    "momentum": (TypeError, "momentum must be a real number, got None", {"momentum": None}),
    "infinite momentum": (ValueError, "momentum must be finite", {"momentum": np.inf}),
    "huge momentum": (ValueError, "momentum must be in the range of", {"momentum": 10**400}),
    "eps": (ValueError, "^eps must be finite and at least 0", {"eps": -1.0}),
    "eps of a kind": (TypeError, "^eps must be a real number", {"eps": None}),
    "negative var": (
        ValueError,
        "^running_var must not be negative, got -1.0 for feature 0",
        {"running_var": -ONES, "training": False},
    ),
    "negative var in half": (
        ValueError,
        "^running_var must not be negative, got -1.0 for feature 0",
        {"running_var": -ONES.half()},
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


# -- transforms, compilation, graphs: the rows of the table in docs/conventions.md


@pytest.fixture
def net(monkeypatch):
    """A network behind the door, in test mode, with no number that is there by default."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(144, 5),
        torch.nn.BatchNorm1d(5),
    )
    for _ in range(3):
        F.mse_loss(net(images(8)), torch.zeros(8, 5)).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    monkeypatch.setattr(F, "batch_norm", batch_norm)
    return net.eval()


def images(n, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


X, MEAN, VAR, WEIGHT, BIAS, _ = tensors((6, 3), torch.float64)
BATCH = torch.stack([X, X.flip(0) * 2, X**2, -X])
WEIGHTS = torch.stack([WEIGHT, 2 * WEIGHT, -WEIGHT, 0 * WEIGHT])


def cubes(function, training=True):
    running = (None, None) if training else (MEAN, VAR)
    return lambda x, weight, bias: (function(x, *running, weight, bias, training) ** 3).sum()


def with_running(function, batched):
    """The output of a batch of calls, or a gradient, and the running statistics after it."""
    size = (4,) if batched else ()
    mean, var = MEAN.expand(*size, 3).clone(), VAR.expand(*size, 3).clone()

    def out(x, mean, var):
        return function(x, mean, var, WEIGHT, BIAS, True)

    if batched:
        return torch.func.vmap(out)(BATCH, mean, var), mean, var
    return torch.func.grad(lambda x: (out(x, mean, var) ** 3).sum())(X), mean, var


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(cubes(f), (0, 1, 2))(X, WEIGHT, BIAS),
    "grad, frozen": lambda f: torch.func.grad(cubes(f, False), (0, 1, 2))(X, WEIGHT, BIAS),
    "grad, running statistics": lambda f: with_running(f, False),
    "grad of grad": lambda f: torch.func.grad(
        lambda *a: sum((g**2).sum() for g in torch.func.grad(cubes(f), (0, 1, 2))(*a)), (0, 1)
    )(X, WEIGHT, BIAS),
    "grad of grad, without weight": lambda f: torch.func.grad(
        lambda x: (
            torch.func.grad(lambda x: (f(x, None, None, None, BIAS, True) ** 3).sum())(x) ** 2
        ).sum()
    )(X),
    "vjp": lambda f: torch.func.vjp(cubes(f), X, WEIGHT, BIAS)[1](torch.tensor(2.0).double()),
    "jacrev": lambda f: torch.func.jacrev(lambda x: f(x, MEAN, VAR, WEIGHT))(X),
    "jacrev of jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(cubes(f)))(X, WEIGHT, BIAS),
    "vmap": lambda f: torch.func.vmap(lambda x: f(x, None, None, WEIGHT, BIAS, True))(BATCH),
    "vmap, frozen": lambda f: torch.func.vmap(lambda x: f(x, MEAN, VAR))(BATCH),
    "vmap, another axis": lambda f: torch.func.vmap(
        lambda x, w: f(x, None, None, w, BIAS, True), in_dims=(1, 0), out_dims=2
    )(BATCH.transpose(0, 1), WEIGHTS),
    "vmap, weight alone": lambda f: torch.func.vmap(lambda w: f(X, None, None, w, BIAS, True))(
        WEIGHTS
    ),
    "vmap, running statistics": lambda f: with_running(f, True),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(cubes(f), (0, 1)), (0, 0, None))(
        BATCH, WEIGHTS, BIAS
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform):
    got, expected = (TRANSFORMS[transform](f) for f in (batch_norm, F.batch_norm))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_functional_call(net):
    x = images(6)
    state = dict(net.named_parameters()), dict(net.named_buffers())
    assert torch.equal(torch.func.functional_call(net, state, x), net(x))

    def loss(parameters):
        return (torch.func.functional_call(net, (parameters, state[1]), x) ** 2).sum()

    got = torch.func.grad(loss)(state[0])
    (net(x) ** 2).sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


def dual(function):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(X, X))


def out(x):
    return batch_norm(x, None, None, WEIGHT, BIAS, True)


REFUSED = {
    "jvp": lambda: torch.func.jvp(out, (X,), (X,)),
    "jacfwd": lambda: torch.func.jacfwd(out)(X),
    "hessian": lambda: torch.func.hessian(cubes(batch_norm))(X, WEIGHT, BIAS),
    "forward mode": lambda: dual(out),
    "vmap, one running statistic for all": lambda: torch.func.vmap(
        lambda x: batch_norm(x, MEAN.clone(), VAR.clone(), training=True)
    )(BATCH),
    "is_grads_batched": lambda: torch.autograd.grad(
        out(LEAF), LEAF, torch.stack([X, X]), is_grads_batched=True
    ),
    "third derivative": lambda: torch.func.grad(
        lambda x: torch.func.grad(
            lambda x: torch.func.grad(cubes(batch_norm))(x, WEIGHT, BIAS)[0, 0]
        )(x)[0, 0]
    )(X),
}
LEAF = X.clone().requires_grad_()


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_there_is_said_in_a_sentence(case):
    message = r"^bn_fast.torch(.batch_norm)? (cannot|has no) .*"
    if case != "third derivative":
        message += "(torch.nn.functional.batch_norm|or None)"
    with pytest.raises((NotImplementedError, RuntimeError), match=message):
        REFUSED[case]()


def steps(net, compiled, dtype, memory_format):
    """What three steps of training make of a copy, and its output in test mode, after each."""
    net = copy.deepcopy(net).train().to(dtype).to(memory_format=memory_format)
    function = compiled(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    for seed in range(3):  # of several sizes
        x = images(4 + seed, seed).to(dtype).to(memory_format=memory_format)
        sgd.zero_grad()
        (function(x) ** 2).mean().backward()
        sgd.step()
    net.eval()
    return [function(x).detach(), *net.state_dict().values()]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(net, backend, memory_format):
    torch._dynamo.reset()
    got, expected = (
        steps(net, compiled, torch.float64, memory_format)
        for compiled in (lambda f: torch.compile(f, backend=backend, fullgraph=True), lambda f: f)
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a compiler")
def test_compiled_with_the_default_back_end(net):
    torch._dynamo.reset()
    got, expected = (
        steps(net, compiled, torch.float64, torch.channels_last)
        for compiled in (lambda f: torch.compile(f, fullgraph=True, dynamic=True), lambda f: f)
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_transforms_within_a_compiled_function():
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(cubes(batch_norm)), backend="eager")
    expected = torch.func.grad(cubes(F.batch_norm))(X, WEIGHT, BIAS)
    torch.testing.assert_close(compiled(X, WEIGHT, BIAS), expected, rtol=1e-10, atol=1e-10)
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(cubes(batch_norm)), backend="eager", fullgraph=True)
    message = r"bn_fast.torch.batch_norm cannot be compiled .* fullgraph=True, or"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        compiled(X, WEIGHT, BIAS)


def test_errors_within_a_compiled_function():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: batch_norm(x, None, None), backend="eager")
    with pytest.raises(ValueError, match="given with training=False, got running_mean=None"):
        compiled(X)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic", "fx"])
def test_a_graph_of_calls_calls_it(mode):
    if mode == "fx":
        graph = torch.fx.symbolic_trace(lambda x: batch_norm(x, None, None, training=True))
    else:
        make_fx = torch.fx.experimental.proxy_tensor.make_fx
        graph = make_fx(lambda x: batch_norm(x, None, None, training=True), tracing_mode=mode)(X)
    assert "bn_fast" in graph.code
    x = X**2 + 1  # not what it was made with
    torch.testing.assert_close(graph(x), F.batch_norm(x, None, None, training=True))


# In whose results NumPy and PyTorch choose other strides.
MIXED = {"features last, expanded": lambda x: FORMATS["features last"](x)[:1].expand(x.shape)}


@pytest.mark.parametrize("layout", FORMATS | MIXED)
@pytest.mark.parametrize("training", [True, False])
def test_the_operators_are_what_they_say(layout, training):
    """In shapes, dtypes and strides, which a compiled graph counts on; they change nothing."""
    import bn_fast._torch_batch as door

    x, mean, var, weight, bias, dout = tensors((4, 3, 5, 6), torch.float32)
    x, dout = ((FORMATS | MIXED)[layout](a) for a in (x, dout))
    stats = door._forward_op(x, weight, bias, mean, var, training, 0.1, 1e-5)[1]
    rest = dout, x, weight, stats, 1e-5, not training
    for op, args in [
        (door._forward_op, (x, weight, bias, mean, var, training, 0.1, 1e-5)),
        (door._forward_op, (x, None, None, None, None, True, 0.1, 1e-5)),
        (door._backward_op, rest),
        (door._double_backward_op, (dout, weight, bias, *rest)),
        (door.replace, (mean, var)),
    ]:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for got, said in zip(op(*args) or (), fake or ()):
            assert (got.shape, got.dtype, got.stride()) == (said.shape, said.dtype, said.stride())


def test_modes_see_one_operator():
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    with Mode():
        y = batch_norm(X, MEAN, VAR, WEIGHT, BIAS)
    assert torch.equal(y, batch_norm(X, MEAN, VAR, WEIGHT, BIAS))
    assert seen == ["bn_fast::batch_norm"]
    with torch._subclasses.FakeTensorMode() as mode:
        y = batch_norm(mode.from_tensor(X), None, None, training=True)
    assert y.shape == X.shape


def exported(net, x, path):
    return torch.export.export(net, (x,)).module()


def saved(scripted, path):
    torch.jit.save(scripted, path)
    return torch.jit.load(path)


def onnx(net, x, path, dynamo):
    reference = pytest.importorskip("onnx.reference")
    if dynamo:
        pytest.importorskip("onnxscript")
    torch.onnx.export(net, (x,), path, dynamo=dynamo, verbose=False)
    evaluator = reference.ReferenceEvaluator(path)
    kinds = {node.op_type for node in evaluator.proto_.graph.node}
    assert "BatchNormalization" in kinds
    (name,) = evaluator.input_names
    return lambda x: torch.from_numpy(evaluator.run(None, {name: x.numpy()})[0])


GRAPHS = {
    "torch.jit.trace": lambda net, x, path: saved(torch.jit.trace(net, x), path),
    "torch.jit.script": lambda net, x, path: saved(torch.jit.script(net), path),
    "torch.export": exported,
    "torch.onnx.export, dynamo=False": lambda *a: onnx(*a, False),
    "torch.onnx.export, dynamo=True": lambda *a: onnx(*a, True),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning")
@pytest.mark.parametrize("way", GRAPHS)
def test_what_is_written_down_has_pytorchs_own(net, way, tmp_path):
    """And no constant in its place: other images than the example's are other numbers."""
    x = images(2, 7)
    if "onnx" in way:  # which would fold the first norm into the convolution
        x, net = net[0](x).detach(), net[1:].eval()
    written = GRAPHS[way](net, x, str(tmp_path / "net"))
    other = x.flip(0) + 1
    torch.testing.assert_close(written(other), net(other), rtol=1e-4, atol=1e-5)
    graph = getattr(written, "inlined_graph", getattr(written, "graph", ""))
    assert "bn_fast" not in str(graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_trains(net):
    scripted = torch.jit.script(copy.deepcopy(net).train())
    net.train()
    for seed in range(3):
        torch.testing.assert_close(scripted(images(4, seed)), net(images(4, seed)))
    for a, b in zip(scripted.buffers(), net.buffers()):
        torch.testing.assert_close(a, b)
