# What a kernel sees, and what all loops over the columns of rows share.  Those that sum are in
# sums.pxi, those that write in output.pxi, those that weigh rows first in filters.pxi.
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
#       root goes into the double accumulator of the column.  A tree adds some four roundings, so
#       that a float32 sum is as good as one in double to about 2^-24 / sqrt(rows), at twice the
#       speed of converting every element (256 x 512 in L2, AVX-512, trees of eight: 13.3 against
#       6.8 Gelem/s).
#   (b) Order.  Column j meets its rows in order and the tree is fixed, so the result does not
#       depend on the vector length: the same bits on every instruction set (contraction is off).
#   (c) Squares.  d = x - shift with the shift near the mean, never E[x^2] - E[x]^2: x - shift is
#       exact for x within a factor of two of the shift (Sterbenz), whatever the offset.
#   (d) Rows come in multiples of TREE_ROWS for sums, of APPLY_ROWS for output; the caller pads with
#       rows equal to the shift, which add exactly 0, and with a spare row to write to, instead of a
#       second loop here for the rest.
#   (e) Most loops are written in vectors, see below.  In those left to the compiler sums are
#       `restrict`: nothing else points at them, so that it need not ask at run time whether it may
#       vectorize.
#   (f) Rows from far away (see prefetch_bytes) are walked strip by strip of STRIP columns, and with
#       each strip its share of the rows that come next is prefetched, in the order of memory: the
#       hardware's prefetchers lose the thread among eight rows.  Sums of (50000, 256), one thread:
#       4.9 ms without, so 2.1, one sequential read 1.2; two threads, in C, with each row's strip
#       instead 2.3, so 1.1 (AMD EPYC, Zen 4, 2026-11-26).

cdef extern from "_native.h" nogil:
    void bn_prefetch(const char* address, Py_ssize_t n)
    void bn_stream(char* to, const char* from_, Py_ssize_t n)
    void bn_stream_end()
    bint BN_STREAMS
    double bn_one()
    double bn_fold_lanes(const double* values)  # LANES of them

cdef extern from "_vectors.h" nogil:
    ctypedef float bn_floats   # vectors; Cython believes that they are numbers,
    ctypedef double bn_doubles
    ctypedef long double bn_halves  # of floats that rows have in 16 bits, as bfloat16 or float16,
    int BN_VECTOR              # of so many bytes;
    ctypedef struct bn_line:   # sums of LANES lanes;
        pass
    bn_line bn_no_sums()
    double bn_fold_line(bn_line* s)
    # and that these take and return some: x + y by the units that multiply where there are such; a
    # where z <= 0, else b; x in all lanes; n lanes, 0 in the rest.
    double bn_plus(double x, double y, double one)
    double bn_choose(double z, double a, double b)
    double bn_like(double v, double x)
    double bn_part(double v, int n)
    double bn_load_part(double v, const char* from_, int n)
    void bn_store_part(char* to, double v, int n)
    void bn_add_lanes(double* s, double v)
    void bn_add_part(double* s, double v, int n)
    void bn_stream_vector(char* to, double v)
    bint BN_HALVES             # whether these pay
    double bn_load_halves(const char* from_, bint brain)
    double bn_load_halves_part(const char* from_, int n, bint brain)
    void bn_store_halves(char* to, double v, bint brain)
    void bn_store_halves_part(char* to, double v, int n, bint brain)
    void bn_stream_halves(char* to, double v, bint brain)

ctypedef fused lane:
    float
    double

ctypedef fused vector:        # of lanes, which most loops are written in
    bn_floats
    bn_doubles
    bn_halves

cdef enum:                    # kinds of vectors
    FLOATS
    DOUBLES
    HALVES
    N_KINDS

cdef enum:
    # Rows come in multiples of this; a tree has so many, or twice that, of x alone, and half as
    # many of x and dout, see rows_of_tree.
    TREE_ROWS = 8
    APPLY_ROWS = 4
    MAX_COLUMNS = 1056        # of a row
    STRIP = 64
    LINE_BYTES = 64
    PAGE_BYTES = 4096
    TREE_LINES = 16           # of LANES elements, along a run
    AHEAD_ALONG = 4096        # bytes of a run from far away that are prefetched
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
    Py_ssize_t tree_rows      # of x alone; half as many of x and dout
    Py_ssize_t ahead          # so many rows more are known and are prefetched; 0: none
    Walk walk
    int kind                  # of vectors: how rows are stored, and lanes; constants are lanes
    bint brain                # of 16 bits: bfloat16
    Py_ssize_t turns          # features whose rows take turns, and how far apart their constants
    Py_ssize_t turn_bytes     # are; rows that have their own never come to the end
    bint singly               # rows are written one by one,
    bint stream               # and past the caches
    bint weighed              # sums of x alone: each row has one weight
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


