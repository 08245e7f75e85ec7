# Second order: gradients of the gradients.
#
# backward maps (dout, x, gamma) to (dx, dgamma, dbeta); this is the way of gradients ddx, ddgamma,
# ddbeta back through it.  Five sums of each feature are needed, over pairs of the arrays x, dout,
# ddx: backward's kernel gives them, pair by pair.  Then one visit applies
#
#     dx    = (dout - mean) mix_g + (ddx - mean) mix_r - (x - mean) mix_x
#     ddout = (ddx - mean) scale - (x - mean) slope + ddbeta
#
# the second by backward's kernel too.  The formulas behind the constants: functional.py.

cdef inline void mix_two(
    const real* restrict x0, const real* restrict x1,
    const real* restrict g0, const real* restrict g1,
    const real* restrict r0, const real* restrict r1,
    real* restrict y0, real* restrict y1, Py_ssize_t width,
    const real* restrict shift_x, const real* restrict shift_g, const real* restrict shift_r,
    const real* restrict mix_x, const real* restrict mix_g, const real* restrict mix_r,
    const real* restrict bias,
) noexcept nogil:
    cdef Py_ssize_t j
    cdef real k, m, n, a, b, c, d
    for j in range(width):
        k = shift_x[j]
        m = shift_g[j]
        n = shift_r[j]
        a = mix_x[j]
        b = mix_g[j]
        c = mix_r[j]
        d = bias[j]
        y0[j] = (((g0[j] - m) * b + (r0[j] - n) * c) - (x0[j] - k) * a) + d
        y1[j] = (((g1[j] - m) * b + (r1[j] - n) * c) - (x1[j] - k) * a) + d


cdef void mix_rows(
    const Plan* plan, Scratch* s, Py_ssize_t n_rows, Py_ssize_t width, Py_ssize_t j0,
    Py_ssize_t ahead, const lane* lane_tag,
) noexcept nogil:
    """y_ij = (g_ij - shift_g_j) mix_g_j + (r_ij - shift_r_j) mix_r_j - (x_ij - shift_x_j) mix_x_j
    + bias_j: two rows of columns at a time, or of a run wound up on LANES columns."""
    cdef Py_ssize_t i, first, n
    cdef lane* c[7]
    cdef lane* x
    cdef lane* g
    cdef lane* r
    cdef lane* y
    cdef lane[LANES] dummy
    c[0] = (<lane*> s.shift_x) + j0
    c[1] = (<lane*> s.shift_g) + j0
    c[2] = (<lane*> s.shift_r) + j0
    c[3] = (<lane*> s.mix_x) + j0
    c[4] = (<lane*> s.mix_g) + j0
    c[5] = (<lane*> s.mix_r) + j0
    c[6] = (<lane*> s.mix_bias) + j0
    if not plan.along:
        for i in range(0, n_rows, 2):
            if ahead:  # the rows of x and ddx are left to ddout's kernel
                for first in range(0, width, 64):
                    prefetch_rows(s.rows[G] + i + ahead, 2, first, width, lane_tag)
            mix_two(
                <lane*> s.rows[X][i], <lane*> s.rows[X][i + 1],
                <lane*> s.rows[G][i], <lane*> s.rows[G][i + 1],
                <lane*> s.rows[R][i], <lane*> s.rows[R][i + 1],
                <lane*> s.rows[Y][i], <lane*> s.rows[Y][i + 1], width,
                c[0], c[1], c[2], c[3], c[4], c[5], c[6],
            )
        return
    for i in range(n_rows):
        x = <lane*> s.rows[X][i]
        g = <lane*> s.rows[G][i]
        r = <lane*> s.rows[R][i]
        y = <lane*> s.rows[Y][i]
        first = 0
        while first < width:
            n = min(<Py_ssize_t> LANES, width - first)
            if first + 2 * LANES <= width:
                mix_two(
                    x + first, x + first + LANES, g + first, g + first + LANES,
                    r + first, r + first + LANES, y + first, y + first + LANES, LANES,
                    c[0], c[1], c[2], c[3], c[4], c[5], c[6],
                )
                first += 2 * LANES
            else:
                mix_two(
                    x + first, x + first, g + first, g + first, r + first, r + first,
                    y + first, dummy, n, c[0], c[1], c[2], c[3], c[4], c[5], c[6],
                )
                first += n


