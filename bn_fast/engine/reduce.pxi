# reduce: the first visit to a chunk of a tile, block by block of its rows.


# ---------------------------------------------------------------- chunks

cdef inline const lane* gather_factors(Visit* v, int column, const lane* lane_tag) noexcept nogil:
    """What columns in wide lanes are multiplied by.  A row of its own has its feature's."""
    if not v.wide:
        return NULL
    if v.plan.layout != ROWS:
        return columns_at[lane](v, column, lane_tag)
    set_all[lane](
        <lane*> v.s.column[column], v.width, <lane> v.job.value[column][v.feature + v.first],
    )
    return <lane*> v.s.column[column]


cdef inline bint is_alone(const Visit* v) noexcept nogil:
    """Whether rows of their own are taken singly: their factors differ, or gamma is gathered."""
    cdef bint gathered = v.plan.used[S] and v.plan.feature_stride[S] != 0 and not is_adjacent(v)
    return v.plan.layout == ROWS and (v.wide or gathered)


cdef inline Py_ssize_t rows_at_hand(
    const Visit* v, Py_ssize_t width, Py_ssize_t step,
) noexcept nogil:
    """Rows taken at a time; of their own whole trees of those that are summed for gamma."""
    cdef Py_ssize_t n
    if is_alone(v):
        return 1
    n = group_rows(v.plan, v.access, width, step, v.gate == BEFORE)
    return max(<Py_ssize_t> 4, n // 4 * 4) if v.plan.layout == ROWS else max(1, n // in_turn(v))


cdef void fetch_inputs(Visit* v, const lane* lane_tag) noexcept nogil:
    """Point the rows at those of the inputs, as the gate has made them."""
    cdef const Plan* plan = v.plan
    cdef bint slowly = v.gate == BEFORE and (v.wide or v.any_wide)
    cdef bint runs_ahead = plan.layout == LONG_RUN and v.job.schedule.prefetch and not v.wide
    cdef bint buffered = is_half(plan.storage) and not v.as_stored
    cdef Py_ssize_t i, ahead
    cdef int r
    cdef Access access
    cdef const lane* factor
    if slowly:
        open_slowly[lane](v, lane_tag)
    for r in range(Y):
        if plan.used[r] and not (slowly and r != X):
            ahead = v.ahead
            access = COPIED if buffered and v.access[r] == DIRECT else v.access[r]
            if runs_ahead and (r == R or buffered or access == GATHERED):
                ahead = AHEAD_RUNS
            factor = gather_factors[lane](v, FACTOR_X if r == X else FACTOR_G, lane_tag)
            if r == R and v.job.op.formula != MIXED:  # a residual; ddx is scaled as dout is
                factor = NULL
            fetch_rows[lane](v, r, access, ahead, factor)
    if v.scales and plan.used[S] and plan.used[G]:
        if plan.layout == ROWS:  # the kernels multiply
            point_parameters[lane](v, S, lane_tag)
        else:
            scale_rows[lane](v, lane_tag)
    if v.gate == BEFORE and not slowly:
        open_rows[lane](v, False, v.ahead, lane_tag)
        for i in range(v.n_rows):
            v.s.row[G][i] = v.s.row[D][i]


cdef void enter_chunk(
    Visit* v, Py_ssize_t chunk, Py_ssize_t* row_end, const lane* lane_tag,
) noexcept nogil:
    """Find the chunk's rows, and how to come to their columns; set the columns of gate and factors.
    """
    cdef const Plan* plan = v.plan
    cdef Py_ssize_t n = 1 if plan.layout == ROWS or plan.layout == LONG_RUN else v.n_features
    cdef int index, r
    chunk_range(plan, chunk, &index, &v.row, row_end)
    v.segment = &plan.segment[index]
    v.first = 0
    v.width = v.segment.n_joined * n * v.segment.n_run
    for r in range(N_ROLES):
        v.access[r] = access_to(plan, v.segment, r, v.n_features, v.wide)
        if v.access[r] == GATHERED:
            set_offsets(v, r, n)
    v.as_stored = plan.as_stored and v.access[X] == DIRECT
    if plan.used[S] and not is_adjacent(v):
        set_offsets(v, S, n)
    if plan.storage == FLOAT64:
        set_gate[double](v, NULL)
    else:
        set_gate[float](v, NULL)
    if v.wide and plan.layout != ROWS:
        expand[lane](v, FACTOR_X, -1, True, FACTOR_X, lane_tag)
        expand[lane](v, FACTOR_G, -1, True, FACTOR_G, lane_tag)


cdef void reduce_rows(Visit* v, const lane* lane_tag) noexcept nogil:
    """Add the columns at hand of the rows at hand to the sums."""
    cdef const Plan* plan = v.plan
    cdef Py_ssize_t n
    cdef Access access
    cdef Block block
    fetch_inputs[lane](v, lane_tag)
    if plan.used[D] and not v.wide:
        access = plan.access[D]
        if access != GATHERED and v.job.schedule.stream_gradient and not is_half(plan.storage):
            access = STREAMED
        store_rows[lane](v, D, access, v.s.row[G], lane_tag)
    if plan.used[W]:
        weigh_rows[lane](v, lane_tag)
    n = pad_rows[lane](v, X, SHIFT_X, TREE_ROWS, lane_tag)
    pad_rows[lane](v, G, SHIFT_G, TREE_ROWS, lane_tag)
    pad_rows[lane](v, W, SHIFT_X, TREE_ROWS, lane_tag)
    fill_gradient[lane](&block, v, n, lane_tag)
    if v.access[X] == DIRECT and reads_ahead_along(&v.job.schedule, plan, v.width):
        block.ahead = 1
    reduce_block(&block, plan.used[G] or (plan.used[W] and not block.weighed))


cdef inline void leave_rest(Visit* v) noexcept nogil:
    """Rows that fill no tree come by way of the buffer, as what they are padded with is lanes."""
    cdef Py_ssize_t rest = v.n_rows % TREE_ROWS
    if not v.plan.as_stored or v.access[X] != DIRECT or v.plan.layout == LONG_RUN:
        return
    v.as_stored = rest == 0 or v.n_rows > v.segment.tree_rows
    if rest and v.as_stored:
        v.n_rows -= v.n_rows % v.segment.tree_rows


cdef void reduce_block_of_rows(
    Visit* v, Py_ssize_t row_end, Py_ssize_t piece, const lane* lane_tag,
) noexcept nogil:
    """The sums of rows up to one, on their features; in columns, `piece` at a time."""
    cdef const Segment* segment = v.segment
    cdef Py_ssize_t width = v.width
    cdef Py_ssize_t n_columns = segment.n_joined * v.n_features * segment.n_lanes
    cdef int which
    for which in range(2):
        memset(v.sum[which], 0, n_columns * sizeof(double))
    while v.row < row_end:
        take_rows(v, row_end)
        leave_rest(v)
        v.first = 0
        while v.first < width:
            v.width = min(piece, width - v.first)
            reduce_rows[lane](v, lane_tag)
            v.first += piece
        pass_rows(v)
    v.first = 0
    v.width = width
    for which in range(2):
        fold_columns(v.sum[which], segment.n_joined, v.n_features, segment.n_lanes)
        if v.plan.turned and not v.wide:
            reverse(v.sum[which], v.n_features)


cdef inline double* sums_of_chunk(const Visit* v, Py_ssize_t which) noexcept nogil:
    return v.s.sums + v.feature + 2 * which * v.job.stride


cdef inline void add_block(Visit* v, bint first) noexcept nogil:
    """A block's sums onto the chunk's.  The first is stored, if it was not made there: there is
    nothing yet to add it to."""
    cdef Py_ssize_t which, stride = v.job.stride, n = v.n_features
    cdef double* total
    for which in range(2):
        total = sums_of_chunk(v, which)
        if not first:
            add_compensated(total, total + stride, <double*> v.s.column[SUM_1 + which], n)
            continue
        if v.sum[which] != total:
            memcpy(total, v.sum[which], n * sizeof(double))
        v.sum[which] = <double*> v.s.column[SUM_1 + which]
        memset(total + stride, 0, n * sizeof(double))


cdef void reduce_own_rows(Visit* v, Py_ssize_t row_end, const lane* lane_tag) noexcept nogil:
    """The sums of features whose rows are their own, piece by piece of these."""
    cdef Py_ssize_t start = v.row, row
    while v.row < row_end:
        row = v.row
        take_rows(v, row_end)
        reduce_rows[lane](v, lane_tag)
        pass_rows(v)
        if v.row > row:
            add_block(v, row == start)


cdef void reduce_chunk(Visit* v, Py_ssize_t chunk, const lane* lane_tag) noexcept nogil:
    """The two sums of one chunk for the visit's features."""
    cdef Job* job = v.job
    cdef const Plan* plan = v.plan
    cdef Py_ssize_t row_end, piece, step = TREE_ROWS if plan.used[G] else 2 * TREE_ROWS
    cdef bint first_block = True
    enter_chunk[lane](v, chunk, &row_end, lane_tag)
    piece = v.width
    if plan.layout != LONG_RUN and plan.layout != ROWS and (
        v.access[X] != DIRECT or v.access[G] != DIRECT or v.gate == BEFORE
        or (plan.used[W] and not weighs_in_kernel(plan)) or plan.used[S]
    ):
        piece = min(
            min(piece, <Py_ssize_t> GATHER_COLUMNS),  # and what the buffers hold of a tree
            <Py_ssize_t> (GATHER_ELEMENTS // step * sizeof(double) // sizeof(lane)),
        )
    v.group = rows_at_hand(v, piece, step)
    v.ahead = 0
    if (
        job.schedule.prefetch and not v.wide and plan.layout != LONG_RUN and plan.layout != ROWS
        and row_end - v.row > 2 * TREE_ROWS  # else none come next: (16, 65536) 281 to 270 us
    ):
        # A half type's are widened in pieces of some columns, so that more rows are on their way:
        # (16384, 1024) in float16 on one thread 11.7 to 8.3 ms.
        v.ahead = (
            AHEAD_HALVES if is_half(plan.storage) and not plan.as_stored
            else rows_ahead(
                v.width * size_of(plan.storage), TREE_ROWS if plan.used[G] else v.segment.tree_rows
            )
        )
    if v.ahead and (
        v.access[X] == GATHERED or (plan.used[W] and not weighs_in_kernel(plan))
    ):  # those at hand were asked for
        v.ahead = min(max(v.ahead, v.group), <Py_ssize_t> AHEAD_ROWS)
    expand_constants[lane](v, job.op.reduce_columns, job.op.n_reduce, lane_tag)
    if plan.used[W]:
        set_weights[lane](v, lane_tag)
    if plan.layout == ROWS:
        reduce_own_rows[lane](v, row_end, lane_tag)
    elif v.segment.n_joined * v.segment.n_lanes == 1:  # columns are features: no copy
        v.sum[0] = sums_of_chunk(v, 0)
        v.sum[1] = sums_of_chunk(v, 1)
    while v.row < row_end:
        reduce_block_of_rows[lane](
            v, min(v.row + plan.block_rows, row_end), piece, lane_tag
        )
        add_block(v, first_block)
        first_block = False
