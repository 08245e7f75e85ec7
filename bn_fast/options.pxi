# What the options do to rows on their way to a kernel: a gate on dout, weights.
#
# Rows are changed in the buffers, a few at a time while they are in L1; the kernels are the same,
# and do not know.
#
#   (a) The gate.  dout's rows are replaced by what comes through the activation.  The gate is that
#       of forward: its constants, and its lanes.  Without a residual and weights it is in the
#       kernels of backward themselves, but for features whose lanes are wide (see finish_tile):
#       then rows are gated in the arrays' own dtype first, and the columns of such features once
#       more in wide lanes; and whatever lanes the kernel wants comes last.
#   (b) Weights, statistics.  sum w d and sum w d^2, d = x - shift, are the sums that backward's
#       kernel makes of w d and x.  Where w = 0 both are replaced, so that no NaN comes near a sum.
#   (c) Weights, gradients.  The sums run over all elements, but for those of weight 0 whose x or
#       dout is not finite.  In dx = a g - w ((x - mean) b + a sum g / W) the bracket, times w,
#       takes the place of x; where w = 0 it is 0 whatever x is.

cdef inline void weigh_row(
    const real* restrict x, const real* restrict w, Py_ssize_t step, Py_ssize_t width,
    const real* restrict shift, real* restrict x_out, real* restrict weighed,
) noexcept nogil:
    cdef Py_ssize_t j
    cdef real k
    for j in range(width):
        k = shift[j]
        x_out[j] = x[j] if w[j * step] != 0 else k
        weighed[j] = w[j * step] * (x[j] - k) if w[j * step] != 0 else 0


cdef inline void screen_row(
    const real* restrict x, const real* restrict g, const real* restrict w, Py_ssize_t step,
    Py_ssize_t width, const real* restrict shift, real* restrict x_out, real* restrict g_out,
) noexcept nogil:
    cdef Py_ssize_t j
    cdef real zero
    for j in range(width):
        zero = (x[j] - x[j]) + (g[j] - g[j])  # NaN if one is not finite
        zero = zero if w[j * step] == 0 else 0
        x_out[j] = x[j] if zero == 0 else shift[j]
        g_out[j] = g[j] if zero == 0 else 0


cdef inline void share_row(
    const real* restrict x, const real* restrict w, Py_ssize_t step, Py_ssize_t width,
    const real* restrict shift, const real* restrict slope, const real* restrict rest,
    real* restrict shared,
) noexcept nogil:
    cdef Py_ssize_t j
    cdef real t
    for j in range(width):
        t = (x[j] - shift[j]) * slope[j] + rest[j]
        shared[j] = w[j * step] * t if w[j * step] != 0 else 0


cdef inline void weigh_line(
    const Plan* plan, const real* x, const real* g, const real* w, Py_ssize_t step,
    Py_ssize_t width, const real* shift, const real* slope, const real* rest,
    real* first, real* second,
) noexcept nogil:
    """One line of weights on its columns, as the visit wants it."""
    if plan.used[Y]:
        share_row(x, w, step, width, shift, slope, rest, second)
    elif plan.used[G]:
        screen_row(x, g, w, step, width, shift, first, second)
    else:
        weigh_row(x, w, step, width, shift, first, second)


