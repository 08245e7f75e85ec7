# The arithmetic: every loop over the columns of rows, written once; those that write are in
# output.pxi.
#
# A kernel sees a *block*: a few rows of `width` adjacent elements ("columns") of each array, given
# by one pointer a row, and constants of the columns.  What a column means (a feature, an element of
# a feature's run, or both) is the layout's business; the kernels only know that column j has
# shift[j], coef[j], ...  Therefore one kernel serves every layout, and `lane` every dtype.
#
#     reduce:  sum_1[j] += sum_i d_ij,  sum_2[j] += sum_i d_ij^2,           d = x - shift
#              sum_1[j] += sum_i t_ij,  sum_2[j] += sum_i t_ij d_ij,        t = dout - shift
#     apply:   y_ij = the sum of (input - shift_j) coef_j over one to three inputs, + bias_j
#
#   (a) Sums.  Sixteen (or eight, or four) rows are added as a tree in `lane`, and only the tree's
#       root goes into the double accumulator of the column.  A tree adds no more than four
#       roundings, so a float32 sum is as good as one in double to about 2^-24 / sqrt(rows), at
#       twice the speed of converting every element (256 x 512 in L2, AVX-512, trees of eight: 13.3
#       against 6.8 Gelem/s).
#   (b) Order.  Column j meets its rows in order and the tree is fixed, so the result does not
#       depend on the vector length: the same bits on every instruction set (contraction is off).
#   (c) Squares.  d = x - shift with the shift near the mean, never E[x^2] - E[x]^2: x - shift is
#       exact for x within a factor of two of the shift (Sterbenz), whatever the offset.
#   (d) Rows come in multiples of TREE_ROWS for sums, of APPLY_ROWS for output; the caller pads with
#       rows equal to the shift, which add exactly 0, and with a spare row to write to, instead of a
#       second loop here for the rest.
#   (e) Sums are `restrict`: nothing else points at them, so that no compiler has to ask at run time
#       whether it may vectorize.
#   (f) Rows from far away are walked strip by strip of STRIP columns, and with each strip its share
#       of the rows that come next is prefetched, in the order of memory: the hardware's prefetchers
#       lose the thread among eight rows.  Sums of (50000, 256), one thread: 4.9 ms without, so 2.1,
#       one sequential read 1.2; two threads, in C, with each row's strip instead 2.3, so 1.1 (AMD
#       EPYC, Zen 4, 2026-11-26).

ctypedef fused lane:
    float
    double

cdef extern from "_native.h" nogil:
    void bn_prefetch(const char* address, Py_ssize_t n)
    void bn_stream(char* to, const char* from_, Py_ssize_t n)
    void bn_stream_lines(char* to, const char* from_, Py_ssize_t n_lines)
    void bn_stream_end()
    bint BN_STREAMS
    double bn_one()
    double bn_plus(double x, double y, double one)
    float bn_plusf(float x, float y, float one)
    double bn_fold_lanes(const double* values)  # LANES of them

cdef enum:
    # Rows come in multiples of this; a tree has so many, or twice that, of x alone, of x and dout
    # four, see sum_products_tree.
    TREE_ROWS = 8
    APPLY_ROWS = 4
    MAX_COLUMNS = 1056        # of a row
    STRIP = 64
    LINE_BYTES = 64
    PAGE_BYTES = 4096
    PAST = 32                 # elements written past the caches at a time: gcc unrolls loops of 16
    LANES = 16                # columns that a long run of one feature is wound up on: a cache line

cdef enum:                    # roles of the arrays: x (or the only input), dout,
    X = 0
    G = 1
    R = 2                     # a third input: the residual; in second order the gradient of dx,
    Y = 3                     # the output,
    D = 4                     # a second output: the residual's gradient, ddout; dout behind a gate,
    W = 5                     # weights, which may repeat themselves along the features,
    S = 6                     # gamma and beta that vary within a statistic
    B = 7
    N_ROLES = 8

