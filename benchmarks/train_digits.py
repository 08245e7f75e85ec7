"""Train a residual network on scikit-learn's digits, with NumPy's norm and with bn_fast's.

    h = relu(norm(x W0))                            a hidden layer
    h = relu(norm(relu(norm(h W1)) W2) + h)         a residual block
    scores = h W3 + b

in plain NumPy and float64, with softmax and stochastic gradient descent with momentum. Each relu
and the sum are done by a batch norm before them, as its options, forward and backward. Group and
instance norm see a layer's outputs as channels of 16 places. Two networks that differ in nothing
but who computes the norm start from the same seed and see the same batches. Their losses must agree
to 1e-9 at every step, and both must classify 96 % of the held-out images. The exit status is 1 if
one of these fails.
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import bn_fast
from bn_fast import reference

try:
    import matplotlib
    from rich.progress import track
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from threadpoolctl import threadpool_limits
except ImportError:
    sys.exit("train_digits.py needs scikit-learn, matplotlib and rich: pip install -e '.[bench]'")

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt

LEARNING_RATE = 0.05
MOMENTUM = 0.9
LEAST_ACCURACY = 0.96
LARGEST_DIFFERENCE = 1e-9
PLACES = 16  # of a channel, for the norms that have some


class Norm:
    """A hidden layer's norm, relu and sum, as functions of a module: bn_fast or its reference.

    Batch norm: relu and sum are its options.
    """

    def __init__(self, module: Any):
        self.module = module
        self.seconds = 0.0

    def size(self, width: int) -> int:
        """Of gamma and beta."""
        return width

    def timed(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **options)
        self.seconds += time.perf_counter() - start
        return result

    def forward(
        self,
        x: np.ndarray,
        gamma: np.ndarray,
        beta: np.ndarray,
        bn_param: dict[str, Any],
        residual: np.ndarray | None,
    ) -> tuple[np.ndarray, Any]:
        return self.timed(
            self.module.batchnorm_forward,
            x,
            gamma,
            beta,
            bn_param,
            activation="relu",
            residual=residual,
        )

    def backward(self, dout: np.ndarray, cache: Any) -> Any:
        """dx, dgamma, dbeta, and dresidual if there was one."""
        return self.timed(self.module.batchnorm_backward, dout, cache)


class NormOfRows(Norm):
    """Layer norm, as the course's."""

    name = "layernorm"

    def arguments(self, gamma: np.ndarray, beta: np.ndarray) -> tuple[Any, ...]:
        return gamma, beta

    def cut(self, x: np.ndarray) -> np.ndarray:
        return x

    def forward(
        self,
        x: np.ndarray,
        gamma: np.ndarray,
        beta: np.ndarray,
        bn_param: dict[str, Any],
        residual: np.ndarray | None,
    ) -> tuple[np.ndarray, Any]:
        function = getattr(self.module, f"{self.name}_forward")
        y, cache = self.timed(function, self.cut(x), *self.arguments(gamma, beta))
        y = y.reshape(x.shape)
        if residual is not None:
            y = y + residual
        return np.maximum(y, 0), (cache, y > 0, residual is not None)

    def backward(self, dout: np.ndarray, cache: Any) -> Any:
        cache, is_positive, had_residual = cache
        dout = dout * is_positive
        function = getattr(self.module, f"{self.name}_backward")
        dx, dgamma, *rest = self.timed(function, self.cut(dout), cache)
        dbeta = rest[0] if rest else np.zeros_like(dgamma)
        return dx.reshape(dout.shape), dgamma, dbeta, *[dout] * had_residual


class RMSNorm(NormOfRows):
    """There is no beta."""

    name = "rmsnorm"

    def arguments(self, gamma: np.ndarray, beta: np.ndarray) -> tuple[Any, ...]:
        return (gamma,)


class InstanceNorm(NormOfRows):
    """Of channels of 16 places."""

    name = "instancenorm"

    def size(self, width: int) -> int:
        return width // PLACES

    def cut(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1, PLACES)