cdef void prepare_gate(
    Job* job, const Plan* plan, const Segment* segment, Py_ssize_t first, Py_ssize_t n_features,
    bint wide, Scratch* s, const real* real_tag,
) noexcept nogil:
    """The columns of forward's constants, in the lanes that it had, if there is a gate."""
    cdef Py_ssize_t f, joined = segment.n_joined, lanes = segment.n_lanes
    cdef Py_ssize_t width = joined * n_features * segment.n_run
    cdef int r
    s.gate_first = s.any_wide = False
    if not plan.gated:
        return
    expand[real](job.gate_shift, NULL, first, n_features, joined, lanes, <real*> s.gate_shift)
    expand[real](job.gate_scale, NULL, first, n_features, joined, lanes, <real*> s.gate_scale)
    expand[real](job.gate_bias, NULL, first, n_features, joined, lanes, <real*> s.gate_bias)
    set_all[real](<real*> s.gate_ones, width, 1)
    for f in range(first, first + n_features):
        s.any_wide = s.any_wide or job.gate_wide[f] != 0
    s.gate_first = plan.gate_first or s.any_wide or wide
    if not (s.any_wide or wide):
        return
    for r in range(Y):
        if plan.used[r]:
            column_offsets(plan, segment, r, n_features, s.offset[r])
    expand[double](
        job.gate_shift, job.gate_factor, first, n_features, joined, lanes, s.wide_shift
    )
    expand[double](job.gate_scale, NULL, first, n_features, joined, lanes, s.wide_scale)
    expand[double](job.gate_bias, NULL, first, n_features, joined, lanes, s.wide_bias)
    expand[double](
        job.gate_factor, NULL, first, n_features, joined, segment.n_run, s.wide_factor
    )
    set_all[double](s.wide_ones, width, 1)


cdef void gate_rows(
    Job* job, const Plan* plan, Py_ssize_t n, Py_ssize_t width, Py_ssize_t ahead, Scratch* s,
    const char* shift, const char* scale, const char* bias, const char* pad, char* buffer,
    const lane* lane_tag,
) noexcept nogil:
    """Gate the rows that have been fetched, into a buffer."""
    cdef Block block
    cdef Py_ssize_t i
    while n % APPLY_ROWS and not plan.along:
        s.rows[X][n] = s.rows[G][n] = s.rows[R][n] = <char*> pad
        n += 1
    for i in range(n):
        s.rows[D][i] = buffer + i * width * sizeof(lane)
    block.x = s.rows[X]
    block.r = s.rows[R] if plan.used[R] else NULL
    block.g = s.rows[G]
    block.y = s.rows[D]
    block.n_rows = n
    block.width = width
    block.ahead = ahead
    block.along = plan.along
    block.shift = shift
    block.scale = scale
    block.bias = bias
    block.activation = job.activation
    block.slope = job.negative_slope
    apply_rows[lane](&block, lane_tag)


cdef void gate_again(
    Job* job, const Plan* plan, const Segment* segment, Py_ssize_t tile_first,
    Py_ssize_t n_features, Py_ssize_t j0, Py_ssize_t width, Py_ssize_t row, Py_ssize_t n,
    Scratch* s, const real* real_tag, const lane* lane_tag,
) noexcept nogil:
    """The slow way, where lanes differ: what comes through, as `lane`, in G's buffer.  First in the
    arrays' own lanes, whatever those of the visit are."""
    cdef Py_ssize_t i, j, f
    cdef int r
    cdef real* gated = <real*> s.buffer[D]
    cdef double* gated_wide = <double*> s.buffer[Y]
    cdef lane* final = <lane*> s.buffer[G]
    for r in range(Y):
        if plan.used[r]:
            fetch_rows[real, real](
                plan, segment, r, access_to(plan, segment, r, n_features, False), tile_first,
                j0, width, row, n, 0,
                s, real_tag, real_tag, (<real*> s.gate_ones) + j0,
            )
    gate_rows[real](
        job, plan, n, width, 0, s, <char*> ((<real*> s.gate_shift) + j0),
        <char*> ((<real*> s.gate_scale) + j0), <char*> ((<real*> s.gate_bias) + j0),
        s.gate_ones, s.buffer[D], real_tag,
    )
    if s.any_wide:
        for r in range(Y):
            if plan.used[r]:
                fetch_rows[real, double](
                    plan, segment, r, GATHERED, tile_first, j0, width, row, n, 0,
                    s, real_tag, <const double*> NULL,
                    (s.wide_factor if r == X else s.wide_ones) + j0,
                )
        gate_rows[double](
            job, plan, n, width, 0, s, <char*> (s.wide_shift + j0), <char*> (s.wide_scale + j0),
            <char*> (s.wide_bias + j0), <char*> s.wide_ones, s.buffer[Y], <const double*> NULL,
        )
        for j in range(width):
            f = tile_first + (j0 + j) // segment.n_run % n_features
            if job.gate_wide[f] != 0:
                for i in range(n):
                    gated[i * width + j] = <real> gated_wide[i * width + j]
    for i in range(n):
        for j in range(width):
            final[i * width + j] = <lane> gated[i * width + j] * (<lane*> s.factor_g)[j0 + j]
        s.rows[G][i] = <char*> (final + i * width)