# ---------------------------------------------------------------- tags
#
# Tags are pointers to these types, always NULL, so that Cython decides every `is` when it compiles:
# no loop asks.  An activation is a tag, a number, a name, a branch of each function that names the
# others, and a line that fills its row of the table.
#
#   y = activate(z) in the registers of the loop that makes z.  Backward forms z again from x and
#   the constants of forward: the same bits and so the same gate, and nothing of x's size has to be
#   kept.  At z = 0 the slope is that from below, as in PyTorch.  NaN is not <= 0, so it comes
#   through; relu is no product with 0, so -inf and infinite gradients leave 0 there and not NaN.

cdef struct Identity:
    char unused

cdef struct Relu:
    char unused

cdef struct LeakyRelu:
    char unused

ctypedef fused activation:
    Identity
    Relu
    LeakyRelu

cdef enum:                    # activations
    IDENTITY
    RELU
    LEAKY_RELU
    N_ACTIVATIONS

activations = {"relu": RELU, "leaky_relu": LEAKY_RELU}

cdef struct Affine:           # activate(x' + bias), x' = (x - shift) coef
    char unused

cdef struct Added:            # activate(x' + bias + r)
    char unused

cdef struct Scaled:           # (x' + bias) s + b
    char unused

cdef struct Opened:           # what of g comes through the activation of x' + bias
    char unused

cdef struct AddedOpened:      # ... of x' + bias + r
    char unused

cdef struct Gradient:         # g' + x' + bias, g having come through the activation
    char unused

cdef struct ScaledGradient:   # (s g)' + x' + bias
    char unused

cdef struct Mixed:            # g' + r' + x' + bias
    char unused

ctypedef fused formula:
    Affine
    Added
    Scaled
    Opened
    AddedOpened
    Gradient
    ScaledGradient
    Mixed

cdef enum:                    # formulas
    AFFINE
    ADDED
    SCALED
    OPENED
    ADDED_OPENED
    GRADIENT
    SCALED_GRADIENT
    MIXED
    N_FORMULAS

cdef struct OfColumn:         # constants: each column has its own,
    char unused

cdef struct OfRow:            # or the row has one for all
    char unused

ctypedef fused extent:
    OfColumn
    OfRow

cdef enum Walk:
    ACROSS                    # each column has constants and sums of its own
    ALONG                     # rows are one feature's, all with the same; sums of LANES columns
    BY_ROW                    # each row has its own

cdef struct Block:
    char** row[N_ROLES]
    Py_ssize_t n_rows
    Py_ssize_t width
    Py_ssize_t tree_rows      # of x alone
    Py_ssize_t ahead          # so many rows more are known and are prefetched; 0: none
    Walk walk
    Py_ssize_t turns          # features whose rows take turns, walked along
    bint singly               # rows are written one by one,
    bint stream               # and past the caches
    const char* shift[3]      # of x, dout and the third input; columns of the rows' type
    const char* coef[3]
    const char* bias
    int formula
    int activation
    double slope              # the activation's, below 0
    const char* gate_coef     # forward's constants of x for the gate in GRADIENT and in sums; the
    const char* gate_bias     # shift is that of x,
    const char* gate_shift    # but in sums it is forward's own
    double* sum_1
    double* sum_2


cdef inline lane activate(lane z, lane slope, const activation* activation_tag) noexcept nogil:
    if activation is Relu:
        return 0 if z <= 0 else z
    elif activation is LeakyRelu:
        return slope * z if z <= 0 else z
    else:
        return z


cdef inline lane gate(
    lane g, lane z, lane slope, const activation* activation_tag,
) noexcept nogil:
    """What of a gradient with respect to activate(z) comes through to z."""
    if activation is Relu:
        return 0 if z <= 0 else g
    elif activation is LeakyRelu:
        return slope * g if z <= 0 else g
    else:
        return g


cdef bint is_open(double z, double slope, const activation* activation_tag) noexcept nogil:
    """Whether a gradient comes through to z as it is."""
    return gate[double, activation](1, z, slope, activation_tag) == 1


