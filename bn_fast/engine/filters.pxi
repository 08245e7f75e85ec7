# What a row is made of on its way to the kernel.
#
#   (a) The gate.  dout's rows are replaced by what comes through the activation.  The gate is that
#       of forward: its constants, and its lanes.  Without a residual and weights it is in the
#       kernels of backward themselves, but for features whose lanes are wide (see set_in_lanes):
#       then rows are gated in the arrays' own lanes first, and the columns of such features once
#       more in wide lanes; and whatever lanes the kernel wants comes last.
#   (b) Weights, statistics.  sum w d and sum w d^2, d = x - shift, are the sums that backward's
#       kernel makes of w d and x.  Where w = 0 both are replaced, so that no NaN comes near a sum.
#   (c) Weights, gradients.  The sums run over all elements, but for those of weight 0 whose x or
#       dout is not finite.  In dx = a g - w ((x - mean) b + a sum g / W) the bracket, times w,
#       takes the place of x; where w = 0 it is 0 whatever x is.
#   (d) gamma that varies within a statistic: gamma dout takes the place of dout.

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
    apply_block[lane](&block, lane_tag)


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

cdef inline void weigh_row(
    const lane* restrict x, const lane* restrict w, Py_ssize_t step, Py_ssize_t width,
    const lane* restrict shift, lane* restrict x_out, lane* restrict weighed,
) noexcept nogil:
    cdef Py_ssize_t j
    cdef lane k
    for j in range(width):
        k = shift[j]
        x_out[j] = x[j] if w[j * step] != 0 else k
        weighed[j] = w[j * step] * (x[j] - k) if w[j * step] != 0 else 0


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


cdef inline void weigh_line(
    Visit* v, Py_ssize_t first, const lane* x, const lane* g, const lane* w, Py_ssize_t step,
    Py_ssize_t width, lane* x_out, lane* out,
) noexcept nogil:
    """One line of weights on its columns, as the visit wants it."""
    cdef const lane* shift = <lane*> v.s.column[WEIGH_SHIFT] + first
    if v.plan.used[Y]:
        share_row(
            x, w, step, width, shift, <lane*> v.s.column[WEIGH_COEF] + first,
            <lane*> v.s.column[WEIGH_REST] + first, out,
        )
    elif v.plan.used[G]:
        screen_row(x, g, w, step, width, shift, x_out, out)
    else:
        weigh_row(x, w, step, width, shift, x_out, out)


cdef void weigh_rows(Visit* v, const lane* lane_tag) noexcept nogil:
    """Replace the rows of x (and dout), line by line of the weights: a run's, or one value for all
    the features of a row (gathered element by element, (65536, 128) forward took 7.8 ms, now 4.0).
    Other weights are gathered first."""
    cdef const Segment* segment = v.segment
    cdef Scratch* s = v.s
    cdef Storage storage = lanes_of(v.plan.storage)
    cdef Py_ssize_t i, j, m, step = 1, line = segment.n_run
    cdef Py_ssize_t ahead = 0 if is_half(v.plan.storage) or v.gate == BEFORE else v.ahead
    cdef lane* gathered = <lane*> s.buffer[W]
    cdef lane* first = <lane*> s.buffer[Y]
    cdef lane* second = <lane*> s.buffer[R]
    cdef Py_ssize_t* offset = s.offset[W] + v.first
    cdef lane* x
    cdef lane* g
    cdef const lane* w
    cdef bint direct = sizeof(lane) == size_of(storage)
    if segment.n_run == 1 and v.plan.feature_stride[W] != 0:
        line = v.n_features
        direct = direct and v.plan.feature_stride[W] == size_of(storage)
    elif segment.run_stride[W] == 0:
        step = 0
        line *= v.n_features if v.plan.feature_stride[W] == 0 else 1
    elif segment.run_stride[W] != size_of(storage):
        direct = False
    direct = direct and line >= NARROW
    row_pointers(segment, W, feature_at(v.plan, W, v.feature), v.row, v.n_rows, s.row[W])
    for i in range(v.n_rows):
        x = <lane*> s.row[X][i]
        g = <lane*> s.row[G][i]
        if ahead:  # the kernel cannot: its rows are those in the buffers
            bn_prefetch(s.row[X][i + ahead], v.width * sizeof(lane))
            if v.plan.used[G]:
                bn_prefetch(s.row[G][i + ahead], v.width * sizeof(lane))
        if not direct:
            gather_row[lane](
                storage, s.row[W][i], offset, v.width, regular_step(offset, v.width), gathered
            )
        j = 0
        while j < v.width:
            m = v.width - j
            w = gathered
            if direct:
                m = min(m, line - (v.first + j) % line)
                w = <const lane*> (s.row[W][i] + offset[j])
            if direct and step == 0:
                weigh_line[lane](v, v.first + j, x + j, g + j, w, 0, m, first + j, second + j)
            else:
                weigh_line[lane](v, v.first + j, x + j, g + j, w, 1, m, first + j, second + j)
            j += m
        if v.plan.used[Y]:
            s.row[X][i] = <char*> second
        else:
            s.row[X][i] = <char*> first
            s.row[G][i] = <char*> second
            first += v.width
        second += v.width


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