cdef void second_rows(
    const Job* job, const Plan* plan, Scratch* s, Py_ssize_t n_rows, Py_ssize_t width,
    Py_ssize_t j0, Py_ssize_t ahead, const lane* lane_tag,
) noexcept nogil:
    """Both outputs for rows that are in place.  Frozen statistics have only the second here."""
    cdef Gradient block
    if plan.used[Y]:
        mix_rows[lane](plan, s, n_rows, width, j0, ahead, lane_tag)
    set_gradient[lane](&block, job, plan, s, n_rows, j0, width, ahead, lane_tag)
    block.g = s.rows[R]
    block.y = s.rows[D]
    block.shift_g = <char*> (<lane*> s.shift_r + j0)
    gradient_rows[lane](&block, lane_tag)


cdef void second_constants(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint wide, const real* real_tag,
) noexcept nogil:
    """With A, B the means of ddx and ddx x_hat, C, D those of dout, E the mean product, r inv_std,
    w = ddgamma - gamma r B:

    dx = r w (dout - C) - gamma r^2 D (ddx - A) - x_hat (gamma r^2 (E - 3 B D) + ddgamma r D)
    ddout = gamma r (ddx - A) + w x_hat + ddbeta
    """
    cdef Second* second = &job.second
    cdef double low = low_limit(real_tag)
    cdef double r, a, w, b, d, t, rest, rest_g, rest_r
    cdef Py_ssize_t k
    for k in range(f, f + n):
        r = job.inv_std[k]
        a = job.gamma[k] * r
        b = second.along_r[k]
        d = second.along_g[k]
        w = second.ddgamma[k] - a * b
        t = a * (second.product[k] - 3 * b * d) + second.ddgamma[k] * d
        job.shift_x[k] = job.mean[k] if wide else <double> (<real> job.mean[k])
        job.shift_g[k] = second.mean_g[k] if wide else <double> (<real> second.mean_g[k])
        second.shift_r[k] = second.mean_r[k] if wide else <double> (<real> second.mean_r[k])
        job.factor[k] = job.factor[k] if wide else 1
        job.factor_g[k] = 1
        rest = job.factor[k] * ((job.mean[k] - job.shift_x[k]) + job.mean_low[k])
        rest_g = (second.mean_g[k] - job.shift_g[k]) + second.mean_g_low[k]
        rest_r = (second.mean_r[k] - second.shift_r[k]) + second.mean_r_low[k]
        second.mix_g[k] = r * w
        second.mix_r[k] = -a * d * r
        second.mix_x[k] = r * t * (r / job.factor[k])
        second.mix_bias[k] = (
            second.mix_x[k] * rest - second.mix_g[k] * rest_g - second.mix_r[k] * rest_r
        )
        job.scale[k] = a
        job.slope[k] = -w * (r / job.factor[k])
        job.bias[k] = (second.ddbeta[k] - a * rest_r) + job.slope[k] * rest
        job.wide[k] = (
            beyond(job.shift_x[k], low) + beyond(job.shift_g[k], low)
            + beyond(second.shift_r[k], low) + beyond(r, low) + beyond(second.mix_g[k], low)
            + beyond(second.mix_r[k], low) + beyond(second.mix_x[k], low)
            + above(second.mix_bias[k], low) + beyond(a, low) + beyond(job.slope[k], low)
            + above(job.bias[k], low)
        )