cdef inline lane let_through(
    lane g, lane d, lane a, lane c, lane slope, const activation* activation_tag,
) noexcept nogil:
    """What of dout comes through the activation: forward's own arithmetic decides, to the bit, from
    d = x - its shift on."""
    if activation is Identity:
        return g
    else:
        return gate(g, d * a + c, slope, activation_tag)


cdef inline lane plus(lane x, lane y, lane one) noexcept nogil:
    """x + y, by the units that multiply where there are such; `one` is bn_one()."""
    if lane is float:
        return bn_plusf(x, y, one)
    else:
        return bn_plus(x, y, one)


cdef inline void prefetch_strip(
    const char* row, Py_ssize_t strip, Py_ssize_t width, const lane* lane_tag,
) noexcept nogil:
    bn_prefetch(
        row + strip * sizeof(lane), min(<Py_ssize_t> STRIP, width - strip) * sizeof(lane)
    )


cdef inline void prefetch_share(
    char** rows, Py_ssize_t n_rows, Py_ssize_t strip, Py_ssize_t width, const lane* lane_tag,
) noexcept nogil:
    """A strip's share of some rows, in the order of memory, see (f); of rows of a page or more,
    which the hardware's prefetchers follow, the strip of each: (16384, 1024) 5 % faster."""
    cdef Py_ssize_t first = strip * n_rows, n, column
    cdef Py_ssize_t left = min(<Py_ssize_t> STRIP, width - strip) * n_rows
    if width * sizeof(lane) >= PAGE_BYTES:
        for n in range(n_rows):
            prefetch_strip(rows[n], strip, width, lane_tag)
        return
    column = first % width
    rows += first // width
    while left > 0:
        n = min(left, width - column)
        bn_prefetch(rows[0] + column * sizeof(lane), n * sizeof(lane))
        left -= n
        column = 0
        rows += 1


# ---------------------------------------------------------------- columns to features

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


# ---------------------------------------------------------------- sums

cdef inline lane add_eight(
    lane d0, lane d1, lane d2, lane d3, lane d4, lane d5, lane d6, lane d7, lane one,
) noexcept nogil:
    return (plus(d0, d1, one) + (d2 + d3)) + (plus(d4, d5, one) + (d6 + d7))


cdef inline lane add_squares(
    lane d0, lane d1, lane d2, lane d3, lane d4, lane d5, lane d6, lane d7,
) noexcept nogil:
    return ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) + (
        (d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7)
    )


cdef inline void sum_squares_tree(
    const lane* x0, const lane* x1, const lane* x2, const lane* x3,
    const lane* x4, const lane* x5, const lane* x6, const lane* x7,
    Py_ssize_t first, Py_ssize_t last, const lane* shift, lane one,
    double* restrict s, double* restrict ss,
) noexcept nogil:
    """Eight rows of the columns first .. last - 1 into their sums."""
    cdef Py_ssize_t j
    cdef lane k, d0, d1, d2, d3, d4, d5, d6, d7
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
        s[j] += <double> add_eight(d0, d1, d2, d3, d4, d5, d6, d7, one)
        ss[j] += <double> add_squares(d0, d1, d2, d3, d4, d5, d6, d7)


