# What a row is made of on its way to the kernel.
#
#   (a) The gate.  dout's rows are replaced by what comes through the activation.  The gate is that
#       of forward: its constants, and its lanes.  Without a residual and weights it is in the
#       kernels of backward themselves, but for dx with frozen statistics and for features whose
#       lanes are wide (see set_in_lanes): then rows are gated in the arrays' own lanes first, and
#       the columns of such features once more in wide lanes; and whatever lanes the kernel wants
#       comes last.
#   (b) Weights, statistics.  sum w d and sum w d^2, d = x - shift, are the sums that backward's
#       kernel makes of w d and x.  Where something not finite is hidden under w = 0 both are
#       replaced, so that no NaN comes near a sum.  A row that has one weight is multiplied by it in
#       the kernel, and is the shift where that is 0.
#   (c) Weights, gradients.  The sums run over all elements, but for those of weight 0 whose x or
#       dout is not finite.  In dx = a g - w ((x - mean) b + a sum g / W) the bracket, times w,
#       takes the place of x; where w = 0 it is 0 whatever x is.
#   (d) gamma that varies within a statistic: of rows with a gamma each, gamma dout takes the place
#       of dout; along rows the kernels multiply.

# ---------------------------------------------------------------- the gate

cdef void open_rows(Visit* v, bint wide, Py_ssize_t ahead, const lane* lane_tag) noexcept nogil:
    """What of the rows of dout comes through the native gate, into D's buffer, or through the wide
    one, into Y's; the rows of D then point to it."""
    cdef Block block
    cdef char* buffer = v.s.buffer[Y if wide else D]
    cdef Py_ssize_t i, n
    cdef int r
    for r in range(Y):
        n = pad_rows[lane](v, r, WIDE_ONES if wide else NATIVE_ONES, APPLY_ROWS, lane_tag)
    for i in range(n):
        v.s.row[D][i] = buffer + i * v.width * sizeof(lane)
    fill_block[lane](&block, v, n, lane_tag)
    block.row[Y] = v.s.row[D]
    block.ahead = ahead
    block.shift[X] = <char*> columns_at[lane](v, WIDE_SHIFT if wide else GATE_SHIFT, lane_tag)
    block.coef[X] = <char*> columns_at[lane](v, WIDE_COEF if wide else GATE_COEF, lane_tag)
    block.bias = <char*> columns_at[lane](v, WIDE_BIAS if wide else GATE_BIAS, lane_tag)
    block.formula = ADDED_OPENED if v.plan.used[R] else OPENED
    block.activation = v.job.activation
    apply_block(&block)


cdef void open_wide_features(Visit* v, lane* gated) noexcept nogil:
    """The columns of features whose gate is wide, over what came through in native lanes."""
    cdef Py_ssize_t i, j, f
    cdef const double* opened = <double*> v.s.buffer[Y]
    cdef const double* wide = v.job.value[GATE_WIDE]
    cdef int r
    for r in range(Y):
        if v.plan.used[r]:
            fetch_rows[double](
                v, r, GATHERED, 0,
                columns_at[double](v, WIDE_FACTOR, NULL) if r == X else NULL,
            )
    open_rows[double](v, True, 0, NULL)
    for j in range(v.width):
        f = v.feature + (v.first + j) // v.segment.n_run % v.n_features
        if wide[f] != 0:
            for i in range(v.n_rows):
                gated[i * v.width + j] = <lane> opened[i * v.width + j]


cdef void open_natively(
    const stored* native_tag, Visit* v, const lane* lane_tag,
) noexcept nogil:
    """What comes through, in the arrays' own lanes whatever those of the visit are, into D's
    buffer; then as `lane` into G's."""
    cdef stored* opened = <stored*> v.s.buffer[D]
    cdef lane* final = <lane*> v.s.buffer[G]
    cdef Py_ssize_t i
    cdef int r
    for r in range(Y):
        if v.plan.used[r]:
            fetch_rows[stored](
                v, r, access_to(v.plan, v.segment, r, v.n_features, False), 0, NULL
            )
    open_rows[stored](v, False, 0, native_tag)
    if v.any_wide:
        open_wide_features[stored](v, opened)
    for i in range(v.n_rows):
        gather_step(opened, 1, v.width, final)
        if v.wide:
            multiply(final, columns_at[lane](v, FACTOR_G, lane_tag), v.width)
        v.s.row[G][i] = <char*> final
        opened += v.width
        final += v.width


