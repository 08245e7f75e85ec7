"""Layers of PyTorch and Keras become BatchNorm and back: same evaluation, same next steps."""

import os
from itertools import product

import numpy as np
import pytest

from bn_fast import BatchNorm

from .arrays import normal
from .judge import assert_same_bits

# Keras computes in float32, whatever its dtype, and E[x^2] - E[x]^2.
KERAS = {"rtol": 1e-5, "atol": 1e-5}

# Keras' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

os.environ.setdefault("KERAS_BACKEND", "torch")  # what is here anyway; a user's choice stands


def batches(shape=(30, 4), dtype=np.float64):
    return [3 + 2 * normal(shape, dtype, seed) for seed in range(6)]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def state_bits(layer):
    return list(layer.state_dict().values())


def evaluated(keras, layer, x, training):
    """Keras' layer on a float64 array: an ndarray it would take as float32."""
    return keras.ops.convert_to_numpy(
        layer(keras.ops.convert_to_tensor(x, x.dtype), training=training)
    )


class TestTorch:
    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch")

    def trained(self, torch, **settings):
        """In float64, with no number that is there by default."""
        module = torch.nn.BatchNorm1d(4, dtype=torch.float64, **settings)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.tensor(normal(4, np.float64, 9)))
        for x in batches()[:3]:
            module(torch.tensor(x))
        return module

    @pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"affine": False}, {"eps": 0.5}])
    def test_from_torch(self, torch, settings):
        module = self.trained(torch, **settings)
        layer = BatchNorm.from_torch(module)
        assert layer.dtype == np.float64
        assert layer.momentum == (None if "momentum" in settings else 0.9)
        for x in batches()[3:]:
            for training in (False, True, False):
                module.train(training)
                close(layer.forward(x, training), module(torch.tensor(x)).detach().numpy())
            close(layer.running_mean, module.running_mean.numpy())
            close(layer.running_var, module.running_var.numpy())
        assert layer.num_batches == int(module.num_batches_tracked) == 6

    def test_its_state_is_loaded_by_its_names(self, torch, tmp_path):
        """As tensors, or as arrays from a file; strictly or not, as PyTorch does."""
        module = self.trained(torch)
        expected = state_bits(BatchNorm.from_torch(module))
        arrays = {key: tensor.numpy() for key, tensor in module.state_dict().items()}
        np.savez(tmp_path / "state.npz", **arrays)
        for state in (module.state_dict(), arrays, np.load(tmp_path / "state.npz")):
            layer = BatchNorm(4, dtype=np.float64)
            gamma = layer.gamma
            assert layer.load_state_dict(state) == ([], [])
            assert layer.gamma is gamma
            assert_same_bits(state_bits(layer), expected)
        layer = BatchNorm(4, dtype=np.float64)
        part = {"weight": arrays["weight"], "scale": arrays["bias"], "bias": arrays["bias"][:3]}
        del arrays["weight"], arrays["bias"]
        with pytest.raises(ValueError, match="'gamma' is missing; 'beta' is missing"):
            layer.load_state_dict(arrays)
        with pytest.raises(ValueError, match=r"'bias' must have shape \(4,\)"):
            layer.load_state_dict(part, strict=False)
        with pytest.raises(ValueError, match=r"'bias' must be .*requires grad.*detach"):
            layer.load_state_dict({"bias": module.bias}, strict=False)
        assert_same_bits(state_bits(layer), state_bits(BatchNorm(4, dtype=np.float64)))
        del part["bias"]
        ours = layer.load_state_dict(part, strict=False)
        theirs = torch.nn.BatchNorm1d(4).load_state_dict(
            {key: torch.tensor(value) for key, value in part.items()}, strict=False
        )
        assert ours.unexpected_keys == theirs.unexpected_keys == ["scale"]
        names = {"gamma": "weight", "beta": "bias", "num_batches": "num_batches_tracked"}
        # PyTorch takes a missing num_batches_tracked for an old file's, and says nothing.
        assert {names.get(key, key) for key in ours.missing_keys} == {
            *theirs.missing_keys, "num_batches_tracked",
        }  # fmt: skip
        assert_same_bits([layer.gamma], [module.weight.detach().numpy()])

    def test_nothing_is_shared(self, torch):
        module = self.trained(torch)
        layer = BatchNorm.from_torch(module)
        before = [t.clone() for t in module.state_dict().values()]
        layer.forward(batches()[0])
        layer.gamma -= 1
        layer.running_mean[...] = 7
        assert all(map(torch.equal, before, module.state_dict().values()))

    @pytest.mark.parametrize("momentum", [0.1, 0.01, 0.3, 0.9, None, 0.0, 1.0])
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_round_trip(self, torch, dtype, momentum):
        dtype = getattr(torch, dtype)
        module = self.trained(torch, momentum=momentum, eps=1e-3).to(dtype)
        layer = BatchNorm.from_torch(module)
        other = torch.nn.BatchNorm2d(4, dtype=dtype)
        layer.to_torch(other)
        assert other.momentum == momentum
        assert other.eps == 1e-3
        assert all(map(torch.equal, module.state_dict().values(), other.state_dict().values()))
        assert_same_bits(state_bits(BatchNorm.from_torch(other)), state_bits(layer))

    def test_settings_may_differ(self, torch):
        layer = BatchNorm.from_torch(self.trained(torch), axis=-1, bad_batch="raise")
        assert layer.axis == -1
        assert layer.bad_batch == "raise"
        assert layer.ddof == 1

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_other_dtypes_become_float32(self, torch, dtype):
        module = self.trained(torch).to(getattr(torch, dtype))
        layer = BatchNorm.from_torch(module)
        assert layer.dtype == np.float32
        np.testing.assert_array_equal(layer.running_var, module.running_var.double().numpy())
        np.testing.assert_array_equal(layer.gamma, module.weight.detach().double().numpy())

    def test_affine_or_not(self, torch):
        plain = BatchNorm(4, affine=False)
        plain.forward(batches()[0])
        for affine in (True, False):
            module = torch.nn.BatchNorm1d(4, affine=affine).double()
            plain.to_torch(module)
            x = batches()[1]
            got = module.eval()(torch.tensor(x)).detach().numpy()
            close(got, plain.forward(x, training=False))
        layer = BatchNorm(4)
        layer.to_torch(module)  # gamma 1 and beta 0 are as good as none
        layer.beta += 1
        with pytest.raises(ValueError, match="module must have a shift, or beta"):
            layer.to_torch(module)
        layer.gamma += 1
        with pytest.raises(ValueError, match="module must have a scale, or gamma"):
            layer.to_torch(module)

    def test_what_does_not_fit_is_refused_and_stays(self, torch):
        untracked = torch.nn.BatchNorm1d(4, track_running_stats=False)
        with pytest.raises(ValueError, match=r"track_running_stats=False.*training=True"):
            BatchNorm.from_torch(untracked)
        with pytest.raises(ValueError, match="track_running_stats=False"):
            BatchNorm(4).to_torch(untracked)
        with pytest.raises(TypeError, match=r"module must be a torch.nn.BatchNorm1d.*got Linear"):
            BatchNorm.from_torch(torch.nn.Linear(3, 4))
        module = self.trained(torch)
        before = [t.clone() for t in module.state_dict().values()]
        with pytest.raises(ValueError, match="module must have 3 features, got 4"):
            BatchNorm(3).to_torch(module)
        assert all(map(torch.equal, before, module.state_dict().values()))

    @pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"])
    def test_every_batch_norm_is_one(self, torch, kind):
        module = getattr(torch.nn, kind)(4)
        layer = BatchNorm(4, momentum=0.5)
        layer.running_mean = [1, 2, 3, 4]
        layer.to_torch(module)
        assert_same_bits(state_bits(BatchNorm.from_torch(module)), state_bits(layer))

        class Lenient(type(module)):
            """Computes the same, of more shapes."""

            def _check_input_dim(self, input):
                pass

        assert_same_bits(state_bits(BatchNorm.from_torch(Lenient(4))), state_bits(BatchNorm(4)))

    def test_a_lazy_module_is_one_after_its_first_call(self, torch):
        module = torch.nn.LazyBatchNorm1d()
        with pytest.raises(TypeError, match=r"module must be a .*got LazyBatchNorm1d"):
            BatchNorm.from_torch(module)
        module(torch.tensor(batches()[0], dtype=torch.float32))
        assert BatchNorm.from_torch(module).num_batches == 1

    @pytest.mark.parametrize(
        "kind", ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "GroupNorm", "LayerNorm"]
    )
    def test_another_norm_is_refused(self, torch, kind):
        """An instance norm has all the attributes of a batch norm."""
        arguments = (2, 4) if kind == "GroupNorm" else (4,)
        more = {"affine": True, "track_running_stats": True} if kind[0] == "I" else {}
        module = getattr(torch.nn, kind)(*arguments, **more)
        for convert in (BatchNorm.from_torch, BatchNorm(4).to_torch):
            with pytest.raises(TypeError, match=f"module must be a torch.*BatchNorm.*got {kind}"):
                convert(module)

    def more_than_a_batch_norm(self, torch):
        class Activated(torch.nn.BatchNorm1d):
            def forward(self, input):
                return super().forward(input).relu()

        class Exponential(torch.nn.Module):
            def forward(self, weight):
                return weight.exp()

        patched, before, after, parametrized = (torch.nn.BatchNorm1d(4) for _ in range(4))
        patched.forward = lambda input: input
        before.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        after.register_forward_hook(lambda module, args, out: out.relu())
        torch.nn.utils.parametrize.register_parametrization(parametrized, "weight", Exponential())
        return {
            "got Activated, which has a forward of its own": Activated(4),
            "got BatchNorm1d, which has a forward of its own": patched,
            "got one with forward hooks": before,
            "got one with forward hooks ": after,
            "got one with 'parametrizations.weight.original' in its state": parametrized,
        }

    def test_what_does_more_is_refused(self, torch):
        for message, module in self.more_than_a_batch_norm(torch).items():
            for convert in (BatchNorm.from_torch, BatchNorm(4).to_torch):
                with pytest.raises(TypeError, match=f"that does nothing else, {message.strip()}"):
                    convert(module)

    def test_statistics_that_are_not_kept_or_not_there(self, torch):
        module = self.trained(torch)
        module.track_running_stats = False  # it evaluates with them, and trains without
        with pytest.raises(ValueError, match="track_running_stats=False"):
            BatchNorm.from_torch(module)
        module = torch.nn.BatchNorm1d(4, device="meta")
        for convert in (BatchNorm.from_torch, BatchNorm(4).to_torch):
            with pytest.raises(ValueError, match="got one on the meta device"):
                convert(module)

    @pytest.mark.parametrize(
        ("dtype", "name", "value"),
        [
            ("float16", "running_var", 1e9),
            ("float16", "running_var", 1e-9),
            ("float16", "running_mean", -7e4),
            ("float16", "weight", 1e5),
            ("bfloat16", "bias", 3.4e38),
            ("float32", "running_var", 1e39),
            ("float32", "num_batches_tracked", 2**40),
        ],
    )
    def test_what_the_module_cannot_hold_is_refused(self, torch, dtype, name, value):
        module = self.trained(torch).to(getattr(torch, dtype))
        module.num_batches_tracked = module.num_batches_tracked.to(torch.int32)
        before = [t.clone() for t in module.state_dict().values()]
        layer = BatchNorm(4, eps=0.25 if value == 1e9 else 1e-5)
        ours = {"weight": "gamma", "bias": "beta", "num_batches_tracked": "num_batches"}
        array = np.full(4, 0.5)
        array[2] = value
        setattr(layer, ours.get(name, name), value if isinstance(value, int) else array)
        at = "" if isinstance(value, int) else " at 2"
        message = rf"module's {name} must fit torch\.\w+, got .*{at}, which would be"
        with pytest.raises(ValueError, match=message):
            layer.to_torch(module)
        assert all(map(torch.equal, before, module.state_dict().values()))
        assert module.eps == 1e-5

    def test_a_variance_that_adds_nothing_to_eps_may_sink(self, torch):
        """That of a dead channel decays below every type's range."""
        layer = BatchNorm(4)
        layer.running_var = [0, 1e-46, 1, 2]
        layer.to_torch(torch.nn.BatchNorm1d(4))
        layer.eps = 0
        with pytest.raises(
            ValueError, match=r"running_var must fit torch\.float32, got 1e-46 at 1"
        ):
            layer.to_torch(torch.nn.BatchNorm1d(4))

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(
        ("name", "dims", "groups"),
        [("Linear", 0, 1), *product(["Conv", "ConvTranspose"], [1, 2, 3], [1, 2, 4])],
    )
    def test_every_layer_that_folds(self, torch, name, dims, groups, bias):
        """Folded and alone it gives what the layer and its norm give one after the other, in
        PyTorch's norm and in this."""
        if name == "Linear":
            # Square, so that only axis tells which are the output channels.
            theirs = torch.nn.Linear(4, 4, bias=bias).double()
            shape = (5, 4)
        else:
            kind = getattr(torch.nn, f"{name}{dims}d")
            theirs = kind(4, 4, (3, 2, 1)[:dims], stride=2, groups=groups, bias=bias).double()
            shape = (5, 4, 6, 7, 3)[: dims + 2]
        x = torch.tensor(normal(shape, np.float64))
        axis = 1 if name == "ConvTranspose" else 0
        with torch.no_grad():
            norm = self.trained(torch).eval()
            layer = BatchNorm.from_torch(norm)
            expected = layer.forward(theirs(x).numpy(), training=False)
            between = torch.movedim(theirs(x), 1, -1)
            close(
                torch.movedim(norm(between.reshape(-1, 4)).reshape(between.shape), -1, 1), expected
            )
            weight = theirs.weight.numpy()
            given = theirs.bias.numpy() if bias else None
            weight, offset = layer.fold_into(weight, given, axis=axis, groups=groups)
            theirs.weight.copy_(torch.tensor(weight))
            theirs.bias = torch.nn.Parameter(torch.tensor(offset))
            close(theirs(x).numpy(), expected)