cdef inline void sum_squares_trees(
    char** rows, Py_ssize_t first, Py_ssize_t last, const lane* shift, lane one,
    double* restrict s, double* restrict ss,
) noexcept nogil:
    """Sixteen rows, two such trees as one: half as many sums in double, which cost as much as the
    rest ((256, 512) on one thread 8.9 to 7.9 us; of 32 rows no less)."""
    cdef Py_ssize_t j
    cdef lane k, sum_a, square_a, d0, d1, d2, d3, d4, d5, d6, d7
    cdef const lane* x0 = <const lane*> rows[0]
    cdef const lane* x1 = <const lane*> rows[1]
    cdef const lane* x2 = <const lane*> rows[2]
    cdef const lane* x3 = <const lane*> rows[3]
    cdef const lane* x4 = <const lane*> rows[4]
    cdef const lane* x5 = <const lane*> rows[5]
    cdef const lane* x6 = <const lane*> rows[6]
    cdef const lane* x7 = <const lane*> rows[7]
    cdef const lane* y0 = <const lane*> rows[8]
    cdef const lane* y1 = <const lane*> rows[9]
    cdef const lane* y2 = <const lane*> rows[10]
    cdef const lane* y3 = <const lane*> rows[11]
    cdef const lane* y4 = <const lane*> rows[12]
    cdef const lane* y5 = <const lane*> rows[13]
    cdef const lane* y6 = <const lane*> rows[14]
    cdef const lane* y7 = <const lane*> rows[15]
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
        sum_a = add_eight(d0, d1, d2, d3, d4, d5, d6, d7, one)
        square_a = add_squares(d0, d1, d2, d3, d4, d5, d6, d7)
        d0 = plus(y0[j], -k, one)
        d1 = plus(y1[j], -k, one)
        d2 = plus(y2[j], -k, one)
        d3 = plus(y3[j], -k, one)
        d4 = plus(y4[j], -k, one)
        d5 = plus(y5[j], -k, one)
        d6 = plus(y6[j], -k, one)
        d7 = plus(y7[j], -k, one)
        s[j] += <double> (sum_a + add_eight(d0, d1, d2, d3, d4, d5, d6, d7, one))
        ss[j] += <double> (square_a + add_squares(d0, d1, d2, d3, d4, d5, d6, d7))


cdef void sum_squares_across(const Block* block, const lane* lane_tag) noexcept nogil:
    """sum_1[j] += sum_i d_ij,  sum_2[j] += sum_i d_ij^2,  d_ij = x_ij - shift_j."""
    cdef char** rows = block.row[X]
    cdef const lane* shift = <const lane*> block.shift[X]
    cdef Py_ssize_t i = 0, n, strip, width = block.width, step = STRIP if block.ahead else width
    cdef lane one = <lane> bn_one()
    while i < block.n_rows:
        n = min(block.tree_rows, block.n_rows - i)
        strip = 0
        while strip < width:
            if block.ahead:
                prefetch_share(rows + i + block.ahead, n, strip, width, lane_tag)
            if n == 2 * TREE_ROWS:
                sum_squares_trees(
                    rows + i, strip, min(strip + step, width), shift, one,
                    block.sum_1, block.sum_2,
                )
            else:
                sum_squares_tree(
                    <const lane*> rows[i], <const lane*> rows[i + 1],
                    <const lane*> rows[i + 2], <const lane*> rows[i + 3],
                    <const lane*> rows[i + 4], <const lane*> rows[i + 5],
                    <const lane*> rows[i + 6], <const lane*> rows[i + 7],
                    strip, min(strip + step, width), shift, one, block.sum_1, block.sum_2,
                )
            strip += step
        i += n


cdef void last_rows(
    const lane* x, Py_ssize_t left, int n, const lane* shift, const lane** rows, lane* last,
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


cdef inline void sum_squares_run(
    const lane* x, Py_ssize_t width, const lane* shift, lane one,
    double* restrict s, double* restrict ss,
) noexcept nogil:
    """A row of one feature wound up on LANES columns: a sequential read, which needs no prefetch
    (in bursts of a run's length they cost up to 40 %, NCHW with 14 x 14)."""
    cdef Py_ssize_t i
    cdef Py_ssize_t trees = width // (TREE_ROWS * LANES), left = width % (TREE_ROWS * LANES)
    cdef const lane* row[TREE_ROWS]
    cdef lane[LANES] last
    for i in range(trees):
        sum_squares_tree(
            x, x + LANES, x + 2 * LANES, x + 3 * LANES,
            x + 4 * LANES, x + 5 * LANES, x + 6 * LANES, x + 7 * LANES,
            0, LANES, shift, one, s, ss,
        )
        x += TREE_ROWS * LANES
    if left:
        last_rows(x, left, TREE_ROWS, shift, row, last)
        sum_squares_tree(
            row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7],
            0, LANES, shift, one, s, ss,
        )


cdef inline void set_lanes(lane* lanes, lane value) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(LANES):
        lanes[j] = value


