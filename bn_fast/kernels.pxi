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
#   (e) Sums are kept in local arrays during a block: nothing else can point at them, so that no
#       compiler has to ask at run time whether it may vectorize.
#   (f) Wide rows are walked strip by strip of STRIP columns, and the rows that come next are
#       prefetched a strip at a time.  The hardware's prefetchers lose the thread among eight rows:
#       summing 205 MB of rows of 2 KiB took 13 ms, with prefetches in bursts of whole rows 13, in
#       strips 8, and one sequential read 6 (one thread).

ctypedef fused real:
    float
    double

ctypedef fused lane:
    float
    double

cdef extern from "_native.h" nogil:
    void bn_prefetch(const char* address, Py_ssize_t n)
    void bn_stream(char* to, const char* from_, Py_ssize_t n)
    void bn_stream_end()
    bint BN_STREAMS

cdef enum:
    TREE_ROWS = 8
    APPLY_ROWS = 4
    MAX_COLUMNS = 512
    STRIP = 64


cdef inline void prefetch_rows(
    char** rows, Py_ssize_t n_rows, Py_ssize_t strip, Py_ssize_t width, const real* type_tag,
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n_rows):
        bn_prefetch(
            rows[i] + strip * sizeof(real), min(<Py_ssize_t> STRIP, width - strip) * sizeof(real)
        )


cdef void stats_block(
    char** rows, Py_ssize_t n_rows, Py_ssize_t width, const real* shift,
    double* sum_d, double* sum_dd, Py_ssize_t ahead,
) noexcept nogil:
    """sum_d[j] += sum_i d_ij,  sum_dd[j] += sum_i d_ij^2,  d_ij = x_ij - shift_j.

    If `ahead` is not 0, that many rows more are known and are prefetched.
    """
    cdef Py_ssize_t i, j, strip, step = STRIP if ahead else width
    cdef const real* x0
    cdef const real* x1
    cdef const real* x2
    cdef const real* x3
    cdef const real* x4
    cdef const real* x5
    cdef const real* x6
    cdef const real* x7
    cdef real k, d0, d1, d2, d3, d4, d5, d6, d7
    cdef double[MAX_COLUMNS] s
    cdef double[MAX_COLUMNS] ss
    for j in range(width):
        s[j] = sum_d[j]
        ss[j] = sum_dd[j]
    for i in range(0, n_rows, 8):  # TREE_ROWS; Cython wants a literal step
        x0 = <const real*> rows[i]
        x1 = <const real*> rows[i + 1]
        x2 = <const real*> rows[i + 2]
        x3 = <const real*> rows[i + 3]
        x4 = <const real*> rows[i + 4]
        x5 = <const real*> rows[i + 5]
        x6 = <const real*> rows[i + 6]
        x7 = <const real*> rows[i + 7]
        strip = 0
        while strip < width:
            if ahead:
                prefetch_rows(rows + i + ahead, 8, strip, width, x0)
            for j in range(strip, min(strip + step, width)):
                k = shift[j]
                d0 = x0[j] - k
                d1 = x1[j] - k
                d2 = x2[j] - k
                d3 = x3[j] - k
                d4 = x4[j] - k
                d5 = x5[j] - k
                d6 = x6[j] - k
                d7 = x7[j] - k
                s[j] += <double> (((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7)))
                ss[j] += <double> (
                    ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
                    + ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7))
                )
            strip += step
    for j in range(width):
        sum_d[j] = s[j]
        sum_dd[j] = ss[j]


cdef void grad_stats_block(
    char** x_rows, char** g_rows, Py_ssize_t n_rows, Py_ssize_t width,
    const real* shift_x, const real* shift_g, double* sum_t, double* sum_td, Py_ssize_t ahead,
) noexcept nogil:
    """sum_t[j] += sum_i t_ij,  sum_td[j] += sum_i t_ij d_ij,  t = dout - shift_g, d = x - shift_x.

    Both sums in one sweep.  dout is shifted too: its mean falls out of sum_td (sum d = 0), but
    would cost its digits there.
    """
    cdef Py_ssize_t i, j, strip, step = STRIP if ahead else width
    cdef const real* x0
    cdef const real* x1
    cdef const real* x2
    cdef const real* x3
    cdef const real* g0
    cdef const real* g1
    cdef const real* g2
    cdef const real* g3
    cdef real k, m, t0, t1, t2, t3
    cdef double[MAX_COLUMNS] s
    cdef double[MAX_COLUMNS] ss
    for j in range(width):
        s[j] = sum_t[j]
        ss[j] = sum_td[j]
    for i in range(0, n_rows, 4):
        x0 = <const real*> x_rows[i]
        x1 = <const real*> x_rows[i + 1]
        x2 = <const real*> x_rows[i + 2]
        x3 = <const real*> x_rows[i + 3]
        g0 = <const real*> g_rows[i]
        g1 = <const real*> g_rows[i + 1]
        g2 = <const real*> g_rows[i + 2]
        g3 = <const real*> g_rows[i + 3]
        strip = 0
        while strip < width:
            if ahead:
                prefetch_rows(x_rows + i + ahead, 4, strip, width, x0)
                prefetch_rows(g_rows + i + ahead, 4, strip, width, x0)
            for j in range(strip, min(strip + step, width)):
                k = shift_x[j]
                m = shift_g[j]
                t0 = g0[j] - m
                t1 = g1[j] - m
                t2 = g2[j] - m
                t3 = g3[j] - m
                s[j] += <double> ((t0 + t1) + (t2 + t3))
                ss[j] += <double> (
                    (t0 * (x0[j] - k) + t1 * (x1[j] - k)) + (t2 * (x2[j] - k) + t3 * (x3[j] - k))
                )
            strip += step
    for j in range(width):
        sum_t[j] = s[j]
        sum_td[j] = ss[j]