cdef void open_slowly(Visit* v, const lane* lane_tag) noexcept nogil:
    """The slow way, where lanes differ."""
    if v.plan.storage == FLOAT64:
        open_natively[double, lane](NULL, v, lane_tag)
    else:
        open_natively[float, lane](NULL, v, lane_tag)


# ---------------------------------------------------------------- weights
#
# In sums x and dout are read where they lie, and what is not finite under a weight of 0 is looked
# for; only where there is such a thing the rows at hand are replaced, as (b) and (c) say.  In dx x
# always is.
#
# Weights are read where they lie too, line by line: a run's, or those of a row's features; or one
# value for all of these (gathered element by element, (65536, 128) forward took 7.8 ms, 4.0 so).

cdef inline void weigh_vector(
    const char* x, const char* g, const char* w, const char* shift, char* weighed,
    Py_ssize_t place, int n, bint part, bint one, vector* hidden,
) noexcept nogil:
    """A vector of w (x - shift), or of x and dout alone (weighed: NULL); `hidden` becomes NaN where
    something is not finite under a weight of 0.  One: all weights are one number, and not 0."""
    cdef vector d = load[vector](x, place, n, part, NULL), u
    u = fill[vector](w, NULL) if one else load[vector](w, place, n, part, NULL)
    if weighed != NULL:
        d = u * (d - load[vector](shift, place, n, part, NULL))
        store[vector](weighed + place, d, n, part, False, False)
    else:
        d = d - d
        d = d + (load[vector](g, place, n, part, NULL) - load[vector](g, place, n, part, NULL))
    if not one:
        hidden[0] = hidden[0] + bn_choose(u, d, bn_like(d, 0))