cdef void sum_squares_along(const Block* block, const lane* lane_tag) noexcept nogil:
    cdef Py_ssize_t r, first
    cdef lane one = <lane> bn_one()
    cdef double[LANES] s
    cdef double[LANES] ss
    for r in range(block.n_rows):
        first = r % block.turns * LANES
        memcpy(s, block.sum_1 + first, sizeof(s))
        memcpy(ss, block.sum_2 + first, sizeof(ss))
        sum_squares_run(
            <const lane*> block.row[X][r], block.width, <const lane*> block.shift[X] + first, one,
            s, ss,
        )
        memcpy(block.sum_1 + first, s, sizeof(s))
        memcpy(block.sum_2 + first, ss, sizeof(ss))


cdef void sum_squares_by_row(const Block* block, const lane* lane_tag) noexcept nogil:
    """sum_1[i] = sum_j d_ij,  sum_2[i] = sum_j d_ij^2."""
    cdef Py_ssize_t r
    cdef lane one = <lane> bn_one()
    cdef lane[LANES] shift
    cdef double[LANES] s
    cdef double[LANES] ss
    for r in range(block.n_rows):
        set_lanes[lane](shift, (<const lane*> block.shift[X])[r])
        set_lanes[double](s, 0)
        set_lanes[double](ss, 0)
        sum_squares_run(<const lane*> block.row[X][r], block.width, shift, one, s, ss)
        block.sum_1[r] = bn_fold_lanes(s)
        block.sum_2[r] = bn_fold_lanes(ss)


cdef inline void sum_products_tree(
    const lane* x0, const lane* x1, const lane* x2, const lane* x3,
    const lane* g0, const lane* g1, const lane* g2, const lane* g3,
    Py_ssize_t first, Py_ssize_t last, const lane* shift_x, const lane* shift_g,
    lane one, double* restrict s, double* restrict ss,
    const lane* gate_shift, const lane* gate_coef, const lane* gate_bias, lane slope,
    const activation* activation_tag,
) noexcept nogil:
    """Four rows; eight pairs would fill the ways of a cache set where rows lie 4 KiB apart."""
    cdef Py_ssize_t j
    cdef lane k, m, d0, d1, d2, d3, t0, t1, t2, t3, o = 0, a = 0, c = 0
    for j in range(first, last):
        k = shift_x[j]
        m = shift_g[j]
        if activation is not Identity:
            o = gate_shift[j]
            a = gate_coef[j]
            c = gate_bias[j]
        d0 = plus(x0[j], -k, one)
        d1 = plus(x1[j], -k, one)
        d2 = plus(x2[j], -k, one)
        d3 = plus(x3[j], -k, one)
        t0 = let_through(g0[j], x0[j] - o, a, c, slope, activation_tag)
        t1 = let_through(g1[j], x1[j] - o, a, c, slope, activation_tag)
        t2 = let_through(g2[j], x2[j] - o, a, c, slope, activation_tag)
        t3 = let_through(g3[j], x3[j] - o, a, c, slope, activation_tag)
        t0 = plus(t0, -m, one)
        t1 = plus(t1, -m, one)
        t2 = plus(t2, -m, one)
        t3 = plus(t3, -m, one)
        s[j] += <double> ((t0 + t1) + (t2 + t3))
        ss[j] += <double> ((t0 * d0 + t1 * d1) + (t2 * d2 + t3 * d3))


