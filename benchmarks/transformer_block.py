"""Run a transformer block in NumPy, with the reference's norms and with bn_fast's.

    h = x + attention(norm1(x)) Wo          causal, with several heads
    y = h + (silu(n Wg) * (n Wu)) Wd        n = norm2(h): a gated MLP

as llama3.np and picoGPT write it, float32, forward alone. The weights and x are the same for both;
what comes out must agree to roundings, and the exit status is 1 if it does not.
"""

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np

import bn_fast
from bn_fast import reference

NORMS = {"layer": "layer_norm", "rms": "rms_norm"}
MODULES = {"NumPy reference": reference, "bn_fast": bn_fast}
LARGEST_DIFFERENCE = 1e-5  # of the largest value, after four matrix products in float32


class Block:
    """x of shape (tokens, width); `norm` is called as norm(x, gamma[, beta])."""

    def __init__(self, norm: Callable[..., np.ndarray], n_parameters: int, width: int, heads: int):
        rng = np.random.default_rng(0)
        self.norm, self.heads = norm, heads
        self.norm_seconds = 0.0
        hidden = 8 * width // 3

        def weight(n_in: int, n_out: int) -> np.ndarray:
            scale = np.float32(1 / np.sqrt(n_in))
            return scale * rng.standard_normal((n_in, n_out), dtype=np.float32)

        self.of_norms = [
            [rng.uniform(0.5, 1.5, width).astype(np.float32) for _ in range(n_parameters)]
            for _ in range(2)
        ]
        self.qkv, self.out = weight(width, 3 * width), weight(width, width)
        self.gate, self.up, self.down = (
            weight(width, hidden), weight(width, hidden), weight(hidden, width)
        )  # fmt: skip

    def normalized(self, i: int, x: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        y = self.norm(x, *self.of_norms[i])
        self.norm_seconds += time.perf_counter() - start
        return y

    def attention(self, x: np.ndarray) -> np.ndarray:
        n, width = x.shape
        q, k, v = (x @ self.qkv).reshape(n, 3, self.heads, -1).transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) / np.float32(np.sqrt(width // self.heads))
        scores += np.triu(np.full((n, n), -np.inf, np.float32), 1)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return (weights @ v).transpose(1, 0, 2).reshape(n, width) @ self.out

    def __call__(self, x: np.ndarray) -> np.ndarray:
        h = x + self.attention(self.normalized(0, x))
        n = self.normalized(1, h)
        gate = n @ self.gate
        return h + (gate / (1 + np.exp(-gate)) * (n @ self.up)) @ self.down


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1], help="default: 512 1")
    parser.add_argument("--width", type=int, default=768, help="default: 768")
    parser.add_argument("--heads", type=int, default=12, help="divides the width, default: 12")
    parser.add_argument("--rounds", type=int, default=15, help="forward passes, default: 15")
    options = parser.parse_args()
    if min(*options.tokens, options.width, options.heads, options.rounds) < 1:
        parser.error("--tokens, --width, --heads and --rounds must be at least 1")
    if options.width % options.heads:
        parser.error("--heads must divide --width")

    print(f"width {options.width}, {options.heads} heads, float32: medians of {options.rounds}")
    print(
        f"{'norm':<6} {'tokens':>7} {'':<16} {'block':>10} {'norms':>10} {'share':>6} {'error':>8}"
    )
    ok = True
    for norm in NORMS:
        for tokens in options.tokens:
            ok &= show(norm, tokens, options)
    return 0 if ok else 1


def show(norm: str, tokens: int, options: argparse.Namespace) -> bool:
    """Two rows of the table; whether both came to the same."""
    x = np.random.default_rng(1).standard_normal((tokens, options.width), dtype=np.float32)
    blocks = {
        who: Block(
            getattr(module, NORMS[norm]), 1 + (norm == "layer"), options.width, options.heads
        )
        for who, module in MODULES.items()
    }
    seconds: dict[str, list[tuple[float, float]]] = {who: [] for who in blocks}
    results = {}
    for _ in range(options.rounds + 1):  # in turn: a busy moment of the machine meets both
        for who, block in blocks.items():
            block.norm_seconds = 0.0
            start = time.perf_counter()
            results[who] = block(x)
            seconds[who].append((time.perf_counter() - start, block.norm_seconds))
    expected, got = results.values()
    error = np.abs(got - expected).max() / np.abs(expected).max()
    for who, times in seconds.items():
        whole, of_norms = (median(part) for part in zip(*times[1:]))  # the first warms up
        cells = f"{whole * 1e3:>7.2f} ms {of_norms * 1e3:>7.3f} ms {of_norms / whole:>6.1%}"
        verdict = f"{error:>8.1e}  {'ok' if error <= LARGEST_DIFFERENCE else 'FAILED'}"
        print(f"{norm:<6} {tokens:>7} {who:<16} {cells} {verdict if who == 'bn_fast' else ''}")
    return bool(error <= LARGEST_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
