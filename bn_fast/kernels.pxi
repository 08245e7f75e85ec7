# The arithmetic, written once.  Every loop of bn_fast that touches an array's elements is here.
#
# A kernel sees a *block*: a few rows of `width` adjacent elements ("columns"), given by one pointer
# a row.  What a column means (a feature, an element of a feature's run, or both) is the engine's
# business (see the layout table there); the kernels only know that column j has the constants
# shift[j], scale[j], ...  Therefore one kernel serves every layout, and `real` every dtype.
#
#   (a) Sums.  Eight (or four) rows are added as a tree in `real`, and only the tree's root goes
#       into the double accumulator of the column.  A tree adds no more than three roundings, so a
#       float32 sum is as good as one in double to about 2^-24 / sqrt(rows), at twice the speed of
#       converting every element (measured, 256 x 512 in L2, AVX-512: 13.3 against 6.8 Gelem/s).
#   (b) Order.  Column j meets its rows in order and the tree is fixed, so the result does not
#       depend on the vector length: the same bits on every instruction set (contraction is off).
#   (c) Squares.  d = x - shift with the shift near the mean, never E[x^2] - E[x]^2: x - shift is
#       exact for x within a factor of two of the shift (Sterbenz), whatever the offset.
#   (d) Rows come in multiples of TREE_ROWS for sums, of APPLY_ROWS for output; the caller pads with
#       rows equal to the shift, which add exactly 0, and with a dummy to write to, instead of a
#       second loop here for the rest.
#   (e) Sums are `restrict`: nothing else points at them, so that no compiler has to ask at run time
#       whether it may vectorize.
#   (f) Rows from far away are walked strip by strip of STRIP columns, and the rows that come next
#       are prefetched a strip at a time.  The hardware's prefetchers lose the thread among eight
#       rows: summing 205 MB of rows of 2 KiB took 13 ms, with prefetches in bursts of whole rows
#       13, in strips 8, and one sequential read 6 (one thread).

ctypedef fused real:
    float
    double

ctypedef fused lane:
    float
    double

include "activations.pxi"

cdef extern from "_native.h" nogil:
    void bn_prefetch(const char* address, Py_ssize_t n)
    void bn_stream(char* to, const char* from_, Py_ssize_t n)
    void bn_stream_end()
    bint BN_STREAMS
    double bn_one()
    double bn_plus(double x, double y, double one)
    float bn_plusf(float x, float y, float one)

cdef enum:
    TREE_ROWS = 8
    APPLY_ROWS = 4
    MAX_COLUMNS = 1056        # of a row
    STRIP = 64
    LANES = 16                # columns that a long run of one feature is wound up on: a cache line


cdef inline real plus(real x, real y, real one) noexcept nogil:
    """x + y, by the units that multiply where there are such; `one` is bn_one()."""
    if real is float:
        return bn_plusf(x, y, one)
    else:
        return bn_plus(x, y, one)


cdef inline void prefetch_rows(
    char** rows, Py_ssize_t n_rows, Py_ssize_t strip, Py_ssize_t width, const real* type_tag,
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n_rows):
        bn_prefetch(
            rows[i] + strip * sizeof(real), min(<Py_ssize_t> STRIP, width - strip) * sizeof(real)
        )


cdef inline void stats_tree(
    const real* x0, const real* x1, const real* x2, const real* x3,
    const real* x4, const real* x5, const real* x6, const real* x7,
    Py_ssize_t first, Py_ssize_t last, const real* shift, real one,
    double* restrict s, double* restrict ss,
) noexcept nogil:
    """Eight rows of the columns first .. last - 1 into their sums."""
    cdef Py_ssize_t j
    cdef real k, d0, d1, d2, d3, d4, d5, d6, d7
    for j in range(first, last):
        k = shift[j]
        d0 = plus(x0[j], -k, one)
        d1 = plus(x1[j], -k, one)
        d2 = plus(x2[j], -k, one)
        d3 = plus(x3[j], -k, one)
        d4 = plus(x4[j], -k, one)
        d5 = plus(x5[j], -k, one)
        d6 = plus(x6[j], -k, one)
        d7 = plus(x7[j], -k, one)
        s[j] += <double> (
            (plus(d0, d1, one) + (d2 + d3)) + (plus(d4, d5, one) + (d6 + d7))
        )
        ss[j] += <double> (
            ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
            + ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7))
        )