cdef void sum_products_across(
    const Block* block, const lane* lane_tag, const activation* activation_tag,
) noexcept nogil:
    """sum_1[j] += sum_i t_ij,  sum_2[j] += sum_i t_ij d_ij,  t = dout - shift_g, d = x - shift_x.

    Both sums in one sweep.  dout is shifted too: its mean falls out of sum_td (sum d = 0), but
    would cost its digits there.  Behind an activation dout is what comes through it.
    """
    cdef const lane* shift_x = <const lane*> block.shift[X]
    cdef const lane* shift_g = <const lane*> block.shift[G]
    cdef const lane* gate_shift = <const lane*> block.gate_shift
    cdef const lane* gate_coef = <const lane*> block.gate_coef
    cdef const lane* gate_bias = <const lane*> block.gate_bias
    cdef lane slope = <lane> block.slope
    cdef char** x_rows = block.row[X]
    cdef char** g_rows = block.row[G]
    cdef Py_ssize_t i, strip, width = block.width, ahead = block.ahead
    cdef Py_ssize_t step = STRIP if ahead else width
    cdef lane one = <lane> bn_one()
    for i in range(0, block.n_rows, 4):
        strip = 0
        while strip < width:
            if ahead:
                prefetch_share(x_rows + i + ahead, 4, strip, width, lane_tag)
                prefetch_share(g_rows + i + ahead, 4, strip, width, lane_tag)
            sum_products_tree(
                <const lane*> x_rows[i], <const lane*> x_rows[i + 1],
                <const lane*> x_rows[i + 2], <const lane*> x_rows[i + 3],
                <const lane*> g_rows[i], <const lane*> g_rows[i + 1],
                <const lane*> g_rows[i + 2], <const lane*> g_rows[i + 3],
                strip, min(strip + step, width), shift_x, shift_g, one, block.sum_1, block.sum_2,
                gate_shift, gate_coef, gate_bias, slope, activation_tag,
            )
            strip += step


cdef inline void sum_products_run(
    const lane* x, const lane* g, Py_ssize_t width, const lane* shift_x, const lane* shift_g,
    lane one, double* restrict s, double* restrict ss,
    const lane* gate_shift, const lane* gate_coef, const lane* gate_bias, lane slope,
    const activation* activation_tag,
) noexcept nogil:
    """The same of a row of one feature, wound up on LANES columns."""
    cdef Py_ssize_t i
    cdef Py_ssize_t trees = width // (4 * LANES), left = width % (4 * LANES)
    cdef const lane* x_row[4]
    cdef const lane* g_row[4]
    cdef lane[LANES] x_last
    cdef lane[LANES] g_last
    for i in range(trees):
        sum_products_tree(
            x, x + LANES, x + 2 * LANES, x + 3 * LANES,
            g, g + LANES, g + 2 * LANES, g + 3 * LANES,
            0, LANES, shift_x, shift_g, one, s, ss,
            gate_shift, gate_coef, gate_bias, slope, activation_tag,
        )
        x += 4 * LANES
        g += 4 * LANES
    if left:
        last_rows(x, left, 4, shift_x, x_row, x_last)
        last_rows(g, left, 4, shift_g, g_row, g_last)
        sum_products_tree(
            x_row[0], x_row[1], x_row[2], x_row[3], g_row[0], g_row[1], g_row[2], g_row[3],
            0, LANES, shift_x, shift_g, one, s, ss,
            gate_shift, gate_coef, gate_bias, slope, activation_tag,
        )


cdef void sum_products_along(
    const Block* block, const lane* lane_tag, const activation* activation_tag,
) noexcept nogil:
    cdef Py_ssize_t r, first
    cdef lane one = <lane> bn_one()
    cdef double[LANES] s
    cdef double[LANES] ss
    for r in range(block.n_rows):
        first = r % block.turns * LANES
        memcpy(s, block.sum_1 + first, sizeof(s))
        memcpy(ss, block.sum_2 + first, sizeof(ss))
        sum_products_run(
            <const lane*> block.row[X][r], <const lane*> block.row[G][r], block.width,
            <const lane*> block.shift[X] + first, <const lane*> block.shift[G] + first, one, s, ss,
            <const lane*> block.gate_shift + first, <const lane*> block.gate_coef + first,
            <const lane*> block.gate_bias + first, <lane> block.slope, activation_tag,
        )
        memcpy(block.sum_1 + first, s, sizeof(s))
        memcpy(block.sum_2 + first, ss, sizeof(ss))


