"""The other norms of bn_fast.torch stand in the place of torch.nn.functional's."""

import copy
import itertools

import numpy as np
import pytest

from .judge import check

pytest.importorskip("torch")

import torch
import torch.nn.functional as F

import bn_fast.torch as doors
from bn_fast import _torch_norms, norms, set_num_threads

from . import oracle
from .test_torch_door import FORMATS, saved

NAMES = ["layer_norm", "rms_norm", "group_norm", "instance_norm"]

# The arguments between input and parameters, and what they are for the oracle.
ARGUMENTS = {
    "layer_norm": ((4, 6), {"axis": (2, 3)}),
    "rms_norm": ((4, 6), {"axis": (2, 3)}),
    "group_norm": (3, {"axis": 1, "num_groups": 3}),
    "instance_norm": (None, {"axis": 1}),
}
SHAPE = (2, 6, 4, 6)


def call(name, module, x, *affine, argument=None, **options):
    """The norm of a module, here or PyTorch's."""
    given = (x,) if name == "instance_norm" else (x, argument or ARGUMENTS[name][0])
    parameters = dict(zip(("weight", "bias"), affine, strict=False))
    if name == "rms_norm":
        parameters.pop("bias", None)
        options.setdefault("eps", 1e-5)
    return getattr(module, name)(*given, **parameters, **options)


def tensors(name, shape=SHAPE, dtype=torch.float64, seed=0):
    """x, weight, bias (not of RMS norm) and dout."""
    generator = torch.Generator().manual_seed(seed)
    size = shape[2:] if name in NAMES[:2] else shape[1:2]
    sizes = [shape, size, size, shape]
    x, weight, bias, dout = (torch.randn(s, generator=generator, dtype=dtype) for s in sizes)
    affine = (1 + weight / 4,) if name == "rms_norm" else (1 + weight / 4, bias)
    return 3 + 2 * x, affine, dout


def run(name, module, x, affine, dout, **options):
    """Output and gradients."""
    leaves = [a.detach().requires_grad_() for a in (x, *affine)]
    y = call(name, module, *leaves, **options)
    y.backward(dout)
    return [y.detach(), *(a.grad for a in leaves)]


def assert_close(got, expected, eps=1e-12):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        error = (a.double() - b.double()).abs().max() if a.numel() else 0
        assert error <= eps * max(1, b.abs().max() if b.numel() else 0)


each = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("layout", FORMATS)
@each
def test_agrees_with_torch(name, layout):
    x, affine, dout = tensors(name)
    x, dout = FORMATS[layout](x), dout if layout == "expanded" else FORMATS[layout](dout)
    for n in range(len(affine) + 1):
        # PyTorch sums squares where channels come last
        expected = run(name, F, x.contiguous(), affine[:n], dout, eps=1e-3)
        assert_close(run(name, doors, x, affine[:n], dout, eps=1e-3), expected)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@each
def test_samples_of_torch(name, dtype, eps):
    """PyTorch's own (but for those with a negative eps, an error here), as it does them in float64:
    its float32 has a gradient for the weight of a row of one value."""
    pytest.importorskip("expecttest", reason="needs expecttest: pip install expecttest")
    methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (op,) = (op for op in methods.op_db if op.name == f"nn.functional.{name}")
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    usual = [s for s in samples if s.kwargs.get("eps", 1) >= 0]
    assert len(usual) >= 5

    def results(module, sample, dtype):
        def own(a):
            if not isinstance(a, torch.Tensor):
                return a
            return a.detach().to(dtype, copy=True).requires_grad_(a.requires_grad)

        sample = sample.transform(own)
        y = getattr(module, name)(sample.input, *sample.args, **sample.kwargs)
        given = [sample.input, *sample.args, *sample.kwargs.values()]
        given = [a for a in given if isinstance(a, torch.Tensor)]
        leaves = [a for a in given if a.requires_grad]
        dout = torch.linspace(-1, 2, y.numel(), dtype=dtype).reshape(y.shape)
        running = [a for a in given if not a.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, leaves, dout), *running]

    for sample in usual:
        expected = [a.to(dtype) for a in results(F, sample, torch.float64)]
        assert_close(results(doors, sample, dtype), expected, eps)
    for sample in samples:
        if sample not in usual:
            with pytest.raises(ValueError, match="eps must be finite and at least 0"):
                results(doors, sample, dtype)