cdef void stats_across(
    char** rows, Py_ssize_t n_rows, Py_ssize_t width, const real* shift,
    double* sum_d, double* sum_dd, Py_ssize_t ahead,
) noexcept nogil:
    """sum_d[j] += sum_i d_ij,  sum_dd[j] += sum_i d_ij^2,  d_ij = x_ij - shift_j.

    If `ahead` is not 0, that many rows more are known and are prefetched.
    """
    cdef Py_ssize_t i, strip, step = STRIP if ahead else width
    cdef real one = <real> bn_one()
    for i in range(0, n_rows, 8):  # TREE_ROWS; Cython wants a literal step
        strip = 0
        while strip < width:
            if ahead:
                prefetch_rows(rows + i + ahead, 8, strip, width, shift)
            stats_tree(
                <const real*> rows[i], <const real*> rows[i + 1],
                <const real*> rows[i + 2], <const real*> rows[i + 3],
                <const real*> rows[i + 4], <const real*> rows[i + 5],
                <const real*> rows[i + 6], <const real*> rows[i + 7],
                strip, min(strip + step, width), shift, one, sum_d, sum_dd,
            )
            strip += step


cdef void last_rows(
    const real* x, Py_ssize_t left, int n, const real* shift, const real** rows, real* last,
) noexcept nogil:
    """The `left` elements after a run's trees as the n rows of one more: what is missing is the
    shift, which adds 0.  (Its last LANES elements with a mask instead of a copy of some cost 30 %,
    (32, 256, 14, 14) backward.)"""
    cdef Py_ssize_t j, k, whole = left // LANES
    for k in range(n):
        rows[k] = x + k * LANES if k < whole else shift
    if left % LANES:
        for j in range(LANES):
            last[j] = x[whole * LANES + j] if j < left % LANES else shift[j]
        rows[whole] = last


cdef void stats_along(
    char** rows, Py_ssize_t n_rows, Py_ssize_t width, const real* shift,
    double* sum_d, double* sum_dd,
) noexcept nogil:
    """The same where a row is one feature's, wound up on LANES columns: a sequential read, which
    needs no prefetch (in bursts of a run's length they cost up to 40 %, NCHW with 14 x 14)."""
    cdef Py_ssize_t i, j, r
    cdef Py_ssize_t trees = width // (TREE_ROWS * LANES), left = width % (TREE_ROWS * LANES)
    cdef real one = <real> bn_one()
    cdef const real* x
    cdef double[LANES] s
    cdef double[LANES] ss
    cdef const real* row[TREE_ROWS]
    cdef real[LANES] last
    for j in range(LANES):
        s[j] = sum_d[j]
        ss[j] = sum_dd[j]
    for r in range(n_rows):
        x = <const real*> rows[r]
        for i in range(trees):
            stats_tree(
                x, x + LANES, x + 2 * LANES, x + 3 * LANES,
                x + 4 * LANES, x + 5 * LANES, x + 6 * LANES, x + 7 * LANES,
                0, LANES, shift, one, s, ss,
            )
            x += TREE_ROWS * LANES
        if left:
            last_rows(x, left, TREE_ROWS, shift, row, last)
            stats_tree(
                row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7],
                0, LANES, shift, one, s, ss,
            )
    for j in range(LANES):
        sum_d[j] = s[j]
        sum_dd[j] = ss[j]


cdef inline real affine(
    real x, real k, real a, real c, real r, const addend* addend_tag,
) noexcept nogil:
    if addend is Residual:
        return ((x - k) * a + c) + r
    else:
        return (x - k) * a + c


cdef inline real let_through(
    real g, real d, real a, real c, real slope, const activation* activation_tag,
) noexcept nogil:
    """What of dout comes through the activation: forward's own arithmetic decides, to the bit, from
    d = x - its shift on."""
    if activation is Identity:
        return g
    else:
        return gate(g, d * a + c, slope, activation_tag)