cdef inline void sum_scaled_tree(
    const lane* x, const lane* g, const lane* scale, lane shift_x, lane shift_g, lane one,
    double* restrict s, double* restrict ss,
) noexcept nogil:
    """Four times LANES elements of a row, t = scale g - its shift."""
    cdef Py_ssize_t j
    cdef lane d0, d1, d2, d3, t0, t1, t2, t3
    for j in range(LANES):
        d0 = plus(x[j], -shift_x, one)
        d1 = plus(x[LANES + j], -shift_x, one)
        d2 = plus(x[2 * LANES + j], -shift_x, one)
        d3 = plus(x[3 * LANES + j], -shift_x, one)
        t0 = g[j] * scale[j] - shift_g
        t1 = g[LANES + j] * scale[LANES + j] - shift_g
        t2 = g[2 * LANES + j] * scale[2 * LANES + j] - shift_g
        t3 = g[3 * LANES + j] * scale[3 * LANES + j] - shift_g
        s[j] += <double> ((t0 + t1) + (t2 + t3))
        ss[j] += <double> ((t0 * d0 + t1 * d1) + (t2 * d2 + t3 * d3))


cdef inline void sum_scaled_run(
    const lane* x, const lane* g, const lane* scale, Py_ssize_t width, lane shift_x, lane shift_g,
    double* restrict s, double* restrict ss,
) noexcept nogil:
    cdef Py_ssize_t i, k, whole = width // (4 * LANES) * (4 * LANES), left = width - whole
    cdef lane[4 * LANES] x_last, g_last, last
    cdef lane one = <lane> bn_one()
    for i in range(0, whole, 64):  # 4 * LANES; Cython wants a literal step
        sum_scaled_tree(x + i, g + i, scale + i, shift_x, shift_g, one, s, ss)
    if left:
        # What is missing adds 0; filled in first, as to choose value by value took longer than the
        # sums: group norm's backward of (16, 512, 7, 7), one thread, 1.18 to 0.85 ms.
        for k in range(4 * LANES):
            x_last[k] = shift_x
            g_last[k] = shift_g
            last[k] = 1
        memcpy(x_last, x + whole, left * sizeof(lane))
        memcpy(g_last, g + whole, left * sizeof(lane))
        memcpy(last, scale + whole, left * sizeof(lane))
        sum_scaled_tree(x_last, g_last, last, shift_x, shift_g, one, s, ss)


cdef void sum_products_by_row(
    const Block* block, const lane* lane_tag, const activation* activation_tag,
) noexcept nogil:
    """sum_1[i] = sum_j t_ij,  sum_2[i] = sum_j t_ij d_ij.  No norm of rows has an activation."""
    cdef Py_ssize_t r
    cdef lane one = <lane> bn_one()
    cdef lane[LANES] shift_x
    cdef lane[LANES] shift_g
    cdef double[LANES] s
    cdef double[LANES] ss
    for r in range(block.n_rows):
        set_lanes[lane](shift_x, (<const lane*> block.shift[X])[r])
        set_lanes[lane](shift_g, (<const lane*> block.shift[G])[r])
        set_lanes[double](s, 0)
        set_lanes[double](ss, 0)
        if block.formula != SCALED_GRADIENT:
            sum_products_run(
                <const lane*> block.row[X][r], <const lane*> block.row[G][r], block.width,
                shift_x, shift_g, one, s, ss, shift_x, shift_x, shift_x, 0,
                <const Identity*> NULL,
            )
        else:
            sum_scaled_run(
                <const lane*> block.row[X][r], <const lane*> block.row[G][r],
                <const lane*> block.row[S][r], block.width, shift_x[0], shift_g[0], s, ss,
            )
        block.sum_1[r] = bn_fold_lanes(s)
        block.sum_2[r] = bn_fold_lanes(ss)


cdef void sum_products_walked(
    const Block* block, const lane* lane_tag, const activation* activation_tag,
) noexcept nogil:
    if block.walk == ACROSS:
        sum_products_across(block, lane_tag, activation_tag)
    elif block.walk == ALONG:
        sum_products_along(block, lane_tag, activation_tag)
    elif activation is Identity:
        sum_products_by_row(block, lane_tag, activation_tag)


# ---------------------------------------------------------------- sums for gamma and beta
#
# dbeta = sum dout and dgamma = sum dout x_hat of the parameters that vary within a statistic,
# x_hat = (x - shift) scale + rest.

cdef inline lane x_hat_of(lane x, lane shift, lane scale, lane rest) noexcept nogil:
    return (x - shift) * scale + rest