cdef inline vector activate(
    vector z, vector slope, const activation* activation_tag,
) noexcept nogil:
    if activation is Relu:
        return bn_choose(z, bn_like(z, 0), z)
    elif activation is LeakyRelu:
        return bn_choose(z, slope * z, z)
    else:
        return z


cdef inline vector gate(
    vector g, vector z, vector slope, const activation* activation_tag,
) noexcept nogil:
    """What of a gradient with respect to activate(z) comes through to z."""
    if activation is Relu:
        return bn_choose(z, bn_like(z, 0), g)
    elif activation is LeakyRelu:
        return bn_choose(z, slope * g, g)
    else:
        return g


cdef bint is_open(double z, double slope, const activation* activation_tag) noexcept nogil:
    """Whether a gradient comes through to z as it is."""
    cdef bn_doubles one
    cdef double[LANES] opened
    one = bn_like(one, 1)
    memset(opened, 0, sizeof(opened))
    bn_add_lanes(
        opened,
        gate[bn_doubles, activation](one, bn_like(one, z), bn_like(one, slope), activation_tag),
    )
    return opened[0] == 1


cdef inline vector let_through(
    vector g, vector d, vector a, vector c, vector slope, const activation* activation_tag,
) noexcept nogil:
    """What of dout comes through the activation: forward's own arithmetic decides, to the bit, from
    d = x - its shift on."""
    if activation is Identity:
        return g
    else:
        return gate[vector, activation](g, d * a + c, slope, activation_tag)


cdef inline void prefetch_share(
    char** rows, Py_ssize_t n_rows, Py_ssize_t place, Py_ssize_t n_bytes, Py_ssize_t row_bytes,
) noexcept nogil:
    """A strip's share of some rows, in the order of memory, see (f); of rows of a page or more,
    which the hardware's prefetchers follow, the strip of each: (16384, 1024) 5 % faster."""
    cdef Py_ssize_t n, left = n_bytes * n_rows
    if row_bytes >= PAGE_BYTES:
        for n in range(n_rows):
            bn_prefetch(rows[n] + place, n_bytes)
        return
    place *= n_rows
    rows += place // row_bytes
    place %= row_bytes
    while left > 0:
        n = min(left, row_bytes - place)
        bn_prefetch(rows[0] + place, n)
        left -= n
        place = 0
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


cdef inline Py_ssize_t next_marked(
    const double* restrict marks, Py_ssize_t f, Py_ssize_t end,
) noexcept nogil:
    """The first of features f .. end - 1 whose mark is not 0, or the end, by eights where
    there is none: few are."""
    while f + 8 <= end and fold_run(marks + f, 8) == 0:
        f += 8
    while f < end and marks[f] == 0:
        f += 1
    return f


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


# ---------------------------------------------------------------- in vectors
#
# What follows is written in vectors, at places in bytes.  Where rows have some dozen elements gcc
# makes none of a loop over lanes, or keeps in memory what belongs in registers: (8, 64, 14, 14),
# one thread, 30 and 46 us, so 23 and 37.  The last vector of a row may have fewer lanes.

cdef inline Py_ssize_t size_of_lane(const vector* vector_tag) noexcept nogil:
    return sizeof(double) if vector is bn_doubles else sizeof(float)


cdef inline Py_ssize_t in_row(Py_ssize_t place, const vector* vector_tag) noexcept nogil:
    """Where a row has what lanes have at a place."""
    return place >> 1 if vector is bn_halves else place


cdef inline Py_ssize_t in_lanes(Py_ssize_t place, const vector* vector_tag) noexcept nogil:
    """And the other way round."""
    return 2 * place if vector is bn_halves else place


cdef inline vector load(
    const char* row, Py_ssize_t place, int n, bint part, const vector* vector_tag,
) noexcept nogil:
    """The vector at a place, or n lanes of it."""
    cdef vector v
    if part:
        return bn_load_part(v, row + place, n)
    return (<const vector*> (row + place))[0]


cdef inline vector load_row(
    const char* row, Py_ssize_t place, int n, bint part, bint brain, const vector* vector_tag,
) noexcept nogil:
    """The same of a row of an array, as it is stored."""
    if vector is not bn_halves:
        return load[vector](row, place, n, part, NULL)
    elif part:
        return bn_load_halves_part(row + (place >> 1), n, brain)
    else:
        return bn_load_halves(row + (place >> 1), brain)


cdef inline vector fill(const char* values, const vector* vector_tag) noexcept nogil:
    """A constant in all lanes."""
    cdef vector v
    if vector is bn_doubles:
        return bn_like(v, (<const double*> values)[0])
    else:
        return bn_like(v, (<const float*> values)[0])