cdef inline void grad_stats_tree(
    const real* x0, const real* x1, const real* x2, const real* x3,
    const real* g0, const real* g1, const real* g2, const real* g3,
    Py_ssize_t first, Py_ssize_t last, const real* shift_x, const real* shift_g,
    real one, double* restrict s, double* restrict ss,
    const real* open_shift, const real* open_scale, const real* open_bias, real open_slope,
    const activation* activation_tag,
) noexcept nogil:
    """Four rows; eight pairs would fill the ways of a cache set where rows lie 4 KiB apart."""
    cdef Py_ssize_t j
    cdef real k, m, d0, d1, d2, d3, t0, t1, t2, t3, o = 0, a = 0, c = 0
    for j in range(first, last):
        k = shift_x[j]
        m = shift_g[j]
        if activation is not Identity:
            o = open_shift[j]
            a = open_scale[j]
            c = open_bias[j]
        d0 = plus(x0[j], -k, one)
        d1 = plus(x1[j], -k, one)
        d2 = plus(x2[j], -k, one)
        d3 = plus(x3[j], -k, one)
        t0 = let_through(g0[j], x0[j] - o, a, c, open_slope, activation_tag)
        t1 = let_through(g1[j], x1[j] - o, a, c, open_slope, activation_tag)
        t2 = let_through(g2[j], x2[j] - o, a, c, open_slope, activation_tag)
        t3 = let_through(g3[j], x3[j] - o, a, c, open_slope, activation_tag)
        t0 = plus(t0, -m, one)
        t1 = plus(t1, -m, one)
        t2 = plus(t2, -m, one)
        t3 = plus(t3, -m, one)
        s[j] += <double> ((t0 + t1) + (t2 + t3))
        ss[j] += <double> ((t0 * d0 + t1 * d1) + (t2 * d2 + t3 * d3))


cdef void grad_stats_across(
    const Gradient* block, const real* type_tag, const activation* activation_tag,
) noexcept nogil:
    """sum_1[j] += sum_i t_ij,  sum_2[j] += sum_i t_ij d_ij,  t = dout - shift_g, d = x - shift_x.

    Both sums in one sweep.  dout is shifted too: its mean falls out of sum_td (sum d = 0), but
    would cost its digits there.  Behind an activation dout is what comes through it.
    """
    cdef const real* shift_x = <const real*> block.shift_x
    cdef const real* shift_g = <const real*> block.shift_g
    cdef const real* open_shift = <const real*> block.open_shift
    cdef const real* open_scale = <const real*> block.open_scale
    cdef const real* open_bias = <const real*> block.open_bias
    cdef real open_slope = <real> block.open_slope
    cdef char** x_rows = block.x
    cdef char** g_rows = block.g
    cdef Py_ssize_t i, strip, width = block.width, ahead = block.ahead
    cdef Py_ssize_t step = STRIP if ahead else width
    cdef real one = <real> bn_one()
    for i in range(0, block.n_rows, 4):
        strip = 0
        while strip < width:
            if ahead:
                prefetch_rows(x_rows + i + ahead, 4, strip, width, shift_x)
                prefetch_rows(g_rows + i + ahead, 4, strip, width, shift_x)
            grad_stats_tree(
                <const real*> x_rows[i], <const real*> x_rows[i + 1],
                <const real*> x_rows[i + 2], <const real*> x_rows[i + 3],
                <const real*> g_rows[i], <const real*> g_rows[i + 1],
                <const real*> g_rows[i + 2], <const real*> g_rows[i + 3],
                strip, min(strip + step, width), shift_x, shift_g, one, block.sum_1, block.sum_2,
                open_shift, open_scale, open_bias, open_slope, activation_tag,
            )
            strip += step


