# Gradients of gamma and beta that vary within a statistic: sums over rows of all features.
#
# Their order must not depend on tiles. Four rows whose numbers begin with a multiple of four, or
# TREE_COLUMNS columns likewise, are added in native lanes if all of them can, else in wide ones;
# then one after the other, and after FOLD_ROWS or FOLD_COLUMNS onto the unit's totals, with the
# rounding errors kept.

cdef void set_hat_columns(Visit* v, const lane* lane_tag) noexcept nogil:
    cdef double** value = v.job.value
    cdef lane* shift = <lane*> v.s.column[HAT_SHIFT]
    cdef lane* scale = <lane*> v.s.column[HAT_SCALE]
    cdef lane* rest = <lane*> v.s.column[HAT_REST]
    cdef Py_ssize_t k, f
    cdef double left
    for k in range(v.n_features):
        f = v.feature + k
        left = (value[MEAN][f] - value[SHIFT_X][f]) + value[MEAN_LOW][f]
        shift[k] = <lane> (value[SHIFT_X][f] * value[FACTOR_X][f])
        scale[k] = <lane> (value[INV_STD][f] / value[FACTOR_X][f])
        rest[k] = <lane> (-left * value[INV_STD][f] if left != 0 else 0.0)


cdef void add_own_rows(
    Visit* v, Py_ssize_t i, Py_ssize_t step, Py_ssize_t size, const lane* lane_tag,
) noexcept nogil:
    """dbeta and dgamma of the rows at hand from i on, which are features, into the thread's sums.
    """
    cdef const lane** x = <const lane**> v.s.row[X]
    cdef const lane** g = <const lane**> v.s.row[G]
    cdef const lane* shift = columns_at[lane](v, HAT_SHIFT, lane_tag)
    cdef const lane* scale = columns_at[lane](v, HAT_SCALE, lane_tag)
    cdef const lane* rest = columns_at[lane](v, HAT_REST, lane_tag)
    cdef bint same = step == 1 and v.plan.feature_stride[S] == 0 and not v.wide
    cdef double* s
    cdef double* ss
    while i < v.n_rows:
        s = v.s.varying + (v.s.row[S][i] - v.plan.base[S]) // size
        ss = s + v.job.varying.size
        if same and i + 4 <= v.n_rows:
            differentiate_four[lane](
                x[i], x[i + 1], x[i + 2], x[i + 3], g[i], g[i + 1], g[i + 2], g[i + 3],
                NULL, NULL, NULL, NULL, v.width, shift + i, shift, shift, shift, shift,
                scale + i, rest + i, shift, s, ss, False,
            )
            i += 4
            continue
        if step == 1:
            sum_one_row[lane](x[i], g[i], v.width, shift[i], scale[i], rest[i], 1, s, ss)
        else:
            sum_one_row[lane](x[i], g[i], v.width, shift[i], scale[i], rest[i], step, s, ss)
        i += 1


cdef void stream_four(
    Visit* v, Py_ssize_t i, double* s, double* ss, const lane* lane_tag,
) noexcept nogil:
    """The same of four rows that go past the caches: a stretch of columns is added up, and then
    written row by row."""
    cdef Block block
    cdef char* at[N_ROLES][4]
    cdef Py_ssize_t size = sizeof(lane), j = 0
    cdef const lane** x = <const lane**> at[X]
    cdef const lane** g = <const lane**> at[G]
    cdef const lane* shift
    cdef int k, r
    v.first += i
    fill_gradient[lane](&block, v, 4, lane_tag)
    shift = <const lane*> block.shift[X]
    for r in range(N_ROLES):
        block.row[r] = at[r]
    while j < v.width:
        for k in range(4):
            at[X][k] = v.s.row[X][i + k] + j * size
            at[G][k] = v.s.row[G][i + k] + j * size
            at[S][k] = v.s.row[S][i + k] + j * size
            at[Y][k] = v.s.row[Y][i + k] + j * size
        block.width = min(
            v.width - j, STRETCH - <Py_ssize_t> (<size_t> at[Y][0] % LINE_BYTES) // size
        )
        differentiate_four[lane](
            x[0], x[1], x[2], x[3], g[0], g[1], g[2], g[3], NULL, NULL, NULL, NULL, block.width,
            shift, shift, shift, shift, shift, columns_at[lane](v, HAT_SCALE, lane_tag),
            columns_at[lane](v, HAT_REST, lane_tag), shift, s + j, ss + j, False,
        )
        apply_block(&block)
        j += block.width
    v.first -= i


cdef void differentiate_own_rows(Visit* v, const lane* lane_tag) noexcept nogil:
    """dx of the rows at hand, which are features, and dbeta and dgamma."""
    cdef Block block
    cdef const lane** x
    cdef const lane** g
    cdef lane** y
    cdef double* s
    cdef Py_ssize_t i = 0, n = v.n_rows, size = sizeof(lane)
    cdef int r
    if v.plan.feature_stride[S] == 0:
        s = v.s.varying + (v.s.row[S][0] - v.plan.base[S]) // size
        fill_gradient[lane](&block, v, n, lane_tag)
        while v.stream and i + 4 <= n:
            stream_four[lane](v, i, s, s + v.job.varying.size, lane_tag)
            i += 4
        while i + 4 <= n:
            x = <const lane**> v.s.row[X] + i
            g = <const lane**> v.s.row[G] + i
            y = <lane**> v.s.row[Y] + i
            differentiate_four[lane](
                x[0], x[1], x[2], x[3], g[0], g[1], g[2], g[3], y[0], y[1], y[2], y[3], v.width,
                <lane*> block.shift[X] + i, <lane*> block.shift[G] + i, <lane*> block.coef[X] + i,
                <lane*> block.coef[G] + i, <lane*> block.bias + i,
                columns_at[lane](v, HAT_SCALE, lane_tag) + i,
                columns_at[lane](v, HAT_REST, lane_tag) + i, <lane*> v.s.row[S][0],
                s, s + v.job.varying.size, True,
            )
            i += 4
    add_own_rows[lane](v, i, 1, size, lane_tag)
    if i == n:
        return
    v.first += i
    fill_gradient[lane](&block, v, n - i, lane_tag)
    v.first -= i
    for r in range(N_ROLES):
        block.row[r] += i
    apply_block(&block)