@pytest.mark.parametrize("layout", ["contiguous", "features last", "sliced"])
@each
def test_float32_is_right_to_roundings(name, layout):
    """At an offset too, where PyTorch's is not."""
    x, affine, dout = tensors(name, dtype=torch.float32)
    x, dout = FORMATS[layout](x + 1e4), FORMATS[layout](dout)
    out, dx, *sums = (a.numpy() for a in run(name, doors, x, affine, dout))
    gamma, beta = (*(a.numpy() for a in affine), np.zeros(affine[0].shape))[:2]
    expected = oracle.norm(
        name.replace("_", ""), x.numpy(), gamma, beta, dout.numpy(), **ARGUMENTS[name][1]
    )
    check("out", out, expected[0], out)
    gradients = expected[3]
    check("dx", dx, gradients.dx, out)
    for kind, got in zip(("dgamma", "dbeta"), sums):
        check(kind, got, getattr(gradients, kind), out, scale=getattr(gradients, f"{kind}_scale"))
    assert torch.from_numpy(out).stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("parameters", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each
def test_half_is_storage(name, dtype, parameters):
    """The float32 call, rounded once; parameters of 32 bits or of the input's."""
    if dtype is torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    x, affine, dout = tensors(name, dtype=torch.float32)
    x, dout = x.to(dtype), dout.to(dtype)
    affine = [a.to(parameters or dtype) for a in affine]
    got = run(name, doors, x, affine, dout)
    wide = run(name, doors, x.float(), [a.float() for a in affine], dout.float())
    for a, b, like in zip(got, wide, (x, x, *affine)):
        assert a.dtype == like.dtype
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=0)


@each
def test_gradcheck(name):
    x, affine, _ = tensors(name, (2, 6, 2, 3) if name in NAMES[2:] else (3, 2, 4, 6))
    for n in range(len(affine) + 1):
        leaves = [a.requires_grad_() for a in (x, *affine[:n])]
        assert torch.autograd.gradcheck(lambda *given: call(name, doors, *given), leaves)


@each
def test_only_what_needs_a_gradient_gets_one(name, monkeypatch):
    x, affine, dout = tensors(name)
    expected = run(name, doors, x, affine, dout)
    asked = []
    backward = norms._backward

    def spy(norm, dout, cache, out, needs):
        asked.append(needs)
        return backward(norm, dout, cache, out, needs)

    monkeypatch.setattr(norms, "_backward", spy)
    for needed in itertools.product([False, True], repeat=1 + len(affine)):
        leaves = [a.detach().requires_grad_(n) for a, n in zip((x, *affine), needed)]
        y = call(name, doors, *leaves)
        assert torch.equal(y, expected[0])
        assert y.requires_grad == any(needed)
        if any(needed):
            y.backward(dout)
            assert asked.pop() == [n for n, is_needed in zip(NEEDS, needed) if is_needed]
        for leaf, gradient in zip(leaves, expected[1:]):
            assert torch.equal(leaf.grad, gradient) if leaf.requires_grad else leaf.grad is None


NEEDS = "dx", "dgamma", "dbeta"


@each
def test_the_tensors_are_read_in_place(name, monkeypatch):
    seen = []
    computed = norms._computed

    def spy(norm, given):
        seen.append((given, computed(norm, given)))
        return seen[-1][1]

    monkeypatch.setattr(norms, "_computed", spy)
    x, affine, _ = tensors(name, dtype=torch.float32)
    y = call(name, doors, x, *affine)
    ((given, (out, _)),) = seen
    arrays = [a for a in (given.x, given.gamma, given.beta, out) if a is not None]
    for array, tensor in zip(arrays, (x, *affine, y)):
        assert array.ctypes.data == tensor.data_ptr()