class GroupNorm(InstanceNorm):
    """Of groups of two channels."""

    name = "groupnorm"

    def arguments(self, gamma: np.ndarray, beta: np.ndarray) -> tuple[Any, ...]:
        return gamma, beta, len(gamma) // 2


NORMS: dict[str, type[Norm]] = {
    "batch": Norm,
    "layer": NormOfRows,
    "group": GroupNorm,
    "instance": InstanceNorm,
    "rms": RMSNorm,
}


class Network:
    """A multi-layer perceptron whose hidden layers are normalized by `norm`.

    outputs[0] is x and outputs[i + 1] that of layer i. To what layer i normalizes it adds
    outputs[skips[i]].
    """

    skips: ClassVar = {2: 1}

    def __init__(self, norm: Norm, widths: list[int], seed: int):
        rng = np.random.default_rng(seed)
        self.norm = norm
        self.step_seconds = 0.0
        self.losses: list[float] = []
        self.params: dict[str, np.ndarray] = {}
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            self.params[f"weight{i}"] = rng.normal(0, np.sqrt(2 / n_in), (n_in, n_out))
            self.params[f"gamma{i}"] = np.ones(norm.size(n_out))
            self.params[f"beta{i}"] = np.zeros(norm.size(n_out))
        self.last = len(widths) - 2  # the output layer: its beta is the bias, its gamma is unused
        self.params[f"beta{self.last}"] = np.zeros(widths[-1])
        self.bn_params: list[dict[str, Any]] = [{"mode": "train"} for _ in range(self.last)]
        self.velocities = {name: np.zeros_like(value) for name, value in self.params.items()}

    def forward(self, x: np.ndarray, mode: str) -> tuple[np.ndarray, list[np.ndarray], list[Any]]:
        """The scores of each class; the outputs and the caches of the layers."""
        outputs, caches = [x], []
        for i, bn_param in enumerate(self.bn_params):
            bn_param["mode"] = mode
            y, cache = self.norm.forward(
                outputs[i] @ self.params[f"weight{i}"],
                self.params[f"gamma{i}"],
                self.params[f"beta{i}"],
                bn_param,
                outputs[self.skips[i]] if i in self.skips else None,
            )
            outputs.append(y)
            caches.append(cache)
        scores = outputs[-1] @ self.params[f"weight{self.last}"] + self.params[f"beta{self.last}"]
        return scores, outputs, caches

    def train_step(self, x: np.ndarray, labels: np.ndarray) -> None:
        """One step of descent on the mean cross-entropy of a batch."""
        scores, outputs, caches = self.forward(x, "train")
        scores -= scores.max(axis=1, keepdims=True)
        log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        rows = np.arange(len(x))
        self.losses.append(float(-log_p[rows, labels].mean()))

        dscores = np.exp(log_p)
        dscores[rows, labels] -= 1
        dscores /= len(x)
        gradients = {
            f"weight{self.last}": outputs[-1].T @ dscores,
            f"beta{self.last}": dscores.sum(axis=0),
        }
        douts: list[Any] = [0.0] * len(outputs)  # what has come back to each output
        douts[-1] = dscores @ self.params[f"weight{self.last}"].T
        for i in reversed(range(self.last)):
            dlinear, gradients[f"gamma{i}"], gradients[f"beta{i}"], *dresidual = self.norm.backward(
                douts[i + 1], caches[i]
            )
            if i in self.skips:
                douts[self.skips[i]] += dresidual[0]
            gradients[f"weight{i}"] = outputs[i].T @ dlinear
            douts[i] += dlinear @ self.params[f"weight{i}"].T
        for name, gradient in gradients.items():
            self.velocities[name] = MOMENTUM * self.velocities[name] - LEARNING_RATE * gradient
            self.params[name] += self.velocities[name]

    def accuracy(self, x: np.ndarray, labels: np.ndarray) -> float:
        scores, *_ = self.forward(x, "test")
        return float((scores.argmax(axis=1) == labels).mean())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--norm", choices=NORMS, default="batch", help="default: batch")
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--batch", type=int, default=128, help="images of a step, default: 128")
    parser.add_argument("--width", type=int, default=256, help="of hidden layers, default: 256")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--picture", type=Path, default=Path("train_digits.png"), help="default: train_digits.png"
    )
    options = parser.parse_args()
    if min(options.epochs, options.batch, options.width) < 1:
        parser.error("--epochs, --batch and --width must be at least 1")
    if options.norm in ("group", "instance") and options.width % (2 * PLACES):
        parser.error(f"--width must be a multiple of {2 * PLACES} for --norm {options.norm}")

    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        images / 16, labels, test_size=0.2, random_state=options.seed, stratify=labels
    )
    if options.batch > len(x_train):
        parser.error(f"--batch must be at most {len(x_train)}, the number of training images")
    widths = [images.shape[1], *[options.width] * 3, 10]
    networks = {
        name: Network(NORMS[options.norm](module), widths, options.seed)
        for name, module in (("NumPy reference", reference), ("bn_fast", bn_fast))
    }
    rng = np.random.default_rng(options.seed)
    print(f"{len(x_train)} images, {options.epochs} epochs, batches of {options.batch},", end=" ")
    print(f"a hidden layer and a residual block of {options.width}")
    # One thread multiplies matrices this small, so that no idle worker of BLAS keeps a core from
    # whatever is timed.
    with threadpool_limits(1, "blas"):
        for _ in track(range(options.epochs), description="training both networks"):
            order = rng.permutation(len(x_train))
            # An epoch each, in turn: a busy moment of the machine meets both. The last batch would
            # be smaller, and is left out.
            for network in networks.values():
                begin = time.perf_counter()
                for start in range(0, len(order) - options.batch + 1, options.batch):
                    chosen = order[start : start + options.batch]
                    network.train_step(x_train[chosen], y_train[chosen])
                network.step_seconds += time.perf_counter() - begin
    spent = {name: network.norm.seconds for name, network in networks.items()}
    ours, theirs = (np.array(networks[name].losses) for name in ("bn_fast", "NumPy reference"))
    difference = float(np.abs(ours - theirs).max())

    checks = []
    for name, network in networks.items():
        accuracy = network.accuracy(x_test, y_test)
        ok = accuracy >= LEAST_ACCURACY
        checks.append(ok)
        print(f"test accuracy, {name + ':':<18} {accuracy:.2%}  {verdict(ok)}")
    checks.append(difference < LARGEST_DIFFERENCE)
    print(f"largest difference of the losses:  {difference:.1e} over {len(ours)} steps", end="")
    print(f"  {verdict(checks[-1])}")
    for name, seconds in spent.items():
        whole = networks[name].step_seconds
        print(f"time in {options.norm} norm, {name + ':':<15}{seconds * 1e3:7.1f} ms", end="")
        print(f" of {whole * 1e3:.1f}: {seconds / whole:.0%} of a step")
    print(f"ratio: {spent['NumPy reference'] / spent['bn_fast']:.1f}")
    draw(networks, ours - theirs, options.norm).savefig(options.picture, dpi=150)
    print(f"loss curves: {options.picture}")
    return 0 if all(checks) else 1


def verdict(ok: bool) -> str:
    return "ok" if ok else "FAILED"


def draw(networks: dict[str, Network], difference: np.ndarray, norm: str) -> Any:
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    styles = {
        "NumPy reference": {"color": "#f77f00", "linewidth": 4, "alpha": 0.6},
        "bn_fast": {"color": "#1d3557", "linewidth": 1},
    }
    for name, network in networks.items():
        above.semilogy(network.losses, label=name, **styles[name])
    above.set_ylabel("training loss (cross-entropy)")
    above.set_title(f"scikit-learn's digits: one residual network, two {norm} norms, the same seed")
    above.legend()
    # An exact 0 has no logarithm: it is drawn at the lowest rounding.
    below.semilogy(np.maximum(np.abs(difference), 1e-18), color="#1d3557", linewidth=1)
    below.axhline(LARGEST_DIFFERENCE, color="#c1121f", linestyle="--", label="allowed")
    below.set_ylabel("|difference|")
    below.set_xlabel("step")
    below.legend()
    for axes in (above, below):
        axes.grid(color="#dddddd")
    return figure


if __name__ == "__main__":
    sys.exit(main())