cdef void grad_stats_along(
    const Gradient* block, const real* type_tag, const activation* activation_tag,
) noexcept nogil:
    """The same where a row is one feature's, wound up on LANES columns."""
    cdef const real* shift_x = <const real*> block.shift_x
    cdef const real* shift_g = <const real*> block.shift_g
    cdef const real* open_shift = <const real*> block.open_shift
    cdef const real* open_scale = <const real*> block.open_scale
    cdef const real* open_bias = <const real*> block.open_bias
    cdef real open_slope = <real> block.open_slope
    cdef Py_ssize_t i, j, r
    cdef Py_ssize_t trees = block.width // (4 * LANES), left = block.width % (4 * LANES)
    cdef real one = <real> bn_one()
    cdef const real* x
    cdef const real* g
    cdef double[LANES] s
    cdef double[LANES] ss
    cdef const real* x_row[4]
    cdef const real* g_row[4]
    cdef real[LANES] x_last
    cdef real[LANES] g_last
    for j in range(LANES):
        s[j] = block.sum_1[j]
        ss[j] = block.sum_2[j]
    for r in range(block.n_rows):
        x = <const real*> block.x[r]
        g = <const real*> block.g[r]
        for i in range(trees):
            grad_stats_tree(
                x, x + LANES, x + 2 * LANES, x + 3 * LANES,
                g, g + LANES, g + 2 * LANES, g + 3 * LANES,
                0, LANES, shift_x, shift_g, one, s, ss,
                open_shift, open_scale, open_bias, open_slope, activation_tag,
            )
            x += 4 * LANES
            g += 4 * LANES
        if left:
            last_rows(x, left, 4, shift_x, x_row, x_last)
            last_rows(g, left, 4, shift_g, g_row, g_last)
            grad_stats_tree(
                x_row[0], x_row[1], x_row[2], x_row[3], g_row[0], g_row[1], g_row[2], g_row[3],
                0, LANES, shift_x, shift_g, one, s, ss,
                open_shift, open_scale, open_bias, open_slope, activation_tag,
            )
    for j in range(LANES):
        block.sum_1[j] = s[j]
        block.sum_2[j] = ss[j]


cdef inline void apply_four(
    const real* restrict x0, const real* restrict x1,
    const real* restrict x2, const real* restrict x3,
    const real* restrict r0, const real* restrict r1,
    const real* restrict r2, const real* restrict r3,
    const real* restrict g0, const real* restrict g1,
    const real* restrict g2, const real* restrict g3,
    real* restrict y0, real* restrict y1, real* restrict y2, real* restrict y3,
    Py_ssize_t width, const real* restrict shift, const real* restrict scale,
    const real* restrict bias, real slope,
    const addend* addend_tag, const activation* activation_tag, const direction* direction_tag,
) noexcept nogil:
    cdef Py_ssize_t j
    cdef real k, a, c, z0, z1, z2, z3
    for j in range(width):
        k = shift[j]
        a = scale[j]
        c = bias[j]
        z0 = affine(x0[j], k, a, c, r0[j], addend_tag)
        z1 = affine(x1[j], k, a, c, r1[j], addend_tag)
        z2 = affine(x2[j], k, a, c, r2[j], addend_tag)
        z3 = affine(x3[j], k, a, c, r3[j], addend_tag)
        if direction is Forward:
            y0[j] = activate(z0, slope, activation_tag)
            y1[j] = activate(z1, slope, activation_tag)
            y2[j] = activate(z2, slope, activation_tag)
            y3[j] = activate(z3, slope, activation_tag)
        else:
            y0[j] = gate(g0[j], z0, slope, activation_tag)
            y1[j] = gate(g1[j], z1, slope, activation_tag)
            y2[j] = gate(g2[j], z2, slope, activation_tag)
            y3[j] = gate(g3[j], z3, slope, activation_tag)


cdef void apply_across(
    const Block* block, const real* type_tag,
    const addend* addend_tag, const activation* activation_tag, const direction* direction_tag,
) noexcept nogil:
    """y_ij = activate((x_ij - shift_j) scale_j + bias_j + r_ij), four rows at a time so that the
    constants are loaded once for four; backward, y_ij = what of g_ij comes through to there."""
    cdef Py_ssize_t i
    cdef char** x
    cdef char** r
    cdef char** g
    cdef char** y
    for i in range(0, block.n_rows, 4):
        x = block.x + i
        y = block.y + i
        r = block.r + i if addend is Residual else x
        g = x if direction is Forward else block.g + i
        apply_four(
            <const real*> x[0], <const real*> x[1], <const real*> x[2], <const real*> x[3],
            <const real*> r[0], <const real*> r[1], <const real*> r[2], <const real*> r[3],
            <const real*> g[0], <const real*> g[1], <const real*> g[2], <const real*> g[3],
            <real*> y[0], <real*> y[1], <real*> y[2], <real*> y[3],
            block.width, <const real*> block.shift, <const real*> block.scale,
            <const real*> block.bias, <real> block.slope,
            addend_tag, activation_tag, direction_tag,
        )


