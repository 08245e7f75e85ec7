# apply: the second visit to a chunk of a tile.


cdef void point_outputs(Visit* v, const lane* lane_tag) noexcept nogil:
    """Point the rows of the outputs at where they belong, or into their buffers."""
    cdef const Plan* plan = v.plan
    cdef Py_ssize_t i
    cdef int r
    for r in range(Y, W):
        if plan.used[r] and (v.access[r] == DIRECT or (r == Y and v.stream)):
            find_rows(v, r, v.n_rows, True, v.s.row[r])
        elif plan.used[r]:
            for i in range(v.n_rows):
                v.s.row[r][i] = <char*> (<lane*> v.s.buffer[r] + i * v.width)


cdef Py_ssize_t pad_outputs(Visit* v, const lane* lane_tag) noexcept nogil:
    """Rows beyond those at hand, for kernels that take APPLY_ROWS at a time."""
    cdef Scratch* s = v.s
    cdef lane* spare = <lane*> s.column[SPARE]
    cdef Py_ssize_t i, n
    if v.singly:
        return v.n_rows
    n = pad_rows[lane](v, X, SHIFT_X, APPLY_ROWS, lane_tag)
    pad_rows[lane](v, G, SHIFT_G, APPLY_ROWS, lane_tag)
    pad_rows[lane](
        v, R, SHIFT_R if v.job.op.formula == MIXED else SHIFT_X, APPLY_ROWS, lane_tag
    )
    for i in range(v.n_rows, n):
        s.row[Y][i] = s.row[D][i] = <char*> (spare + (i % APPLY_ROWS - 1) * v.width)
    return n


cdef void apply_mixed(Visit* v, Py_ssize_t n, const lane* lane_tag) noexcept nogil:
    """Both outputs of the second order.  Frozen statistics have only ddout here."""
    cdef Block block
    fill_gradient[lane](&block, v, n, lane_tag)
    block.shift[R] = <char*> columns_at[lane](v, SHIFT_R, lane_tag)
    if v.plan.used[Y]:
        block.formula = MIXED
        block.coef[X] = <char*> columns_at[lane](v, MIX_X, lane_tag)
        block.coef[G] = <char*> columns_at[lane](v, MIX_G, lane_tag)
        block.coef[R] = <char*> columns_at[lane](v, MIX_R, lane_tag)
        block.bias = <char*> columns_at[lane](v, MIX_BIAS, lane_tag)
        apply_block(&block)
    fill_gradient[lane](&block, v, n, lane_tag)
    block.row[G] = v.s.row[R]
    block.row[Y] = v.s.row[D]
    block.shift[G] = <char*> columns_at[lane](v, SHIFT_R, lane_tag)
    apply_block(&block)


cdef void apply_affine(Visit* v, Py_ssize_t n, const lane* lane_tag) noexcept nogil:
    cdef const Plan* plan = v.plan
    cdef Block block
    if plan.used[S]:
        n = v.n_rows
        point_parameters[lane](v, S, lane_tag)
        point_parameters[lane](v, B, lane_tag)
    fill_block[lane](&block, v, n, lane_tag)
    block.row[X] = v.s.row[v.job.op.input if plan.used[G] else X]
    if plan.layout == LONG_RUN and v.access[Y] == DIRECT:
        block.ahead = v.job.schedule.prefetch_output
    block.formula = (
        SCALED if plan.used[S] else ADDED if plan.used[R] and not plan.used[G] else AFFINE
    )
    block.coef[X] = <char*> columns_at[lane](v, COEF_X, lane_tag)
    block.bias = <char*> columns_at[lane](v, BIAS, lane_tag)
    if not v.job.op.takes_dout:
        block.activation = v.job.activation
    apply_block(&block)


cdef void apply_at_hand(Visit* v, const lane* lane_tag) noexcept nogil:
    """The second visit to the columns at hand of the rows at hand."""
    cdef const Plan* plan = v.plan
    cdef Py_ssize_t n, i
    cdef int r
    cdef Block block
    if v.job.schedule.prefetch_output and plan.used[Y] and v.access[Y] == COPIED:
        find_rows(v, Y, v.n_rows, True, v.s.row[Y])
        for i in range(v.n_rows):
            bn_prefetch(v.s.row[Y][i], v.width * size_of(plan.storage))
    fetch_inputs[lane](v, lane_tag)
    if v.s.adds and plan.layout != ROWS:
        add_columns[lane](v, lane_tag)
        scale_rows[lane](v, lane_tag)
    if plan.used[W]:
        weigh_rows[lane](v, lane_tag)
    point_outputs[lane](v, lane_tag)
    n = pad_outputs[lane](v, lane_tag)
    if v.job.op.formula == MIXED:
        apply_mixed[lane](v, n, lane_tag)
    elif v.job.op.formula == AFFINE:
        apply_affine[lane](v, n, lane_tag)
    elif v.s.adds and plan.layout == ROWS and not v.wide:
        differentiate_own_rows[lane](v, lane_tag)
    else:
        fill_gradient[lane](&block, v, n, lane_tag)
        apply_block(&block)
    for r in range(Y, W):
        if plan.used[r] and v.access[r] != DIRECT and not (r == Y and v.stream):
            store_rows[lane](v, r, v.access[r], v.s.row[r], lane_tag)


cdef void apply_rows(Visit* v, Py_ssize_t row_end, const lane* lane_tag) noexcept nogil:
    """The same for all rows up to one."""
    cdef const Plan* plan = v.plan
    if v.s.adds:
        set_hat_columns[lane](v, lane_tag)
        v.scales = plan.layout == ROWS  # of columns only what has been added up
    v.group = rows_at_hand(v, v.width, APPLY_ROWS)
    v.stream = streams_rows(plan, v.access)
    v.singly = v.stream or v.as_stored or (v.job.schedule.singly and v.width % (LANES // 2) == 0)
    v.ahead = 0
    if (
        v.job.schedule.prefetch_again and plan.layout != LONG_RUN and plan.layout != ROWS
    ):
        v.singly = True
        if not rows_touch(v):  # else the hardware's prefetchers follow them
            v.ahead = rows_ahead(v.width * size_of(plan.storage), TREE_ROWS)
    while v.row < row_end:
        take_rows(v, row_end)
        apply_at_hand[lane](v, lane_tag)
        pass_rows(v)


cdef void apply_chunk(Visit* v, Py_ssize_t chunk, const lane* lane_tag) noexcept nogil:
    """Write one chunk of the output for those of the visit's features that are wide or not."""
    cdef const double* wide = v.job.value[WIDE] + v.feature
    cdef Py_ssize_t row, row_end, q, f, f_end, n = v.n_features
    cdef Py_ssize_t wanted = <Py_ssize_t> fold_run(wide, n)
    if not v.wide:
        wanted = n - wanted
    if wanted == 0:
        return
    enter_chunk[lane](v, chunk, &row_end, lane_tag)
    expand_constants[lane](v, v.job.op.apply_columns, v.job.op.n_apply, lane_tag)
    if v.plan.used[W]:
        set_weights[lane](v, lane_tag)
    if wanted == n:
        apply_rows[lane](v, row_end, lane_tag)
        return
    row = v.row
    for q in range(v.segment.n_joined):
        f = 0
        while f < n:
            if wide[f] != v.wide:
                f += 1
                continue
            f_end = f + 1
            while f_end < n and wide[f_end] == v.wide:
                f_end += 1
            v.row = row
            v.first = (q * n + f) * v.segment.n_run
            v.width = (f_end - f) * v.segment.n_run
            apply_rows[lane](v, row_end, lane_tag)
            f = f_end