cdef inline void apply_four(
    const real* restrict x0, const real* restrict x1,
    const real* restrict x2, const real* restrict x3,
    real* restrict y0, real* restrict y1, real* restrict y2, real* restrict y3,
    Py_ssize_t width, const real* restrict shift, const real* restrict scale,
    const real* restrict bias,
) noexcept nogil:
    cdef Py_ssize_t j
    cdef real k, a, c
    for j in range(width):
        k = shift[j]
        a = scale[j]
        c = bias[j]
        y0[j] = (x0[j] - k) * a + c
        y1[j] = (x1[j] - k) * a + c
        y2[j] = (x2[j] - k) * a + c
        y3[j] = (x3[j] - k) * a + c


cdef void apply_block(
    char** x_rows, char** y_rows, Py_ssize_t n_rows, Py_ssize_t width, const real* shift,
    const real* scale, const real* bias, Py_ssize_t ahead,
) noexcept nogil:
    """y_ij = (x_ij - shift_j) scale_j + bias_j, four rows at a time so that the constants are
    loaded once for four."""
    cdef Py_ssize_t i, strip, step = STRIP if ahead else width
    for i in range(0, n_rows, 4):
        strip = 0
        while strip < width:
            if ahead:
                prefetch_rows(x_rows + i + ahead, 4, strip, width, shift)
            apply_four(
                <const real*> x_rows[i] + strip, <const real*> x_rows[i + 1] + strip,
                <const real*> x_rows[i + 2] + strip, <const real*> x_rows[i + 3] + strip,
                <real*> y_rows[i] + strip, <real*> y_rows[i + 1] + strip,
                <real*> y_rows[i + 2] + strip, <real*> y_rows[i + 3] + strip,
                min(step, width - strip), shift + strip, scale + strip, bias + strip,
            )
            strip += step


cdef inline void grad_apply_two(
    const real* restrict x0, const real* restrict x1,
    const real* restrict g0, const real* restrict g1,
    real* restrict y0, real* restrict y1, Py_ssize_t width,
    const real* restrict shift_x, const real* restrict shift_g, const real* restrict scale,
    const real* restrict slope, const real* restrict bias,
) noexcept nogil:
    cdef Py_ssize_t j
    cdef real k, m, a, b, c
    for j in range(width):
        k = shift_x[j]
        m = shift_g[j]
        a = scale[j]
        b = slope[j]
        c = bias[j]
        y0[j] = ((g0[j] - m) * a - (x0[j] - k) * b) + c
        y1[j] = ((g1[j] - m) * a - (x1[j] - k) * b) + c


cdef void grad_apply_block(
    char** x_rows, char** g_rows, char** y_rows, Py_ssize_t n_rows, Py_ssize_t width,
    const real* shift_x, const real* shift_g, const real* scale, const real* slope,
    const real* bias, Py_ssize_t ahead,
) noexcept nogil:
    """dx_ij = (dout_ij - shift_g_j) scale_j - (x_ij - shift_x_j) slope_j + bias_j."""
    cdef Py_ssize_t i, strip, step = STRIP if ahead else width
    for i in range(0, n_rows, 2):
        strip = 0
        while strip < width:
            if ahead:
                prefetch_rows(x_rows + i + ahead, 2, strip, width, shift_x)
                prefetch_rows(g_rows + i + ahead, 2, strip, width, shift_x)
            grad_apply_two(
                <const real*> x_rows[i] + strip, <const real*> x_rows[i + 1] + strip,
                <const real*> g_rows[i] + strip, <const real*> g_rows[i + 1] + strip,
                <real*> y_rows[i] + strip, <real*> y_rows[i + 1] + strip,
                min(step, width - strip), shift_x + strip, shift_g + strip,
                scale + strip, slope + strip, bias + strip,
            )
            strip += step


cdef void gather_row(
    const real* type_tag, const char* row, const Py_ssize_t* restrict offset,
    Py_ssize_t width, const lane* restrict factor, lane* restrict packed,
) noexcept nogil:
    """packed[j] = factor[j] * (the element `offset[j]` bytes into the row); the factor is a power
    of two (1 but for float64 values whose squares leave the range), so nothing is rounded."""
    cdef Py_ssize_t j
    for j in range(width):
        packed[j] = <lane> (<const real*> (row + offset[j]))[0] * factor[j]


cdef void scatter_row(
    const real* type_tag, char* row, const Py_ssize_t* restrict offset, Py_ssize_t width,
    const lane* restrict packed,
) noexcept nogil:
    """The inverse of gather_row, rounded to the array's dtype."""
    cdef Py_ssize_t j
    for j in range(width):
        (<real*> (row + offset[j]))[0] = <real> packed[j]


cdef inline void fold_halves(
    double* restrict low, const double* restrict high, Py_ssize_t n,
) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n):
        low[j] += high[j]


cdef void fold_columns(
    double* sums, Py_ssize_t n_joined, Py_ssize_t n_features, Py_ssize_t n_run,
) noexcept nogil:
    """Fold columns [joined][feature][run] onto their features: sums[f] = sum of its columns, as
    a pairwise tree by halves (vector adds, and the error of log2 rather than of linear length)."""
    cdef Py_ssize_t f, half, length = n_joined
    while length > 1:
        half = (length + 1) // 2
        fold_halves(sums, sums + half * n_features, (length - half) * n_features)
        length = half
    if n_run > 1:
        for f in range(n_features):
            length = n_run
            while length > 1:
                half = (length + 1) // 2
                fold_halves(sums + f * n_run, sums + f * n_run + half, length - half)
                length = half
            sums[f] = sums[f * n_run]


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