cdef inline void differentiate_four(
    const lane* restrict x0, const lane* restrict x1,
    const lane* restrict x2, const lane* restrict x3,
    const lane* restrict g0, const lane* restrict g1,
    const lane* restrict g2, const lane* restrict g3,
    lane* restrict y0, lane* restrict y1, lane* restrict y2, lane* restrict y3, Py_ssize_t width,
    const lane* k, const lane* m, const lane* a, const lane* b, const lane* c,
    const lane* scale, const lane* rest, const lane* restrict factor,
    double* restrict s, double* restrict ss, bint writes,
) noexcept nogil:
    """Parameters along the rows, each of which has its own statistics: columns' sums.  And, if asked
    for, the rows of dx as SCALED_GRADIENT makes them: in one walk, as most of either is to come by
    x and dout."""
    cdef Py_ssize_t j
    cdef lane k0 = k[0], k1 = k[1], k2 = k[2], k3 = k[3]
    cdef lane m0 = m[0], m1 = m[1], m2 = m[2], m3 = m[3]
    cdef lane a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3]
    cdef lane b0 = b[0], b1 = b[1], b2 = b[2], b3 = b[3]
    cdef lane c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3]
    cdef lane r0 = scale[0], r1 = scale[1], r2 = scale[2], r3 = scale[3]
    cdef lane h0 = rest[0], h1 = rest[1], h2 = rest[2], h3 = rest[3]
    cdef lane d0, d1, d2, d3, t0, t1, t2, t3, f
    for j in range(width):
        f = factor[j]
        t0 = g0[j]
        t1 = g1[j]
        t2 = g2[j]
        t3 = g3[j]
        d0 = x0[j] - k0
        d1 = x1[j] - k1
        d2 = x2[j] - k2
        d3 = x3[j] - k3
        s[j] += <double> ((t0 + t1) + (t2 + t3))
        ss[j] += <double> (
            (t0 * (d0 * r0 + h0) + t1 * (d1 * r1 + h1))
            + (t2 * (d2 * r2 + h2) + t3 * (d3 * r3 + h3))
        )
        if writes:
            y0[j] = ((t0 * f - m0) * b0 + d0 * a0) + c0
            y1[j] = ((t1 * f - m1) * b1 + d1 * a1) + c1
            y2[j] = ((t2 * f - m2) * b2 + d2 * a2) + c2
            y3[j] = ((t3 * f - m3) * b3 + d3 * a3) + c3


cdef void sum_one_row(
    const lane* restrict x, const lane* restrict g, Py_ssize_t width, lane shift, lane scale,
    lane rest, Py_ssize_t step, double* restrict s, double* restrict ss,
) noexcept nogil:
    """The same of one row, whose parameters lie `step` apart."""
    cdef Py_ssize_t j
    for j in range(width):
        s[j * step] += <double> g[j]
        ss[j * step] += <double> (g[j] * x_hat_of(x[j], shift, scale, rest))


cdef void sum_of_row(
    const lane* restrict x, const lane* restrict g, Py_ssize_t width,
    const lane* restrict shift, const lane* restrict scale, const lane* restrict rest,
    double* s, double* ss,
) noexcept nogil:
    """One parameter for the row, whose columns have constants of their own."""
    cdef Py_ssize_t i, j, k, whole = width // LANES * LANES
    cdef double[LANES] sums
    cdef double[LANES] products
    set_lanes[double](sums, 0)
    set_lanes[double](products, 0)
    for i in range(0, whole, 16):  # LANES; Cython wants a literal step
        for j in range(LANES):
            k = i + j
            sums[j] += <double> g[k]
            products[j] += <double> (g[k] * x_hat_of(x[k], shift[k], scale[k], rest[k]))
    for j in range(width - whole):
        k = whole + j
        sums[j] += <double> g[k]
        products[j] += <double> (g[k] * x_hat_of(x[k], shift[k], scale[k], rest[k]))
    s[0] += bn_fold_lanes(sums)
    ss[0] += bn_fold_lanes(products)