cdef inline void apply_row(
    const real* restrict x, const real* restrict r, const real* restrict g, real* restrict y,
    Py_ssize_t width, const real* restrict shift, const real* restrict scale,
    const real* restrict bias, Py_ssize_t each, real slope,
    const addend* addend_tag, const activation* activation_tag, const direction* direction_tag,
) noexcept nogil:
    cdef Py_ssize_t j
    cdef real z
    for j in range(width):
        z = affine(x[j], shift[j * each], scale[j * each], bias[j * each], r[j], addend_tag)
        if direction is Forward:
            y[j] = activate(z, slope, activation_tag)
        else:
            y[j] = gate(g[j], z, slope, activation_tag)


cdef inline void apply_singly(
    const Block* block, Py_ssize_t each, const real* type_tag,
    const addend* addend_tag, const activation* activation_tag, const direction* direction_tag,
) noexcept nogil:
    """The same row by row: where a row is one feature's, all with the same constants (each = 0); or
    each column with its own (1) where the rows come from far away, as the hardware's prefetchers
    lose the thread among four rows of every array ((65536, 128) backward 12 % slower, one thread,
    (12544, 160) 17 %).  Of runs the output alone is prefetched, see PREFETCH_OUTPUT."""
    cdef Py_ssize_t i, strip, width = block.width, step = STRIP if block.ahead else block.width
    cdef Py_ssize_t first
    cdef char** r
    cdef char** g
    for i in range(block.n_rows):
        r = block.r + i if addend is Residual else block.x + i
        g = block.x + i if direction is Forward else block.g + i
        strip = 0
        while strip < width:
            first = strip * each
            if block.ahead and not each:
                if i + 1 < block.n_rows:
                    prefetch_rows(block.y + i + 1, 1, strip, width, type_tag)
            elif block.ahead:
                prefetch_rows(block.x + i + block.ahead, 1, strip, width, type_tag)
                if addend is Residual:
                    prefetch_rows(r + block.ahead, 1, strip, width, type_tag)
                if direction is Backward:
                    prefetch_rows(g + block.ahead, 1, strip, width, type_tag)
            apply_row(
                <const real*> block.x[i] + strip, <const real*> r[0] + strip,
                <const real*> g[0] + strip, <real*> block.y[i] + strip,
                min(step, width - strip), <const real*> block.shift + first,
                <const real*> block.scale + first, <const real*> block.bias + first, each,
                <real> block.slope, addend_tag, activation_tag, direction_tag,
            )
            strip += step


cdef inline real gradient(real g, real d, real m, real a, real b, real c) noexcept nogil:
    return ((g - m) * a - d * b) + c


cdef inline void grad_apply_four(
    const real* restrict x0, const real* restrict x1,
    const real* restrict x2, const real* restrict x3,
    const real* restrict g0, const real* restrict g1,
    const real* restrict g2, const real* restrict g3,
    real* restrict y0, real* restrict y1, real* restrict y2, real* restrict y3,
    Py_ssize_t width, const real* restrict shift_x, const real* restrict shift_g,
    const real* restrict scale, const real* restrict slope, const real* restrict bias,
    const real* restrict open_scale, const real* restrict open_bias, real open_slope, real one,
    const activation* activation_tag,
) noexcept nogil:
    """The shift of x is that of forward, and so the gate's."""
    cdef Py_ssize_t j
    cdef real k, m, a, b, c, d0, d1, d2, d3, t0, t1, t2, t3, oa = 0, oc = 0
    for j in range(width):
        k = shift_x[j]
        m = shift_g[j]
        a = scale[j]
        b = slope[j]
        c = bias[j]
        if activation is not Identity:
            oa = open_scale[j]
            oc = open_bias[j]
        d0 = plus(x0[j], -k, one)
        d1 = plus(x1[j], -k, one)
        d2 = plus(x2[j], -k, one)
        d3 = plus(x3[j], -k, one)
        t0 = let_through(g0[j], d0, oa, oc, open_slope, activation_tag)
        t1 = let_through(g1[j], d1, oa, oc, open_slope, activation_tag)
        t2 = let_through(g2[j], d2, oa, oc, open_slope, activation_tag)
        t3 = let_through(g3[j], d3, oa, oc, open_slope, activation_tag)
        y0[j] = gradient(t0, d0, m, a, b, c)
        y1[j] = gradient(t1, d1, m, a, b, c)
        y2[j] = gradient(t2, d2, m, a, b, c)
        y3[j] = gradient(t3, d3, m, a, b, c)