@each
def test_inputs_are_not_changed_and_a_changed_one_is_noticed(name):
    x, affine, dout = tensors(name)
    before = x.clone()
    run(name, doors, x, affine, dout)
    assert torch.equal(x, before)
    y = call(name, doors, x, affine[0].requires_grad_())
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each
def test_bits_do_not_depend_on_threads(name):
    given = tensors(name, (40, 6, 30, 30), torch.float32)
    argument = (30, 30) if name in NAMES[:2] else 2
    try:
        results = []
        for n in (1, 2, 5):
            set_num_threads(n)
            results.append(run(name, doors, *given, argument=argument))
    finally:
        set_num_threads(None)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rms_norm_without_eps(dtype):
    """PyTorch's is that of the dtype in which it computes."""
    x = (1e-4 * torch.randn(5, 8, dtype=torch.float64)).to(dtype)
    tolerance = {torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    got, expected = (m.rms_norm(x, (8,)) for m in (doors, F))
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)
    assert not torch.allclose(got, doors.rms_norm(x, (8,), eps=1e-5), rtol=1e-2)


@pytest.mark.parametrize("shape", [5, np.int64(5), (5,), [5], torch.Size([5])], ids=repr)
def test_normalized_shape(shape):
    x = tensors("layer_norm", (2, 3, 5))[0]
    for name in NAMES[:2]:
        got, expected = (getattr(m, name)(x, s) for m, s in ((doors, shape), (F, (5,))))
        assert_close([got], [expected])


# Running statistics


RUNNING = {"use_input_stats": True, "momentum": 0.3, "eps": 1e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [True, False])
def test_running_statistics(own, dtype):
    x, affine, dout = tensors("instance_norm")

    def results(module):
        running = torch.arange(6).to(dtype), torch.ones(6, dtype=dtype)
        options = RUNNING | dict(zip(("running_mean", "running_var"), running))
        options["use_input_stats"] = own
        return [*run("instance_norm", module, x, affine, dout, **options), *running]

    if dtype is torch.float64:
        assert_close(results(doors), results(F))
    else:  # which PyTorch refuses beside an x of float64
        mean, var = results(doors)[-2:]
        assert mean.dtype is var.dtype is torch.float32
        assert (var == 1).all() != own


def test_an_empty_batch_leaves_running_statistics():
    running = torch.zeros(6), torch.ones(6)
    y = doors.instance_norm(torch.ones(0, 6, 4), *running)
    assert y.shape == (0, 6, 4)
    assert torch.equal(torch.stack(running), torch.tensor([[0.0] * 6, [1.0] * 6]))


# Modules