# ---------------------------------------------------------------- without dx, or in other lanes

cdef void add_columns(Visit* v, const lane* lane_tag) noexcept nogil:
    """The same of the rows at hand, each of one value of every feature."""
    cdef Py_ssize_t size = size_of(lanes_of(v.plan.storage))
    cdef const lane* shift = <lane*> v.s.column[HAT_SHIFT]
    cdef const lane* scale = <lane*> v.s.column[HAT_SCALE]
    cdef const lane* rest = <lane*> v.s.column[HAT_REST]
    cdef double* s
    cdef Py_ssize_t i, j
    find_rows(v, S, v.n_rows, False, v.s.row[S])
    for i in range(v.n_rows):
        s = v.s.varying + (v.s.row[S][i] - v.plan.base[S]) // size
        for j in range(0, v.width, 64):  # TREE_COLUMNS; Cython wants a literal step
            sum_of_row[lane](
                <lane*> v.s.row[X][i] + j, <lane*> v.s.row[G][i] + j,
                min(<Py_ssize_t> TREE_COLUMNS, v.width - j), shift + j, scale + j, rest + j,
                s, s + v.job.varying.size,
            )


cdef void add_features(Visit* v, const lane* lane_tag) noexcept nogil:
    """dbeta and dgamma of the visit's features, into the thread's sums."""
    cdef const Plan* plan = v.plan
    cdef Py_ssize_t chunk, row_end, size = size_of(lanes_of(plan.storage))
    set_hat_columns[lane](v, lane_tag)
    for chunk in range(plan.n_chunks):
        enter_chunk[lane](v, chunk, &row_end, lane_tag)
        v.group = rows_at_hand(v, v.width, 4)
        v.ahead = 0
        while v.row < row_end:
            take_rows(v, row_end)
            fetch_inputs[lane](v, lane_tag)
            if plan.layout == ROWS:
                find_rows(v, S, v.n_rows, False, v.s.row[S])
                add_own_rows[lane](v, 0, v.segment.run_stride[S] // size, size, lane_tag)
            else:
                add_columns[lane](v, lane_tag)
            pass_rows(v)


cdef void sum_parameters(
    Job* job, Py_ssize_t first, Py_ssize_t n, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """dbeta and dgamma of a tile, which has been finished and not yet been written over; those in
    native lanes may come with dx."""
    cdef const double* wide = job.value[WIDE] + first
    cdef bint own = job.apply.layout == ROWS, any_wide = fold_run(wide, n) != 0
    cdef Py_ssize_t part = n, k = 0
    cdef Visit v
    v.job = job
    v.plan = job.apply
    v.s = s
    v.segment = &v.plan.segment[0]
    v.scales = v.wide = False
    # Of columns if their rows come in this order then.  (3000, 30), one thread: 325 to 266 us.
    s.adds = job.applies and not any_wide and (
        is_adjacent(&v) if own else job.apply.n_chunks == 1
    )
    if s.adds:
        return
    if any_wide:
        part = 4 if own else TREE_COLUMNS
    while k < n:
        v.feature = first + k
        v.n_features = min(part, n - k)
        v.wide = fold_run(wide + k, v.n_features) != 0
        if v.wide:
            add_features[double](&v, NULL)
        else:
            add_features[lane](&v, lane_tag)
        k += part


cdef inline Py_ssize_t fold_features(const Job* job) noexcept nogil:
    """Features between two folds."""
    return min(
        <Py_ssize_t> (FOLD_ROWS if job.apply.layout == ROWS else FOLD_COLUMNS),
        job.apply.n_features,
    )


cdef inline bint folds_again(const Job* job) noexcept nogil:
    """Whether a unit may have more than one fold."""
    return job.varying.unit > fold_features(job) and job.n_features > fold_features(job)


cdef void enter_fold(Job* job, Py_ssize_t first, Scratch* s) noexcept nogil:
    """Clear the sums for gamma and beta where a tile begins a fold.  A unit's first are its totals.
    """
    cdef Py_ssize_t n_bytes = 2 * job.varying.size * sizeof(double)
    cdef Py_ssize_t unit = first // job.varying.unit
    if first % job.varying.unit == 0:
        s.varying = job.varying.totals + unit * 2 * job.varying.size
        if job.varying.lows != NULL:
            memset(job.varying.lows + unit * 2 * job.varying.size, 0, n_bytes)
    elif first % job.apply.n_features % fold_features(job) == 0:
        s.varying = s.fold
    else:
        return
    memset(s.varying, 0, n_bytes)


cdef void leave_fold(Job* job, Py_ssize_t first, Py_ssize_t n, Scratch* s) noexcept nogil:
    """A tile's sums for gamma and beta onto its unit's, where it ends a fold."""
    cdef Py_ssize_t end = first % job.apply.n_features + n
    cdef Py_ssize_t place = first // job.varying.unit * 2 * job.varying.size
    s.adds = False
    if s.varying == s.fold and (
        end == job.apply.n_features or end % fold_features(job) == 0
    ):
        add_compensated(
            job.varying.totals + place, job.varying.lows + place, s.fold, 2 * job.varying.size
        )