def double_backward(
    cnp.ndarray ddx, cnp.ndarray ddgamma not None, cnp.ndarray ddbeta not None,
    cnp.ndarray dout not None, cnp.ndarray x not None, cnp.ndarray gamma not None,
    cnp.ndarray stats not None, int axis, double eps, bint frozen, bint exact_mean, int n_threads,
):
    """Gradients dx, dgamma, ddout of backward, from those of its three results.

    ddx, dout, x: of one dtype and shape; ddx None: zeros.  ddgamma and ddbeta: float64, contiguous.
    The rest as in backward.
    """
    cdef Job job
    cdef Py_ssize_t f, n = cnp.PyArray_DIMS(x)[axis]
    cdef cnp.npy_intp shape[2]
    cdef double* stat = <double*> cnp.PyArray_DATA(stats)
    cdef double* v
    cdef double m
    cdef cnp.ndarray values, dgamma, dx, ddout
    dx = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    ddout = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    shape[0] = 18
    shape[1] = n
    values = cnp.PyArray_ZEROS(2, shape, cnp.NPY_FLOAT64, 0)
    v = <double*> cnp.PyArray_DATA(values)
    dgamma = cnp.PyArray_ZEROS(1, &shape[1], parameter_type(x), 0)
    if cnp.PyArray_SIZE(x) == 0:
        return dx, dgamma, ddout
    m = <double> (cnp.PyArray_SIZE(x) // n)
    job.activation = IDENTITY
    job.exact_mean = exact_mean
    job.eps = eps
    set_statistics(&job, stats)
    job.dgamma = v + 16 * n  # sums, each job's in turn
    job.dbeta = v + 17 * n
    if ddx is None or frozen:
        # dx is that of backward, with ddgamma for gamma.
        job.kind = BACKWARD_FROZEN if frozen else BACKWARD
        job.reduces = not frozen
        job.applies = True
        execute(&job, x, dout, dx, axis, n_threads, ddgamma, None)
    if ddx is None:  # ddout is forward's output, with ddgamma and ddbeta for gamma and beta
        job.kind = FORWARD_FROZEN
        job.reduces = False
        job.applies = True
        execute(&job, x, None, ddout, axis, n_threads, ddgamma, ddbeta)
        return dx, dgamma, ddout

    job.second.mean_r = v
    job.second.mean_r_low = v + n
    job.second.mean_g = v + 2 * n
    job.second.mean_g_low = v + 3 * n
    job.second.product = v + 4 * n
    job.second.along_r = v + 5 * n
    job.second.along_g = v + 6 * n
    job.second.shift_r = v + 7 * n
    job.second.mix_g = v + 8 * n
    job.second.mix_r = v + 9 * n
    job.second.mix_x = v + 10 * n
    job.second.mix_bias = v + 11 * n
    job.second.ddgamma = <double*> cnp.PyArray_DATA(ddgamma)
    job.second.ddbeta = <double*> cnp.PyArray_DATA(ddbeta)
    job.reduces = True
    job.applies = False
    if not frozen:
        job.kind = BACKWARD
        job.mean_kept = job.second.mean_g
        job.mean_kept_low = job.second.mean_g_low
        execute(&job, x, dout, None, axis, n_threads, gamma, None)
        for f in range(n):
            job.second.along_g[f] = job.dgamma[f] / m
        job.mean_kept = job.second.mean_r
        job.mean_kept_low = job.second.mean_r_low
        execute(&job, x, ddx, None, axis, n_threads, gamma, None)
        for f in range(n):
            job.second.along_r[f] = job.dgamma[f] / m
    # The product: dout takes the place of x, with its own mean and no scale.
    job.kind = BACKWARD_FROZEN if frozen else PRODUCT
    job.mean_kept = NULL
    job.mean = job.second.mean_g
    job.mean_low = job.second.mean_g_low
    job.inv_std = v + 12 * n
    job.multiplier = job.inv_std
    job.var = v + 13 * n
    for f in range(n):
        job.inv_std[f] = 1
    execute(&job, dout, ddx, None, axis, n_threads, gamma, None)
    for f in range(n):
        job.second.product[f] = job.dgamma[f] / m
        job.dgamma[f] *= stat[2 * n + f]  # inv_std
        if not frozen:
            job.dgamma[f] -= (
                stat[2 * n + f] * m * job.second.along_r[f] * job.second.along_g[f]
            )
    store_parameter(job.dgamma, dgamma)
    job.kind = SECOND
    job.reduces = False
    job.applies = True
    set_statistics(&job, stats)
    execute(
        &job, x, None if frozen else dout, None if frozen else dx, axis, n_threads, gamma, None,
        ddx, ddout,
    )
    return dx, dgamma, ddout