class TestKeras:
    @pytest.fixture
    def keras(self):
        if os.environ["KERAS_BACKEND"] == "torch":
            pytest.importorskip("torch")
        return pytest.importorskip("keras")

    def trained(self, keras, shape=(30, 4), **settings):
        layer = keras.layers.BatchNormalization(dtype="float64", **settings)
        layer.build(shape)
        weights = layer.get_weights()
        layer.set_weights([normal(4, np.float64, 9) for _ in weights[:-2]] + weights[-2:])
        for x in batches(shape)[:3]:
            evaluated(keras, layer, x, True)
        return layer

    @pytest.mark.parametrize(
        ("shape", "settings"),
        [
            ((30, 4), {}),
            ((5, 3, 6, 4), {"momentum": 0.7}),
            ((5, 4, 3, 2), {"axis": 1, "epsilon": 0.5}),
            ((30, 4), {"scale": False}),
            ((30, 4), {"center": False}),
            ((30, 4), {"scale": False, "center": False}),
        ],
    )
    def test_from_keras(self, keras, shape, settings):
        theirs = self.trained(keras, shape, **settings)
        layer = BatchNorm.from_keras(theirs)
        assert layer.affine == (settings.get("scale", True) or settings.get("center", True))
        for x in batches(shape)[3:]:
            for training in (False, True, False):
                expected = evaluated(keras, theirs, x, training)
                np.testing.assert_allclose(layer.forward(x, training), expected, **KERAS)
            mean, var = theirs.get_weights()[-2:]
            np.testing.assert_allclose(layer.running_mean, mean, **KERAS)
            np.testing.assert_allclose(layer.running_var, var, **KERAS)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_round_trip(self, keras, dtype):
        theirs = keras.layers.BatchNormalization(momentum=0.7, epsilon=0.25, dtype=dtype)
        evaluated(keras, theirs, batches()[0].astype(dtype), True)
        layer = BatchNorm.from_keras(theirs)
        assert layer.dtype == dtype
        other = keras.layers.BatchNormalization(dtype=dtype)
        other.build((None, 4))
        layer.to_keras(other)
        assert (other.momentum, other.epsilon) == (0.7, 0.25)
        assert_same_bits(other.get_weights(), theirs.get_weights())
        assert_same_bits(state_bits(BatchNorm.from_keras(other)), state_bits(layer))

    def test_what_does_not_fit_is_refused_and_stays(self, keras):
        theirs = keras.layers.BatchNormalization(scale=False)
        with pytest.raises(ValueError, match="layer must be built"):
            BatchNorm.from_keras(theirs)
        theirs.build((None, 4))
        before = theirs.get_weights()
        layer = BatchNorm(4)
        layer.gamma += 1
        with pytest.raises(ValueError, match="layer must have a scale, or gamma"):
            layer.to_keras(theirs)
        with pytest.raises(ValueError, match="layer must have 3 features, got 4"):
            BatchNorm(3).to_keras(theirs)
        with pytest.raises(ValueError, match=r"cumulative average \(momentum=None\)"):
            BatchNorm(4, momentum=None).to_keras(theirs)
        assert_same_bits(theirs.get_weights(), before)
        renorm = keras.layers.BatchNormalization(renorm=True)
        renorm.build((None, 4))
        with pytest.raises(ValueError, match="renorm=True"):
            BatchNorm.from_keras(renorm)
        with pytest.raises(TypeError, match=r"layer must be a keras.layers.BatchNorm.*got Dense"):
            BatchNorm.from_keras(keras.layers.Dense(3))

    def test_what_does_more_is_refused(self, keras):
        class Activated(keras.layers.BatchNormalization):
            def call(self, inputs, training=None):
                return keras.ops.relu(super().call(inputs, training=training))

        class Named(keras.layers.BatchNormalization):
            """Computes the same."""

        theirs = Activated()
        theirs.build((None, 4))
        for convert in (BatchNorm.from_keras, BatchNorm(4).to_keras):
            with pytest.raises(TypeError, match="nothing else, got Activated, which has a call of"):
                convert(theirs)
        theirs = Named()
        theirs.build((None, 4))
        BatchNorm(4).to_keras(theirs)

    @pytest.mark.parametrize(("name", "value"), [("running_var", 1e-9), ("beta", 7e4)])
    def test_what_the_layer_cannot_hold_is_refused(self, keras, name, value):
        theirs = keras.layers.BatchNormalization(dtype="float16")
        theirs.build((None, 4))
        before = theirs.get_weights()
        layer = BatchNorm(4)
        setattr(layer, name, [1, 1, value, 1])
        with pytest.raises(ValueError, match=rf"layer's {name} must fit float16, got .* at 2"):
            layer.to_keras(theirs)
        assert_same_bits(theirs.get_weights(), before)

    @pytest.mark.parametrize(
        ("name", "arguments", "shape", "axis"),
        [
            ("Dense", (4,), (5, 4), -1),
            ("Conv1D", (4, 3), (5, 9, 4), -1),
            ("Conv2D", (4, 3), (5, 9, 8, 4), -1),
            ("Conv1DTranspose", (4, 3), (5, 9, 4), -2),
            ("Conv2DTranspose", (4, 3), (5, 6, 7, 4), -2),
        ],
    )
    def test_layers_that_fold(self, keras, name, arguments, shape, axis):
        theirs = getattr(keras.layers, name)(*arguments, dtype="float64")
        theirs.build(shape)
        x = keras.ops.convert_to_tensor(normal(shape, np.float64), "float64")
        between = keras.ops.convert_to_numpy(theirs(x))
        norm = self.trained(keras, between.shape)
        layer = BatchNorm.from_keras(norm)
        expected = layer.forward(between, training=False)
        np.testing.assert_allclose(evaluated(keras, norm, between, False), expected, **KERAS)
        theirs.set_weights(layer.fold_into(*theirs.get_weights(), axis=axis))
        np.testing.assert_allclose(keras.ops.convert_to_numpy(theirs(x)), expected, **KERAS)


def test_from_torch_to_keras():
    """The two conventions meet: one minus the momentum, names, eps."""
    torch, keras = pytest.importorskip("torch"), pytest.importorskip("keras")
    module = TestTorch().trained(torch, momentum=0.2)
    theirs = keras.layers.BatchNormalization(axis=1, dtype="float64")
    theirs.build((None, 4))
    BatchNorm.from_torch(module).to_keras(theirs)
    assert theirs.momentum == 0.8
    x = batches()[5]
    expected = module.eval()(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(evaluated(keras, theirs, x, False), expected, **KERAS)
