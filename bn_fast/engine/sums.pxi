# Sums: rows in, two sums of each column out, or of each row, if they are one feature's; or those
# for gamma and beta that vary within a statistic.

# ---------------------------------------------------------------- of vectors

cdef enum:                    # constants of sums
    SHIFT
    SHIFT_OF_G
    OPEN_SHIFT
    OPEN_COEF
    OPEN_BIAS
    SLOPE
    ONE
    WEIGHT
    N_OF_SUMS

cdef struct Squares:          # t = d
    char unused

cdef struct WeighedSquares:   # t = w d
    char unused

cdef struct Products:         # t = what of dout comes through - its shift
    char unused

cdef struct ScaledProducts:   # t = scale dout - its shift
    char unused

ctypedef fused terms:
    Squares
    WeighedSquares
    Products
    ScaledProducts


cdef inline vector term_of(
    vector x, vector g, vector scale, const vector* c,
    const activation* activation_tag, const terms* terms_tag,
) noexcept nogil:
    if terms is Squares:
        return bn_plus(x, -c[SHIFT], c[ONE])
    elif terms is WeighedSquares:
        return scale * bn_plus(x, -c[SHIFT], c[ONE])
    elif terms is Products:
        g = let_through[vector, activation](
            g, x - c[OPEN_SHIFT], c[OPEN_COEF], c[OPEN_BIAS], c[SLOPE], activation_tag
        )
        return bn_plus(g, -c[SHIFT_OF_G], c[ONE])
    else:
        return g * scale - c[SHIFT_OF_G]


cdef inline void sum_four(
    vector x0, vector x1, vector x2, vector x3, vector g0, vector g1, vector g2, vector g3,
    vector s0, vector s1, vector s2, vector s3, const vector* c, vector* made,
    const activation* activation_tag, const terms* terms_tag,
) noexcept nogil:
    """The trees of t and t d of four vectors; s are weights, or what dout is scaled by."""
    cdef vector t0 = term_of[vector, activation, terms](x0, g0, s0, c, NULL, NULL)
    cdef vector t1 = term_of[vector, activation, terms](x1, g1, s1, c, NULL, NULL)
    cdef vector t2 = term_of[vector, activation, terms](x2, g2, s2, c, NULL, NULL)
    cdef vector t3 = term_of[vector, activation, terms](x3, g3, s3, c, NULL, NULL)
    made[0] = (t0 + t1) + (t2 + t3)
    t0 = t0 * bn_plus(x0, -c[SHIFT], c[ONE])
    t1 = t1 * bn_plus(x1, -c[SHIFT], c[ONE])
    t2 = t2 * bn_plus(x2, -c[SHIFT], c[ONE])
    t3 = t3 * bn_plus(x3, -c[SHIFT], c[ONE])
    made[1] = (t0 + t1) + (t2 + t3)


# ---------------------------------------------------------------- sums across rows

cdef struct Tree:             # rows of x, and of dout, and their columns' constants
    const char* x[2 * TREE_ROWS]
    const char* g[2 * TREE_ROWS]
    const char* w[2 * TREE_ROWS]
    const char* constant[SLOPE]
    bint brain                # rows of 16 bits are of bfloat16

cdef inline vector weight_of(
    const Tree* p, int row, const vector* c, const terms* terms_tag,
) noexcept nogil:
    return fill[vector](p.w[row], NULL) if terms is WeighedSquares else c[ONE]


cdef inline void sum_four_rows(
    const Tree* p, int first, Py_ssize_t place, int n, bint part, const vector* c, vector* made,
    const activation* activation_tag, const terms* terms_tag,
) noexcept nogil:
    cdef const char** x = <const char**> &p.x[first]
    cdef const char** g = x
    if terms is Products:
        g = <const char**> &p.g[first]
    sum_four[vector, activation, terms](
        load_row[vector](x[0], place, n, part, p.brain, NULL),
        load_row[vector](x[1], place, n, part, p.brain, NULL),
        load_row[vector](x[2], place, n, part, p.brain, NULL),
        load_row[vector](x[3], place, n, part, p.brain, NULL),
        load_row[vector](g[0], place, n, part, p.brain, NULL),
        load_row[vector](g[1], place, n, part, p.brain, NULL),
        load_row[vector](g[2], place, n, part, p.brain, NULL),
        load_row[vector](g[3], place, n, part, p.brain, NULL),
        weight_of[vector, terms](p, first, c, NULL),
        weight_of[vector, terms](p, first + 1, c, NULL),
        weight_of[vector, terms](p, first + 2, c, NULL),
        weight_of[vector, terms](p, first + 3, c, NULL), c, made, NULL, NULL,
    )