cdef void fetch_inputs(
    Job* job, const Plan* plan, const Segment* segment, const Access* access,
    Py_ssize_t tile_first, Py_ssize_t n_features, Py_ssize_t j0, Py_ssize_t width, Py_ssize_t row,
    Py_ssize_t n, Py_ssize_t ahead, Scratch* s, const real* real_tag, const lane* lane_tag,
    bint wide,
) noexcept nogil:
    """Point s.rows at n rows of the inputs, as the options have made them."""
    cdef bint again = s.gate_first and (wide or s.any_wide)
    cdef bint runs_ahead = plan.along and job.prefetch and not wide
    cdef Py_ssize_t i
    cdef int r
    if again:
        gate_again[real, lane](
            job, plan, segment, tile_first, n_features, j0, width, row, n, s, real_tag, lane_tag
        )
    for r in range(Y):
        if plan.used[r] and not (again and r != X):
            fetch_rows[real, lane](
                plan, segment, r, access[r], tile_first, j0, width, row, n,
                AHEAD_RUNS if runs_ahead and (r == R or plan.storage != NATIVE) else ahead,
                s, real_tag, lane_tag,
                <lane*> (s.factor if r == X else s.factor_g if r == G else s.dummy) + j0,
            )
    if s.gate_first and not again:
        gate_rows[lane](
            job, plan, n, width, ahead, s, <char*> ((<lane*> s.gate_shift) + j0),
            <char*> ((<lane*> s.gate_scale) + j0), <char*> ((<lane*> s.gate_bias) + j0),
            s.gate_ones, s.buffer[D], lane_tag,
        )
        for i in range(n):
            s.rows[G][i] = s.rows[D][i]
    if plan.used[W]:
        weigh_rows[real, lane](
            job, plan, segment, tile_first, n_features, j0, width, row, n,
            0 if plan.storage != NATIVE or s.gate_first else ahead, s, real_tag, lane_tag,
        )