cdef void grad_apply_across(
    const Gradient* block, const real* type_tag, const activation* activation_tag,
) noexcept nogil:
    """dx_ij = (dout_ij - shift_g_j) scale_j - (x_ij - shift_x_j) slope_j + bias_j."""
    cdef char** x
    cdef char** g
    cdef char** y
    cdef Py_ssize_t i
    for i in range(0, block.n_rows, 4):
        x = block.x + i
        g = block.g + i
        y = block.y + i
        grad_apply_four(
            <const real*> x[0], <const real*> x[1], <const real*> x[2], <const real*> x[3],
            <const real*> g[0], <const real*> g[1], <const real*> g[2], <const real*> g[3],
            <real*> y[0], <real*> y[1], <real*> y[2], <real*> y[3], block.width,
            <const real*> block.shift_x, <const real*> block.shift_g,
            <const real*> block.scale, <const real*> block.slope, <const real*> block.bias,
            <const real*> block.open_scale, <const real*> block.open_bias,
            <real> block.open_slope, <real> bn_one(), activation_tag,
        )


cdef inline void grad_apply_row(
    const real* restrict x, const real* restrict g, real* restrict y, Py_ssize_t width,
    const real* restrict shift_x, const real* restrict shift_g, const real* restrict scale,
    const real* restrict slope, const real* restrict bias, const real* restrict open_scale,
    const real* restrict open_bias, Py_ssize_t each, real open_slope, real one,
    const activation* activation_tag,
) noexcept nogil:
    cdef Py_ssize_t j, k
    cdef real t, d
    for j in range(width):
        k = j * each
        d = plus(x[j], -shift_x[k], one)
        t = let_through(g[j], d, open_scale[k], open_bias[k], open_slope, activation_tag)
        y[j] = gradient(t, d, shift_g[k], scale[k], slope[k], bias[k])


cdef inline void grad_apply_singly(
    const Gradient* block, Py_ssize_t each, const real* type_tag,
    const activation* activation_tag,
) noexcept nogil:
    """The same row by row, see apply_singly."""
    cdef Py_ssize_t i, strip, first, width = block.width, ahead = block.ahead
    cdef Py_ssize_t step = STRIP if ahead else width
    cdef real one = <real> bn_one()
    for i in range(block.n_rows):
        strip = 0
        while strip < width:
            first = strip * each
            if ahead:
                prefetch_rows(block.x + i + ahead, 1, strip, width, type_tag)
                prefetch_rows(block.g + i + ahead, 1, strip, width, type_tag)
            grad_apply_row(
                <const real*> block.x[i] + strip, <const real*> block.g[i] + strip,
                <real*> block.y[i] + strip, min(step, width - strip),
                <const real*> block.shift_x + first, <const real*> block.shift_g + first,
                <const real*> block.scale + first, <const real*> block.slope + first,
                <const real*> block.bias + first, <const real*> block.open_scale + first,
                <const real*> block.open_bias + first, each, <real> block.open_slope, one,
                activation_tag,
            )
            strip += step


cdef inline Py_ssize_t regular_step(const Py_ssize_t* offset, Py_ssize_t width) noexcept nogil:
    """The step from column to column, 0 if there is more than one.  The columns are at most a grid
    of two axes, and then the two ends say whether it is one line."""
    cdef Py_ssize_t step = offset[1] - offset[0] if width > 1 else 0
    return step if offset[width - 1] - offset[0] == step * (width - 1) else 0


cdef inline void gather_step(
    const real* restrict row, Py_ssize_t step, Py_ssize_t width, const lane* restrict factor,
    lane* restrict packed,
) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(width):
        packed[j] = <lane> row[j * step] * factor[j]