cdef inline void sum_eight_rows(
    const Tree* p, int first, Py_ssize_t place, int n, bint part, const vector* c, vector* made,
    const activation* activation_tag, const terms* terms_tag,
) noexcept nogil:
    cdef vector[2] more
    sum_four_rows[vector, activation, terms](p, first, place, n, part, c, made, NULL, NULL)
    sum_four_rows[vector, activation, terms](p, first + 4, place, n, part, c, more, NULL, NULL)
    made[0] = made[0] + more[0]
    made[1] = made[1] + more[1]


cdef inline void sum_tree_of_rows(
    const Tree* p, int rows, Py_ssize_t place, int n, bint part, const vector* c, vector* made,
    const activation* activation_tag, const terms* terms_tag,
) noexcept nogil:
    """Four, eight or sixteen rows, of one vector of columns or n lanes of it.  Of sixteen there are
    half as many sums in double, which cost as much as the rest ((256, 512) on one thread 8.9 to 7.9
    us; of 32 rows no less)."""
    cdef vector[2] more
    if rows < TREE_ROWS:
        sum_four_rows[vector, activation, terms](p, 0, place, n, part, c, made, NULL, NULL)
        return
    sum_eight_rows[vector, activation, terms](p, 0, place, n, part, c, made, NULL, NULL)
    if rows > TREE_ROWS:
        sum_eight_rows[vector, activation, terms](p, TREE_ROWS, place, n, part, c, more, NULL, NULL)
        made[0] = made[0] + more[0]
        made[1] = made[1] + more[1]


cdef inline void add_tree(
    const Tree* p, int rows, Py_ssize_t place, int n, bint part, vector* c,
    double* s, double* ss, const activation* activation_tag, const terms* terms_tag,
) noexcept nogil:
    """A tree of rows onto the sums of one vector of columns."""
    cdef vector[2] made
    cdef int i
    for i in range(SLOPE):
        if i == SHIFT or (terms is Products and (i == SHIFT_OF_G or activation is not Identity)):
            c[i] = load[vector](p.constant[i], place, n, part, NULL)
    sum_tree_of_rows[vector, activation, terms](p, rows, place, n, part, c, made, NULL, NULL)
    if part:
        bn_add_part(s, made[0], n)
        bn_add_part(ss, made[1], n)
    else:
        bn_add_lanes(s, made[0])
        bn_add_lanes(ss, made[1])