class Block(torch.nn.Module):
    """With each of the norms, as a module."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.GroupNorm(2, 4),
            torch.nn.ReLU(),
            torch.nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            torch.nn.Flatten(),
            torch.nn.Linear(144, 5),
            torch.nn.LayerNorm(5),
            torch.nn.Linear(5, 6),
            torch.nn.RMSNorm(6, eps=1e-5),
        )

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def net(monkeypatch):
    torch.manual_seed(0)
    net = Block()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for name in NAMES:
        monkeypatch.setattr(F, name, getattr(doors, name))
    return net


def images(n, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def steps(net, compiled=lambda f: f):
    """What three steps of training make of a copy, and its output in test mode, after each."""
    net = copy.deepcopy(net).train().double()
    function = compiled(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    for seed in range(3):
        sgd.zero_grad()
        (function(images(4, seed).double()) ** 2).mean().backward()
        sgd.step()
    net.eval()
    return [function(images(4).double()).detach(), *net.state_dict().values()]


def test_it_serves_the_modules(net, monkeypatch):
    got = steps(net)
    monkeypatch.undo()
    torch.testing.assert_close(got, steps(net), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(net, backend):
    torch._dynamo.reset()
    got = steps(net, lambda f: torch.compile(f, backend=backend, fullgraph=True))
    torch.testing.assert_close(got, steps(net), rtol=1e-10, atol=1e-10)


GRAPHS = {
    "torch.jit.trace": lambda net, x, path: saved(torch.jit.trace(net, x), path),
    "torch.jit.script": lambda net, x, path: saved(torch.jit.script(net), path),
    "torch.export": lambda net, x, path: torch.export.export(net, (x,)).module(),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning")
@pytest.mark.parametrize("way", GRAPHS)
def test_what_is_written_down_has_pytorchs_own(net, way, tmp_path):
    x = images(2, 7)
    net.eval()
    written = GRAPHS[way](net, x, str(tmp_path / "net"))
    other = x.flip(0) + 1
    torch.testing.assert_close(written(other), net(other), rtol=1e-4, atol=1e-5)
    graph = getattr(written, "inlined_graph", getattr(written, "graph", ""))
    assert "bn_fast" not in str(graph)


def of_one_argument(name):
    return lambda x: call(name, doors, x)


@pytest.mark.parametrize("mode", ["real", "symbolic", "fx"])
def test_a_graph_of_calls_calls_it(mode, net):
    x, _, _ = tensors("layer_norm")
    for function in map(of_one_argument, NAMES):
        if mode == "fx":
            graph = torch.fx.symbolic_trace(function)
        else:
            make_fx = torch.fx.experimental.proxy_tensor.make_fx
            graph = make_fx(function, tracing_mode=mode)(x)
        assert "bn_fast" in graph.code
        assert_close([graph(x**2)], [function(x**2)])


def cubes(name, module):
    return lambda *given: (call(name, module, *given) ** 3).sum()


@each
def test_transforms(name):
    x, affine, dout = tensors(name)
    batch = torch.stack([x, x.flip(0) * 2, x**2])
    weights = torch.stack([affine[0], -affine[0], affine[0] ** 2])

    def results(module):
        function = cubes(name, module)
        every = tuple(range(1 + len(affine)))
        gradient = torch.func.grad(function, every)
        return [
            *gradient(x, *affine),
            torch.func.vmap(lambda x: call(name, module, x, *affine))(batch),
            torch.func.vmap(lambda w: call(name, module, x, w))(weights),
            *torch.func.vmap(gradient, (0, *[None] * len(affine)))(batch, *affine),
            torch.func.vjp(lambda x: call(name, module, x), x)[1](dout)[0],
        ]

    assert_close(results(doors), results(F), 1e-11)


LEAF = tensors("layer_norm")[0].requires_grad_()
REFUSED = {
    "second derivative": lambda f: torch.autograd.grad(
        torch.autograd.grad(f(LEAF), LEAF, create_graph=True)[0].sum(), LEAF
    ),
    "grad of grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(LEAF),
    "jvp": lambda f: torch.func.jvp(f, (LEAF,), (LEAF,)),
    "forward mode": lambda f: dual(f),
    "is_grads_batched": lambda f: torch.autograd.grad(
        f(LEAF).expand(1), LEAF, torch.ones(2, 1).double(), is_grads_batched=True
    ),
}


def dual(function):
    with torch.autograd.forward_ad.dual_level():
        x = LEAF.detach()
        return function(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("case", REFUSED)
@each
def test_what_is_not_there_is_said_in_a_sentence(name, case):
    message = rf"^bn_fast.torch.{name} (cannot|has no) .*torch.nn.functional.{name}"
    with pytest.raises((NotImplementedError, RuntimeError), match=message):
        REFUSED[case](cubes(name, doors))


@each
def test_a_graph_for_a_second_derivative_gives_the_first(name):
    x, affine, dout = tensors(name)
    leaves = [a.requires_grad_() for a in (x, *affine)]
    y = call(name, doors, *leaves)
    got = torch.autograd.grad(y, leaves, dout, create_graph=True)
    assert_close([a.detach() for a in got], run(name, doors, x, affine, dout)[1:])


@pytest.mark.parametrize("layout", FORMATS)
@each
def test_the_operators_are_what_they_say(name, layout):
    """In shapes, dtypes and strides, which a compiled graph counts on; they change nothing."""
    x, affine, dout = tensors(name, dtype=torch.float32)
    x, dout = FORMATS[layout](x), FORMATS[layout](dout)
    number = {"group_norm": 3, "instance_norm": 0}.get(name, 2)
    rest = name.replace("_", ""), number, 1e-5
    weight, bias = (*affine, None)[:2]
    stats = _torch_norms._norm_op(x, weight, bias, *rest)[1]
    for op, args in [
        (_torch_norms._norm_op, (x, weight, bias, *rest)),
        (_torch_norms._norm_op, (x, None, None, *rest)),
        (_torch_norms._norm_backward_op, (dout, x, weight, stats, bias is not None, *rest)),
        (_torch_norms._norm_backward_op, (dout, x, None, stats, False, *rest)),
    ]:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for got, said in zip(op(*args), fake):
            assert (got.shape, got.dtype, got.stride()) == (said.shape, said.dtype, said.stride())


# Errors


X = torch.ones(2, 6, 4)
FOUR, SIX = torch.ones(4), torch.ones(6)
BAD = [
    ("layer_norm", ([[1.0]], 1), TypeError, "input must be a torch.Tensor, got list"),
    ("layer_norm", (X.long(), 4), TypeError, "input must be a tensor of .*got torch.int64"),
    ("layer_norm", (X.to("meta"), 4), TypeError, "on the CPU, got one on meta"),
    ("layer_norm", (X, (6,)), ValueError, r"normalized_shape must .*\(6,\) for input \(2, 6, 4\)"),
    ("layer_norm", (X, (1, 2, 6, 4)), ValueError, "normalized_shape must be the shape of input's"),
    ("layer_norm", (X, ()), ValueError, r"normalized_shape must have 1 or more .*got \(\)"),
    ("layer_norm", (X, 4.0), TypeError, "normalized_shape must be .*integers.* got float 4.0"),
    ("layer_norm", (X, (4.0,)), TypeError, "normalized_shape must be .*integers"),
    ("layer_norm", (X, 4, SIX), ValueError, r"weight must have shape \(4,\).*got \(6,\)"),
    ("layer_norm", (X, 4, None, SIX), ValueError, r"bias must have shape \(4,\).*got \(6,\)"),
    ("layer_norm", (X, 4, [1.0] * 4), TypeError, "weight must be a torch.Tensor, got list"),
    ("layer_norm", (X, 4, None, None, -1.0), ValueError, "eps must be finite and at least 0"),
    ("layer_norm", (X, 4, None, None, None), TypeError, "eps must be a real number, got None"),
    ("rms_norm", (X, 6), ValueError, "normalized_shape must"),
    ("rms_norm", (X, 4, SIX), ValueError, r"weight must have shape \(4,\)"),
    ("rms_norm", (X, 4, None, "1"), TypeError, "eps must be a real number"),
    ("group_norm", (SIX, 2), ValueError, r"input must have 2 or more .*got shape \(6,\)"),
    *(("group_norm", (X, g), ValueError, f"num_groups must be .* divide the 6 channels.* got {g}")
      for g in (0, -1, 4)),
    ("group_norm", (X, 2.0), TypeError, "num_groups must be an integer, got float 2.0"),
    ("group_norm", (X, True), TypeError, "num_groups must be an integer, got bool True"),
    ("group_norm", (X, 2, FOUR), ValueError, r"weight must have shape \(6,\), one value for each"),
    ("group_norm", (torch.ones(1, 6), 6), ValueError, r"more than 1 value .*got shape \(1, 6\)"),
    ("instance_norm", (SIX,), ValueError, "input must have 2 or more dimensions"),
    ("instance_norm", (X[:, :, :1],), ValueError, r"more than 1 spatial element.*\(2, 6, 1\)"),
    ("instance_norm", (X[:, :, 0],), ValueError, r"more than 1 spatial element.*\(2, 6\)"),
    ("instance_norm", (X, SIX), ValueError, "must both be given or both be None, got running_var"),
    ("instance_norm", (X, None, None, None, None, False), ValueError,
     "running_mean and running_var must be given with use_input_stats=False, got running_mean"),
    ("instance_norm", (X, FOUR, FOUR), ValueError, r"running_mean must have shape \(6,\)"),
    ("instance_norm", (X, -SIX, -SIX, None, None, False), ValueError, "running_var must not be"),
    ("instance_norm", (X, SIX, SIX.clone().requires_grad_()), ValueError, "must not require a"),
    ("instance_norm", (X, None, None, None, None, True, None), TypeError, "momentum must be a"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "error", "message"), BAD)
def test_bad_arguments(name, given, error, message):
    with pytest.raises(error, match=f"(?s)^.*{message}"):
        getattr(doors, name)(*given)