cdef void gather_row(
    const real* type_tag, const char* row, const Py_ssize_t* restrict offset,
    Py_ssize_t width, const lane* restrict factor, lane* restrict packed,
) noexcept nogil:
    """packed[j] = factor[j] * (the element `offset[j]` bytes into the row); the factor is a power
    of two (1 but for float64 values whose squares leave the range), so nothing is rounded.

    Steps known to the compiler become loads and shuffles: rows of every other column come in at
    twice the speed of single elements, reversed ones at five times.
    """
    cdef Py_ssize_t j, step = regular_step(offset, width)
    cdef const real* first = <const real*> (row + offset[0])
    if step == sizeof(real):
        gather_step(first, 1, width, factor, packed)
    elif step == -<Py_ssize_t> sizeof(real):
        gather_step(first, -1, width, factor, packed)
    elif step == 2 * sizeof(real):
        gather_step(first, 2, width, factor, packed)
    elif step % <Py_ssize_t> sizeof(real) == 0 and step:
        gather_step(first, step // <Py_ssize_t> sizeof(real), width, factor, packed)
    else:
        for j in range(width):
            packed[j] = <lane> (<const real*> (row + offset[j]))[0] * factor[j]


cdef inline void scatter_step(
    real* restrict row, Py_ssize_t step, Py_ssize_t width, const lane* restrict packed,
) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(width):
        row[j * step] = <real> packed[j]


cdef void scatter_row(
    const real* type_tag, char* row, const Py_ssize_t* restrict offset, Py_ssize_t width,
    const lane* restrict packed,
) noexcept nogil:
    """The inverse of gather_row, rounded to the array's dtype."""
    cdef Py_ssize_t j, step = regular_step(offset, width)
    cdef real* first = <real*> (row + offset[0])
    if step == sizeof(real):
        scatter_step(first, 1, width, packed)
    elif step == -<Py_ssize_t> sizeof(real):
        scatter_step(first, -1, width, packed)
    elif step % <Py_ssize_t> sizeof(real) == 0 and step:
        scatter_step(first, step // <Py_ssize_t> sizeof(real), width, packed)
    else:
        for j in range(width):
            (<real*> (row + offset[j]))[0] = <real> packed[j]


cdef inline void fold_halves(
    double* restrict low, const double* restrict high, Py_ssize_t n,
) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n):
        low[j] += high[j]


cdef inline double fold_run(const double* restrict values, Py_ssize_t n) noexcept nogil:
    """The sum of n adjacent values, in eight lanes that are added as a tree at the end."""
    cdef double[8] lanes
    cdef Py_ssize_t e, k, whole = n // 8 * 8
    for k in range(8):
        lanes[k] = 0
    for e in range(0, whole, 8):
        for k in range(8):
            lanes[k] += values[e + k]
    for k in range(n - whole):
        lanes[k] += values[whole + k]
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + (
        (lanes[1] + lanes[5]) + (lanes[3] + lanes[7])
    )


cdef void fold_columns(
    double* sums, Py_ssize_t n_joined, Py_ssize_t n_features, Py_ssize_t n_run,
) noexcept nogil:
    """Fold columns [joined][feature][run] onto their features: sums[f] = sum of its columns, joined
    rows by halves (vector adds), runs in lanes."""
    cdef Py_ssize_t f, half, length = n_joined
    while length > 1:
        half = (length + 1) // 2
        fold_halves(sums, sums + half * n_features, (length - half) * n_features)
        length = half
    if n_run > 1:
        for f in range(n_features):
            sums[f] = fold_run(sums + f * n_run, n_run)


cdef inline void add_compensated(
    double* restrict high, double* restrict low, const double* restrict term, Py_ssize_t n,
) noexcept nogil:
    """(high + low)[j] += term[j] with the rounding error kept in low (Knuth's two-sum): blocks of
    rows add up to any M without losing a digit."""
    cdef Py_ssize_t j
    cdef double t, b
    for j in range(n):
        t = high[j] + term[j]
        b = t - high[j]
        low[j] += (high[j] - (t - b)) + (term[j] - b)
        high[j] = t