cdef inline void weigh_row(
    const char* x, const char* g, const char* w, const char* shift, char* weighed,
    Py_ssize_t width, bint one, vector* hidden,
) noexcept nogil:
    cdef Py_ssize_t size = size_of_lane[vector](NULL)
    cdef Py_ssize_t place = 0, n_bytes = width * size
    while place + BN_VECTOR <= n_bytes:
        weigh_vector[vector](x, g, w, shift, weighed, place, 0, False, one, hidden)
        place += BN_VECTOR
    if place < n_bytes:
        weigh_vector[vector](
            x, g, w, shift, weighed, place, <int> ((n_bytes - place) // size), True, one, hidden
        )


cdef inline void hide_row(
    const lane* restrict x, const lane* restrict w, Py_ssize_t step, Py_ssize_t width,
    const lane* restrict shift, lane* restrict x_out, lane* restrict weighed,
) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(width):
        x_out[j] = x[j] if w[j * step] != 0 else shift[j]
        weighed[j] = w[j * step] * (x[j] - shift[j]) if w[j * step] != 0 else 0


cdef inline void screen_row(
    const lane* restrict x, const lane* restrict g, const lane* restrict w, Py_ssize_t step,
    Py_ssize_t width, const lane* restrict shift, lane* restrict x_out, lane* restrict g_out,
) noexcept nogil:
    cdef Py_ssize_t j
    cdef lane zero
    for j in range(width):
        zero = (x[j] - x[j]) + (g[j] - g[j])  # NaN if one is not finite
        zero = zero if w[j * step] == 0 else 0
        x_out[j] = x[j] if zero == 0 else shift[j]
        g_out[j] = g[j] if zero == 0 else 0


cdef inline void share_row(
    const lane* restrict x, const lane* restrict w, Py_ssize_t step, Py_ssize_t width,
    const lane* restrict shift, const lane* restrict coef, const lane* restrict rest,
    lane* restrict shared,
) noexcept nogil:
    cdef Py_ssize_t j
    cdef lane t
    for j in range(width):
        t = x[j] - shift[j]
        t = (t * coef[j] if t != 0 else 0) + rest[j]  # no factor but infinity makes a difference
        shared[j] = w[j * step] * t if w[j * step] != 0 else 0


cdef struct Weights:          # of the rows at hand
    bint direct               # read where they lie,
    Py_ssize_t line           # columns a line has,
    Py_ssize_t step           # 0: one value for all of a line
    char* gathered            # where they are, if not direct


cdef inline const char* weights_at(
    const Visit* v, const Weights* weights, Py_ssize_t i, Py_ssize_t j, Py_ssize_t size,
    Py_ssize_t* n,
) noexcept nogil:
    """A row's weights from its j-th column at hand on, n of them in one line."""
    n[0] = v.width - j
    if not weights.direct:
        return weights.gathered + (i * v.width + j) * size
    n[0] = min(n[0], weights.line - (v.first + j) % weights.line)
    return v.s.row[W][i] + v.s.offset[W][v.first + j]


cdef inline bint is_zero(const char* w, const vector* vector_tag) noexcept nogil:
    if vector is bn_floats:
        return (<const float*> w)[0] == 0
    else:
        return (<const double*> w)[0] == 0


cdef bint read_weighed(Visit* v, const Weights* weights, const vector* vector_tag) noexcept nogil:
    """Weigh the rows of x for moments, into dout's buffer, or leave them and dout's as they are;
    whether something is hidden under a weight of 0."""
    cdef Py_ssize_t size = size_of_lane[vector](NULL)
    cdef Py_ssize_t i, j, n
    cdef double lanes[LANES]
    cdef vector hidden
    cdef const char* w
    cdef const char* x
    cdef const char* g
    cdef const char* shift
    cdef char* weighed = NULL
    memset(lanes, 0, sizeof(lanes))
    hidden = bn_like(hidden, 0)
    for i in range(v.n_rows):
        j = 0
        while j < v.width:
            w = weights_at(v, weights, i, j, size, &n)
            x = v.s.row[X][i] + j * size
            g = v.s.row[G][i] + j * size if v.plan.used[G] else x
            shift = v.s.column[WEIGH_SHIFT] + (v.first + j) * size
            if not v.plan.used[G]:
                weighed = v.s.buffer[R] + (i * v.width + j) * size
            if weights.step == 0 and is_zero[vector](w, NULL):
                w = v.s.column[SHIFT_G]  # zeros
            elif weights.step == 0:
                if weighed != NULL:
                    weigh_row[vector](x, g, w, shift, weighed, n, True, &hidden)
                j += n
                continue
            weigh_row[vector](x, g, w, shift, weighed, n, False, &hidden)
            j += n
        if not v.plan.used[G]:
            v.s.row[G][i] = v.s.buffer[R] + i * v.width * size
    for i in range(v.n_rows, v.n_rows + v.ahead):
        if not v.plan.used[G]:  # nothing to prefetch
            v.s.row[G][i] = v.s.buffer[R]
    bn_add_lanes(lanes, hidden)
    return bn_fold_lanes(lanes) != 0


cdef inline void replace_line(
    Visit* v, Py_ssize_t i, Py_ssize_t j, const lane* w, Py_ssize_t step, Py_ssize_t n,
    const lane* lane_tag,
) noexcept nogil:
    """What takes the place of x, and of dout, along one line of weights."""
    cdef const lane* x = <lane*> v.s.row[X][i] + j
    cdef const lane* shift = <lane*> v.s.column[WEIGH_SHIFT] + v.first + j
    cdef lane* x_out = <lane*> v.s.buffer[Y] + i * v.width + j
    cdef lane* out = <lane*> v.s.buffer[R] + i * v.width + j
    if v.plan.used[Y]:
        share_row(
            x, w, step, n, shift, <lane*> v.s.column[WEIGH_COEF] + v.first + j,
            <lane*> v.s.column[WEIGH_REST] + v.first + j, out,
        )
    elif v.plan.used[G]:
        screen_row(x, <lane*> v.s.row[G][i] + j, w, step, n, shift, x_out, out)
    else:
        hide_row(x, w, step, n, shift, x_out, out)


cdef void replace_rows(Visit* v, const Weights* weights, const lane* lane_tag) noexcept nogil:
    cdef Py_ssize_t i, j, n
    cdef Py_ssize_t ahead = 0 if is_half(v.plan.storage) or v.gate == BEFORE else v.ahead
    cdef const lane* w
    for i in range(v.n_rows):
        if ahead and v.plan.used[Y]:  # the kernel cannot: its rows are those in the buffer
            bn_prefetch(v.s.row[X][i + ahead], v.width * sizeof(lane))
            bn_prefetch(v.s.row[G][i + ahead], v.width * sizeof(lane))
        j = 0
        while j < v.width:
            w = <const lane*> weights_at(v, weights, i, j, sizeof(lane), &n)
            if weights.step == 0:
                replace_line[lane](v, i, j, w, 0, n, lane_tag)
            else:
                replace_line[lane](v, i, j, w, 1, n, lane_tag)
            j += n
        v.s.row[X][i] = v.s.buffer[R if v.plan.used[Y] else Y] + i * v.width * sizeof(lane)
        if v.plan.used[G] and not v.plan.used[Y]:
            v.s.row[G][i] = v.s.buffer[R] + i * v.width * sizeof(lane)


cdef void skip_rows(Visit* v, const lane* lane_tag) noexcept nogil:
    """Shifts in place of x's rows of weight 0, whatever is there."""
    cdef Py_ssize_t i
    row_pointers(
        v.segment, W, feature_at(v.plan, W, v.feature), v.row, v.n_rows, v.s.row[W]
    )
    for i in range(v.n_rows):
        if (<lane*> v.s.row[W][i])[0] == 0:
            v.s.row[X][i] = v.s.column[WEIGH_SHIFT] + v.first * sizeof(lane)


cdef void weigh_rows(Visit* v, const lane* lane_tag) noexcept nogil:
    """Rows of x (and dout) as weights make them."""
    cdef const Segment* segment = v.segment
    cdef Scratch* s = v.s
    cdef Storage storage = lanes_of(v.plan.storage)
    cdef Py_ssize_t i
    cdef Py_ssize_t* offset = s.offset[W] + v.first
    cdef Weights weights
    cdef bint hidden = True
    if weighs_in_kernel(v.plan) and not v.wide:
        skip_rows[lane](v, lane_tag)
        return
    weights.direct = sizeof(lane) == size_of(storage)
    weights.line = segment.n_run
    weights.step = 1
    weights.gathered = s.buffer[W]
    if segment.n_run == 1 and v.plan.feature_stride[W] != 0:
        weights.line = v.n_features
        weights.direct = weights.direct and v.plan.feature_stride[W] == size_of(storage)
    elif segment.run_stride[W] == 0:
        weights.step = 0
        weights.line *= v.n_features if v.plan.feature_stride[W] == 0 else 1
    elif segment.run_stride[W] != size_of(storage):
        weights.direct = False
    weights.direct = weights.direct and weights.line >= NARROW
    row_pointers(segment, W, feature_at(v.plan, W, v.feature), v.row, v.n_rows, s.row[W])
    if not weights.direct:
        weights.step = 1
        for i in range(v.n_rows):
            gather_row[lane](
                storage, s.row[W][i], offset, v.width, regular_step(offset, v.width),
                <lane*> s.buffer[W] + i * v.width,
            )
    if not v.plan.used[Y]:
        if lane is float:
            hidden = read_weighed[bn_floats](v, &weights, NULL)
        else:
            hidden = read_weighed[bn_doubles](v, &weights, NULL)
    if hidden:
        replace_rows[lane](v, &weights, lane_tag)


# ---------------------------------------------------------------- gamma and beta that vary

cdef void point_parameters(Visit* v, int role, const lane* lane_tag) noexcept nogil:
    """Point the role's rows at gamma or beta as the rows at hand have them, in the visit's lanes.
    """
    cdef const Plan* plan = v.plan
    cdef Storage storage = lanes_of(plan.storage)
    cdef Py_ssize_t i
    cdef bint own = plan.layout == ROWS
    cdef char** rows = v.s.row[role]
    cdef lane* buffer = <lane*> v.s.buffer[role]
    find_rows(v, role, v.n_rows, False, rows)
    if sizeof(lane) == size_of(storage) and is_adjacent(v):
        return
    if own:  # all rows have the same, or there is but one, see rows_at_hand
        gather_row[lane](
            storage, rows[0], v.s.offset[S], v.width, regular_step(v.s.offset[S], v.width), buffer
        )
    for i in range(v.n_rows):
        if not own:
            buffer[i] = <lane> load_value(storage, rows[i])
        rows[i] = <char*> (buffer + (0 if own else i))


cdef inline void scale_row(
    const lane* g, lane scale, Py_ssize_t width, lane* scaled,
) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(width):
        scaled[j] = g[j] * scale


cdef void scale_rows(Visit* v, const lane* lane_tag) noexcept nogil:
    """gamma dout in place of dout, of rows with a gamma each: inside a statistic's means stands the
    gradient of x_hat."""
    cdef Py_ssize_t i
    cdef lane* scaled = <lane*> v.s.buffer[G]
    point_parameters[lane](v, S, lane_tag)
    for i in range(v.n_rows):
        scale_row[lane](
            <lane*> v.s.row[G][i], (<lane*> v.s.row[S][i])[0], v.width, scaled
        )
        v.s.row[G][i] = <char*> scaled
        scaled += v.width