cdef void prepare_weights(
    Job* job, const Plan* plan, const Segment* segment, Py_ssize_t first, Py_ssize_t n_features,
    Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """The columns of weigh_rows; in dx the kernel's own are set aside."""
    cdef Py_ssize_t j, joined = segment.n_joined, run = segment.n_run
    cdef Py_ssize_t width = joined * n_features * run
    cdef lane* shift = <lane*> s.weigh_shift
    cdef lane* slope = <lane*> s.weigh_slope
    cdef lane* rest = <lane*> s.weigh_rest
    column_offsets(plan, segment, W, n_features, s.offset[W])
    if plan.used[Y]:
        expand[lane](job.shift_g, NULL, first, n_features, joined, run, rest)
        expand[lane](job.scale, NULL, first, n_features, joined, run, shift)
        expand[lane](job.bias, NULL, first, n_features, joined, run, slope)
        for j in range(width):
            rest[j] = rest[j] * shift[j] - slope[j]
        expand[lane](job.slope, NULL, first, n_features, joined, run, slope)
        set_all[lane](<lane*> s.shift_x, width, 0)
        set_all[lane](<lane*> s.shift_g, width, 0)
        set_all[lane](<lane*> s.slope, width, 1)
        set_all[lane](<lane*> s.bias, width, 0)
    expand[lane](job.shift_x, job.factor, first, n_features, joined, run, shift)


cdef void weigh_rows(
    Job* job, const Plan* plan, const Segment* segment, Py_ssize_t tile_first,
    Py_ssize_t n_features, Py_ssize_t j0, Py_ssize_t width, Py_ssize_t row, Py_ssize_t n,
    Py_ssize_t ahead, Scratch* s, const real* real_tag, const lane* lane_tag,
) noexcept nogil:
    """Replace n rows of x (and dout), line by line of the weights: a run's, or one value for all
    the features of a row (gathered element by element, (65536, 128) forward took 7.8 ms, now 4.0).
    Other weights are gathered first."""
    cdef Py_ssize_t i, j, m, step = 1, line = segment.n_run
    cdef lane* gathered = <lane*> s.buffer[W]
    cdef lane* first = <lane*> s.buffer[Y]
    cdef lane* second = <lane*> s.buffer[R]
    cdef lane* shift = (<lane*> s.weigh_shift) + j0
    cdef lane* slope = (<lane*> s.weigh_slope) + j0
    cdef lane* rest = (<lane*> s.weigh_rest) + j0
    cdef Py_ssize_t* offset = s.offset[W] + j0
    cdef lane* x
    cdef lane* g
    cdef const lane* w
    cdef bint direct = sizeof(lane) == sizeof(real)
    if segment.run_stride[W] == 0:
        step = 0
        line *= n_features
    elif segment.run_stride[W] != sizeof(real):
        direct = False
    direct = direct and line >= NARROW
    row_pointers(segment, W, plan.base[W], row, n, s.rows[W])
    for i in range(n):
        x = <lane*> s.rows[X][i]
        g = <lane*> s.rows[G][i]
        if ahead:  # the kernel cannot: its rows are those in the buffers
            bn_prefetch(s.rows[X][i + ahead], width * sizeof(real))
            if plan.used[G]:
                bn_prefetch(s.rows[G][i + ahead], width * sizeof(real))
        if not direct:
            gather_row[real, lane](
                real_tag, s.rows[W][i], offset, width, (<lane*> s.weigh_ones) + j0, gathered
            )
        j = 0
        while j < width:
            m = width - j
            w = gathered
            if direct:
                m = min(m, line - (j0 + j) % line)
                w = <const lane*> (s.rows[W][i] + offset[j])
            if direct and step == 0:
                weigh_line[lane](
                    plan, x + j, g + j, w, 0, m, shift + j, slope + j, rest + j,
                    first + j, second + j,
                )
            else:
                weigh_line[lane](
                    plan, x + j, g + j, w, 1, m, shift + j, slope + j, rest + j,
                    first + j, second + j,
                )
            j += m
        if plan.used[Y]:
            s.rows[X][i] = <char*> second
        else:
            s.rows[X][i] = <char*> first
            s.rows[G][i] = <char*> second
            first += width
        second += width


cdef void store_gradient(
    Job* job, const Plan* plan, const Segment* segment, Py_ssize_t tile_first, Py_ssize_t j0,
    Py_ssize_t width, Py_ssize_t row, Py_ssize_t n, Scratch* s, const real* real_tag,
) noexcept nogil:
    """Rows of what came through the gate to the array for the residual's gradient."""
    cdef Py_ssize_t i = 0, run
    cdef char* start = plan.base[D] + tile_first * plan.feature_stride[D]
    cdef char** from_rows = s.rows[G]
    cdef char** rows = s.rows[D]
    if plan.access[D] != GATHERED:
        start += j0 * plan.itemsize
    row_pointers(segment, D, start, row, n, rows)
    while i < n:
        run = 1
        if plan.access[D] == GATHERED and plan.storage != NATIVE:
            scatter_half_row[real](
                plan.storage, rows[i], s.offset[D] + j0, width, <real*> from_rows[i]
            )
        elif plan.access[D] == GATHERED:
            scatter_row[real, real](
                real_tag, rows[i], s.offset[D] + j0, width, <real*> from_rows[i]
            )
        else:  # rows that touch go as one, for fewer broken lines
            while (
                i + run < n and rows[i + run] == rows[i] + run * width * plan.itemsize
                and from_rows[i + run] == from_rows[i] + run * width * <Py_ssize_t> sizeof(real)
            ):
                run += 1
            if plan.storage != NATIVE:
                narrow(plan.storage, <float*> from_rows[i], run * width, rows[i])
            elif job.stream_gradient:
                bn_stream(rows[i], from_rows[i], run * width * sizeof(real))
            else:
                memcpy(rows[i], from_rows[i], run * width * sizeof(real))
        i += run
