"""Batch norm as an experienced user of numba writes it, to have a hand-made peer.

fastmath lets the compiler vectorize sums; they are shifted by the first value of each feature, so
that one sweep gives both moments without cancellation, and are folded from the dtype of x into
float64 after each block. *across*: x of shape (n, c), the features side by side. *along*: x of
shape (n, c, l), a feature's values in runs.
"""

import numpy as np
from numba import njit, prange

ROWS = 128  # of a block at most: its sums in the dtype of x keep their digits
COLUMNS = 1024  # of a block at most: its sums stay in the first-level cache


@njit(inline="always", cache=True)
def n_blocks_across(n, c, n_threads):
    """How many blocks of rows, and of columns: some for each thread."""
    n_right = (c + COLUMNS - 1) // COLUMNS
    wanted = (4 * n_threads + n_right - 1) // n_right
    return max((n + ROWS - 1) // ROWS, min(n, wanted)), n_right


@njit(parallel=True, fastmath=True, cache=True)
def forward_across(x, gamma, beta, eps, n_threads):
    n, c = x.shape
    n_down, n_right = n_blocks_across(n, c, n_threads)
    sums = np.zeros((n_down, c))
    squares = np.zeros((n_down, c))
    for block in prange(n_down * n_right):
        down, right = block // n_right, block % n_right
        lo, hi = right * COLUMNS, min(c, (right + 1) * COLUMNS)
        shift = x[0, lo:hi]
        s = np.zeros(hi - lo, x.dtype)
        q = np.zeros(hi - lo, x.dtype)
        for i in range(down * n // n_down, (down + 1) * n // n_down):
            row = x[i, lo:hi]
            for j in range(hi - lo):
                d = row[j] - shift[j]
                s[j] += d
                q[j] += d * d
        sums[down, lo:hi] = s
        squares[down, lo:hi] = q
    rest = sums.sum(axis=0) / n
    var = squares.sum(axis=0) / n - rest * rest
    mean = (x[0] + rest).astype(x.dtype)
    inv_std = (1 / np.sqrt(var + eps)).astype(x.dtype)
    scale = inv_std * gamma
    out = np.empty_like(x)
    for block in prange(n_down * n_right):
        down, right = block // n_right, block % n_right
        lo, hi = right * COLUMNS, min(c, (right + 1) * COLUMNS)
        m, a, b = mean[lo:hi], scale[lo:hi], beta[lo:hi]
        for i in range(down * n // n_down, (down + 1) * n // n_down):
            row, target = x[i, lo:hi], out[i, lo:hi]
            for j in range(hi - lo):
                target[j] = (row[j] - m[j]) * a[j] + b[j]
    return out, mean, inv_std


@njit(parallel=True, fastmath=True, cache=True)
def backward_across(dout, x, gamma, mean, inv_std, n_threads):
    n, c = x.shape
    n_down, n_right = n_blocks_across(n, c, n_threads)
    sums = np.zeros((n_down, c))
    products = np.zeros((n_down, c))
    for block in prange(n_down * n_right):
        down, right = block // n_right, block % n_right
        lo, hi = right * COLUMNS, min(c, (right + 1) * COLUMNS)
        m = mean[lo:hi]
        s = np.zeros(hi - lo, x.dtype)
        p = np.zeros(hi - lo, x.dtype)
        for i in range(down * n // n_down, (down + 1) * n // n_down):
            row, drow = x[i, lo:hi], dout[i, lo:hi]
            for j in range(hi - lo):
                s[j] += drow[j]
                p[j] += drow[j] * (row[j] - m[j])
        sums[down, lo:hi] = s
        products[down, lo:hi] = p
    dbeta = sums.sum(axis=0).astype(x.dtype)
    dgamma = (products.sum(axis=0) * inv_std).astype(x.dtype)
    scale = inv_std * gamma
    of_dbeta = (dbeta / n).astype(x.dtype)
    of_dgamma = (dgamma * inv_std / n).astype(x.dtype)
    dx = np.empty_like(x)
    for block in prange(n_down * n_right):
        down, right = block // n_right, block % n_right
        lo, hi = right * COLUMNS, min(c, (right + 1) * COLUMNS)
        m, a, b, g = mean[lo:hi], scale[lo:hi], of_dbeta[lo:hi], of_dgamma[lo:hi]
        for i in range(down * n // n_down, (down + 1) * n // n_down):
            row, drow, target = x[i, lo:hi], dout[i, lo:hi], dx[i, lo:hi]
            for j in range(hi - lo):
                target[j] = (drow[j] - b[j] - (row[j] - m[j]) * g[j]) * a[j]
    return dx, dgamma, dbeta


@njit(parallel=True, fastmath=True, cache=True)
def forward_along(x, gamma, beta, eps):
    n, c, length = x.shape
    out = np.empty_like(x)
    mean = np.empty_like(gamma)
    inv_std = np.empty_like(gamma)
    zero = x.dtype.type(0)
    for j in prange(c):
        shift = x[0, j, 0]
        total, total_of_squares = 0.0, 0.0
        for i in range(n):
            run = x[i, j]
            s, q = zero, zero
            for k in range(length):
                d = run[k] - shift
                s += d
                q += d * d
            total += s
            total_of_squares += q
        rest = total / (n * length)
        var = total_of_squares / (n * length) - rest * rest
        m = x.dtype.type(shift + rest)
        r = x.dtype.type(1 / np.sqrt(var + eps))
        a, b = r * gamma[j], beta[j]
        mean[j], inv_std[j] = m, r
        for i in range(n):
            run, target = x[i, j], out[i, j]
            for k in range(length):
                target[k] = (run[k] - m) * a + b
    return out, mean, inv_std


@njit(parallel=True, fastmath=True, cache=True)
def backward_along(dout, x, gamma, mean, inv_std):
    n, c, length = x.shape
    dx = np.empty_like(x)
    dgamma = np.empty_like(gamma)
    dbeta = np.empty_like(gamma)
    zero = x.dtype.type(0)
    for j in prange(c):
        m, r = mean[j], inv_std[j]
        total, total_of_products = 0.0, 0.0
        for i in range(n):
            run, drun = x[i, j], dout[i, j]
            s, p = zero, zero
            for k in range(length):
                s += drun[k]
                p += drun[k] * (run[k] - m)
            total += s
            total_of_products += p
        dbeta[j], dgamma[j] = total, total_of_products * r
        a = r * gamma[j]
        b = x.dtype.type(total / (n * length))
        g = x.dtype.type(total_of_products * r * r / (n * length))
        for i in range(n):
            run, drun, target = x[i, j], dout[i, j], dx[i, j]
            for k in range(length):
                target[k] = (drun[k] - b - (run[k] - m) * g) * a
    return dx, dgamma, dbeta


@njit(parallel=True, fastmath=True, cache=True)
def forward_rows(x, gamma, beta, eps, has_mean):
    """Statistics of rows: x (rows, k, l); gamma and beta (s, k), of which row i has i % s."""
    n, c, length = x.shape
    out = np.empty_like(x)
    mean = np.zeros(n, x.dtype)
    inv_std = np.empty(n, x.dtype)
    zero = x.dtype.type(0)
    for i in prange(n):
        row, target, a, b = x[i], out[i], gamma[i % len(gamma)], beta[i % len(beta)]
        shift = row[0, 0] if has_mean else zero
        total, total_of_squares = 0.0, 0.0
        for j in range(c):
            s, q = zero, zero
            for k in range(length):
                d = row[j, k] - shift
                s += d
                q += d * d
            total += s
            total_of_squares += q
        rest = total / (c * length) if has_mean else 0.0
        var = total_of_squares / (c * length) - rest * rest
        m = x.dtype.type(shift + rest)
        r = x.dtype.type(1 / np.sqrt(var + eps))
        mean[i], inv_std[i] = m, r
        for j in range(c):
            for k in range(length):
                target[j, k] = (row[j, k] - m) * (r * a[j]) + b[j]
    return out, mean, inv_std


@njit(parallel=True, fastmath=True, cache=True)
def backward_rows(dout, x, gamma, mean, inv_std, has_mean, n_threads):
    n, c, length = x.shape
    n_sets = len(gamma)
    n_parts = min(n, 4 * n_threads)
    dx = np.empty_like(x)
    dgammas = np.zeros((n_parts, n_sets, c))
    dbetas = np.zeros((n_parts, n_sets, c))
    zero = x.dtype.type(0)
    for part in prange(n_parts):
        for i in range(part * n // n_parts, (part + 1) * n // n_parts):
            row, drow, target, a = x[i], dout[i], dx[i], gamma[i % n_sets]
            m, r = mean[i], inv_std[i]
            total, total_of_products = 0.0, 0.0
            for j in range(c):
                s, p = zero, zero
                for k in range(length):
                    s += drow[j, k]
                    p += drow[j, k] * (row[j, k] - m)
                dbetas[part, i % n_sets, j] += s
                dgammas[part, i % n_sets, j] += p * r
                total += s * a[j]
                total_of_products += p * a[j]
            rest = x.dtype.type(total / (c * length) if has_mean else 0.0)
            g = x.dtype.type(total_of_products * r * r / (c * length))
            for j in range(c):
                for k in range(length):
                    target[j, k] = (drow[j, k] * a[j] - rest - (row[j, k] - m) * g) * r
    return dx, dgammas.sum(axis=0).astype(x.dtype), dbetas.sum(axis=0).astype(x.dtype)