cdef inline void add_trees(
    const Tree* p, int rows, Py_ssize_t place, Py_ssize_t end, vector* c,
    double* s, double* ss, const activation* activation_tag, const terms* terms_tag,
) noexcept nogil:
    """The same from one place to another."""
    cdef Py_ssize_t size = size_of_lane[vector](NULL)
    cdef int left
    while place + BN_VECTOR <= end:
        add_tree[vector, activation, terms](
            p, rows, place, 0, False, c, s + place // size, ss + place // size, NULL, NULL
        )
        place += BN_VECTOR
    left = <int> ((end - place) // size)
    if left:
        add_tree[vector, activation, terms](
            p, rows, place, left, True, c, s + place // size, ss + place // size, NULL, NULL
        )


cdef void sum_across(
    const Block* block, const vector* vector_tag, const activation* activation_tag,
    const terms* terms_tag,
) noexcept nogil:
    """sum_1[j] += sum_i t_ij,  sum_2[j] += sum_i t_ij d_ij,  d = x - shift_x,  t = dout - shift_g,
    or d.

    Both sums in one sweep.  dout is shifted too: its mean falls out of sum_td (sum d = 0), but
    would cost its digits there.  Behind an activation dout is what comes through it.  Half as many
    rows of x and dout as of x alone: eight or four.  (256, 10, 100) backward 49 to 46 us by eights
    on two threads, (1000, 333) 67 to 64; but (256, 1024), whose rows lie whole pages apart, 62.7 to
    64.9.
    """
    cdef Py_ssize_t size = size_of_lane[vector](NULL)
    cdef Py_ssize_t i, k, place, end, n_bytes = block.width * size, ahead = block.ahead
    cdef Py_ssize_t step = STRIP * size if ahead else n_bytes, n, share
    cdef Py_ssize_t row_bytes = in_row[vector](n_bytes, NULL)
    cdef Tree p
    cdef vector[N_OF_SUMS] c
    c[ONE] = bn_like(c[ONE], bn_one())
    c[SLOPE] = bn_like(c[SLOPE], block.slope)
    p.brain = block.brain
    p.constant[SHIFT] = block.shift[X]
    p.constant[SHIFT_OF_G] = block.shift[G]
    p.constant[OPEN_SHIFT] = block.gate_shift
    p.constant[OPEN_COEF] = block.gate_coef
    p.constant[OPEN_BIAS] = block.gate_bias
    i = 0
    while i < block.n_rows:
        n = min(block.tree_rows // (2 if terms is Products else 1), block.n_rows - i)
        for k in range(n):
            p.x[k] = block.row[X][i + k]
            if terms is Products:
                p.g[k] = block.row[G][i + k]
            elif terms is WeighedSquares:
                p.w[k] = block.row[W][i + k]
        place = 0
        while place < n_bytes:
            end = min(place + step, n_bytes)
            if ahead:
                share = in_row[vector](end - place, NULL)
                prefetch_share(
                    block.row[X] + i + ahead, n, in_row[vector](place, NULL), share, row_bytes
                )
                if terms is Products:
                    prefetch_share(
                        block.row[G] + i + ahead, n, in_row[vector](place, NULL), share, row_bytes
                    )
            if terms is not Products and n > TREE_ROWS:
                add_trees[vector, activation, terms](
                    &p, 2 * TREE_ROWS, place, end, c, block.sum_1, block.sum_2, NULL, NULL
                )
            elif terms is not Products or n == TREE_ROWS:
                add_trees[vector, activation, terms](
                    &p, TREE_ROWS, place, end, c, block.sum_1, block.sum_2, NULL, NULL
                )
            else:
                add_trees[vector, activation, terms](
                    &p, TREE_ROWS // 2, place, end, c, block.sum_1, block.sum_2, NULL, NULL
                )
            place = end
        i += n


# ---------------------------------------------------------------- sums along rows
#
# A row of one feature is wound up on LANES columns: a sequential read, which needs no prefetch (in
# bursts of a run's length they cost up to 40 %, NCHW with 14 x 14) but line by line from memory:
# (32, 64, 56, 56), two threads, 2.46 and 3.15 ms, so 2.15 and 2.91.  Sixteen lines of LANES are a
# tree: fours, what is left one by one, the rest of the last; of shorter vectors some make a line.

cdef inline vector line_of(
    const char* row, int k, bint brain, const vector* vector_tag,
) noexcept nogil:
    """A vector of the k-th line from here."""
    return load_row[vector](row, k * LANES * size_of_lane[vector](NULL), 0, False, brain, NULL)


cdef inline vector scale_at(
    const char* scale, int k, int n, bint part, const vector* c, const terms* terms_tag,
) noexcept nogil:
    """Of the k-th line from here, or of the first n lanes; one weight for all of a row."""
    if terms is WeighedSquares:
        return c[WEIGHT]
    elif terms is ScaledProducts:
        return load[vector](scale, k * LANES * size_of_lane[vector](NULL), n, part, NULL)
    else:
        return c[ONE]


cdef inline void sum_tree(
    const char* x, const char* g, const char* scale, Py_ssize_t n, int left, const vector* c,
    bint far, bint brain, double* s, double* ss, const activation* activation_tag,
    const terms* terms_tag,
) noexcept nogil:
    """The sums of a vector of n lines each, and of the first lanes of one more."""
    cdef Py_ssize_t lanes_line = LANES * size_of_lane[vector](NULL)
    cdef Py_ssize_t line = in_row[vector](lanes_line, NULL)
    cdef vector x0, t0, sums, products
    cdef vector[2] made
    sums = bn_like(sums, 0)
    products = sums
    while n >= 4:
        if far:
            bn_prefetch(x + AHEAD_ALONG, 4 * line)
            if terms is Products or terms is ScaledProducts:
                bn_prefetch(g + AHEAD_ALONG, 4 * line)
        sum_four[vector, activation, terms](
            line_of[vector](x, 0, brain, NULL), line_of[vector](x, 1, brain, NULL),
            line_of[vector](x, 2, brain, NULL), line_of[vector](x, 3, brain, NULL),
            line_of[vector](g, 0, brain, NULL), line_of[vector](g, 1, brain, NULL),
            line_of[vector](g, 2, brain, NULL), line_of[vector](g, 3, brain, NULL),
            scale_at[vector, terms](scale, 0, 0, False, c, NULL),
            scale_at[vector, terms](scale, 1, 0, False, c, NULL),
            scale_at[vector, terms](scale, 2, 0, False, c, NULL),
            scale_at[vector, terms](scale, 3, 0, False, c, NULL), c, made, NULL, NULL,
        )
        sums = sums + made[0]
        products = products + made[1]
        x += 4 * line
        g += 4 * line
        scale += 4 * lanes_line
        n -= 4
    while n > 0:
        x0 = line_of[vector](x, 0, brain, NULL)
        t0 = term_of[vector, activation, terms](
            x0, line_of[vector](g, 0, brain, NULL),
            scale_at[vector, terms](scale, 0, 0, False, c, NULL), c, NULL, NULL,
        )
        sums = sums + t0
        products = products + t0 * bn_plus(x0, -c[SHIFT], c[ONE])
        x += line
        g += line
        scale += lanes_line
        n -= 1
    if left > 0:
        x0 = load_row[vector](x, 0, left, True, brain, NULL)
        t0 = term_of[vector, activation, terms](
            x0, load_row[vector](g, 0, left, True, brain, NULL),
            scale_at[vector, terms](scale, 0, left, True, c, NULL), c, NULL, NULL,
        )
        t0 = bn_part(t0, left)
        sums = sums + t0
        products = products + t0 * bn_part(bn_plus(x0, -c[SHIFT], c[ONE]), left)
    bn_add_lanes(s, sums)
    bn_add_lanes(ss, products)


cdef inline void sum_row(
    const char* x, const char* g, const char* scale, Py_ssize_t width, const vector* c, bint far,
    bint brain, double* s, double* ss, const activation* activation_tag, const terms* terms_tag,
) noexcept nogil:
    """Tree by tree, as vectors shorter than a line would else take two walks from memory."""
    cdef Py_ssize_t size = size_of_lane[vector](NULL)
    cdef int lanes = <int> (BN_VECTOR // size), left = <int> (width % LANES), rest, part
    cdef Py_ssize_t now, n = width // LANES
    while True:
        now = min(n, <Py_ssize_t> TREE_LINES)
        n -= now
        rest = left if n == 0 else 0
        for part in range(LANES // lanes):
            sum_tree[vector, activation, terms](
                x + in_row[vector](part * BN_VECTOR, NULL),
                g + in_row[vector](part * BN_VECTOR, NULL), scale + part * BN_VECTOR, now,
                min(lanes, rest - part * lanes), c, far and part == 0, brain, s + part * lanes,
                ss + part * lanes, NULL, NULL,
            )
        if n == 0:
            return
        x += in_row[vector](now * LANES * size, NULL)
        g += in_row[vector](now * LANES * size, NULL)
        scale += now * LANES * size


cdef inline void point_row(
    const Block* block, Py_ssize_t i, char** x, char** g, char** scale, const terms* terms_tag,
) noexcept nogil:
    x[0] = block.row[X][i]
    g[0] = block.row[G][i] if terms is Products or terms is ScaledProducts else x[0]
    scale[0] = block.row[S][i] if terms is ScaledProducts else x[0]


cdef void sum_runs(
    const Block* block, const vector* vector_tag, const activation* activation_tag,
    const terms* terms_tag,
) noexcept nogil:
    """Rows of one feature, or of some that take turns."""
    cdef Py_ssize_t i, place, turn = 0
    cdef char* x
    cdef char* g
    cdef char* scale
    cdef vector[N_OF_SUMS] c
    c[ONE] = bn_like(c[ONE], bn_one())
    c[SLOPE] = bn_like(c[SLOPE], block.slope)
    for i in range(block.n_rows):
        point_row(block, i, &x, &g, &scale, terms_tag)
        place = turn * LANES * size_of_lane[vector](NULL)
        c[SHIFT] = fill[vector](block.shift[X] + place, NULL)
        c[SHIFT_OF_G] = fill[vector](block.shift[G] + place, NULL)
        if terms is WeighedSquares:
            c[WEIGHT] = fill[vector](block.row[W][i], NULL)
        if activation is not Identity:
            c[OPEN_SHIFT] = fill[vector](block.gate_shift + place, NULL)
            c[OPEN_COEF] = fill[vector](block.gate_coef + place, NULL)
            c[OPEN_BIAS] = fill[vector](block.gate_bias + place, NULL)
        sum_row[vector, activation, terms](
            x, g, scale, block.width, c, block.ahead, block.brain, block.sum_1 + turn * LANES,
            block.sum_2 + turn * LANES, NULL, NULL,
        )
        turn = turn + 1 if turn + 1 < block.turns else 0


cdef void sum_own_rows(
    const Block* block, const vector* vector_tag, const terms* terms_tag,
) noexcept nogil:
    """Rows of one feature each, whose sums stay in registers until they are folded."""
    cdef Py_ssize_t i, place
    cdef char* x
    cdef char* g
    cdef char* scale
    cdef vector[N_OF_SUMS] c
    cdef bn_line sums, products
    c[ONE] = bn_like(c[ONE], bn_one())
    for i in range(block.n_rows):
        point_row(block, i, &x, &g, &scale, terms_tag)
        place = i * size_of_lane[vector](NULL)
        c[SHIFT] = fill[vector](block.shift[X] + place, NULL)
        c[SHIFT_OF_G] = fill[vector](block.shift[G] + place, NULL)
        sums = bn_no_sums()
        products = bn_no_sums()
        sum_row[vector, Identity, terms](
            x, g, scale, block.width, c, block.ahead, False, <double*> &sums,
            <double*> &products, NULL, NULL,
        )
        block.sum_1[i] = bn_fold_line(&sums)
        block.sum_2[i] = bn_fold_line(&products)


cdef void sum_squares(
    const Block* block, const vector* vector_tag, const void* unused,
) noexcept nogil:
    if vector is bn_halves:
        if block.walk == ACROSS:
            sum_across[vector, Identity, Squares](block, NULL, NULL, NULL)
        else:
            sum_runs[vector, Identity, Squares](block, NULL, NULL, NULL)
    elif block.weighed and block.walk == ACROSS:
        sum_across[vector, Identity, WeighedSquares](block, NULL, NULL, NULL)
    elif block.weighed:
        sum_runs[vector, Identity, WeighedSquares](block, NULL, NULL, NULL)
    elif block.walk == ACROSS:
        sum_across[vector, Identity, Squares](block, NULL, NULL, NULL)
    elif block.walk == ALONG:
        sum_runs[vector, Identity, Squares](block, NULL, NULL, NULL)
    else:
        sum_own_rows[vector, Squares](block, NULL, NULL)


cdef void sum_products(
    const Block* block, const vector* vector_tag, const activation* activation_tag,
) noexcept nogil:
    if block.walk == ACROSS:
        sum_across[vector, activation, Products](block, NULL, NULL, NULL)
    elif block.walk == ALONG:
        sum_runs[vector, activation, Products](block, NULL, NULL, NULL)
    elif vector is bn_halves:
        return
    elif activation is Identity and block.formula == SCALED_GRADIENT:
        sum_own_rows[vector, ScaledProducts](block, NULL, NULL)
    elif activation is Identity:
        sum_own_rows[vector, Products](block, NULL, NULL)


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
    """Parameters along the rows, each of which has its own statistics: columns' sums.  And, if
    asked for, the rows of dx as SCALED_GRADIENT makes them: in one walk, as most of either is to
    come by x and dout."""
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
    memset(sums, 0, sizeof(sums))
    memset(products, 0, sizeof(products))
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
