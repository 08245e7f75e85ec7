# The two visits to a tile: sums (reduce) and output (apply), block by block.

cdef enum Kind:
    FORWARD                   # statistics of x, then apply
    FORWARD_FROZEN            # apply with the statistics that are given
    BACKWARD                  # sums of dout, then dx through the batch statistics
    BACKWARD_FROZEN           # sums of dout; dx = gamma inv_std dout
    PRODUCT                   # sum of the product of two arrays, their means taken off
    SECOND                    # gradients of the gradients: see second.pxi

cdef enum:
    N_VALUES = 15             # arrays of one value per feature that a call needs, besides sums,
    N_GATE_VALUES = 5         # and for a gate
    N_OPTION_COLUMNS = 21     # of constants and offsets, if there are options

cdef struct Parameter:        # gamma or beta as the caller gave it; data is NULL where unused
    const char* data
    Py_ssize_t stride
    bint single

cdef struct Second:           # what the second order needs besides, all with one value per feature
    double* mean_r            # of ddx
    double* mean_r_low
    double* mean_g
    double* mean_g_low
    double* product           # mean (ddx - its mean) (dout - its mean)
    double* along_r           # mean ddx x_hat
    double* along_g           # mean dout x_hat
    double* ddgamma
    double* ddbeta
    double* shift_r           # constants, see second_constants
    double* mix_g
    double* mix_r
    double* mix_x
    double* mix_bias

cdef struct Job:
    Kind kind
    Plan reduce
    Plan apply
    bint reduces              # the two visits that a call needs
    bint applies
    bint exact_mean           # the mean is that of x itself, so sum (x - mean) = 0
    Activation activation
    double negative_slope
    bint gated                # a plan is
    Py_ssize_t count          # values per feature, M
    double total              # of all parts, if x is one of several; their weights, W; else M
    Py_ssize_t n_features
    Py_ssize_t tile           # features a tile; the first has `lead` more
    Py_ssize_t lead
    Py_ssize_t n_tiles
    double eps
    Parameter gamma_given
    Parameter beta_given
    double* mean              # mean + mean_low is the mean to twice the digits
    double* mean_low
    double* inv_std
    double* var
    double* dgamma
    double* dbeta
    const double* multiplier  # of the second sum: inv_std for dgamma, ones for sum dout (x - mean)
    double* mean_kept         # where the mean of dout and its low part are wanted, or NULL
    double* mean_kept_low
    Second second
    Py_ssize_t stride         # of the arrays below, from one to the next: see lay_out
    double* gamma
    double* beta
    double* shift_x
    double* shift_g
    double* mean_g            # mean_g + mean_g_low is the mean of dout
    double* mean_g_low
    double* factor
    double* scale
    double* slope
    double* bias
    double* mean_gx           # mean of dout x_hat
    double* factor_g
    double* spread            # of the values of dout from which its shift was guessed
    double* retry             # 1 where the sums have to be had again, in wide lanes
    double* wide              # 1 where the output has to be computed in wide lanes
    double* gate_shift        # what forward had as shift, factor, ..., wide
    double* gate_factor
    double* gate_scale
    double* gate_bias
    double* gate_wide
    double* sums              # [chunk][sum 1, its low part, sum 2, its low part][feature]
    Py_ssize_t width
    Py_ssize_t buffer_elements
    bint own_values           # tiles are swept, each with arrays per feature of its own
    bint has_options          # rows need the buffers and columns of options.pxi
    bint stream               # the output goes past the caches
    bint stream_gradient      # so does that of the residual
    bint prefetch             # on the first visit
    bint prefetch_again       # and on the second, as the tile is not in cache
    bint prefetch_output      # on the second, of runs and where rows come through the buffer
    Py_ssize_t scratch_bytes
    char* scratch

cdef struct Scratch:          # one thread's share; columns are `lane` elements, 8 bytes reserved
    char* rows[N_ROLES][BLOCK_ROWS + TREE_ROWS + AHEAD_ROWS]
    char* shift_x
    char* shift_g
    char* factor
    char* factor_g
    char* scale
    char* slope
    char* bias
    char* dummy
    double* sum_1
    double* sum_2
    Py_ssize_t* offset[N_ROLES]
    char* buffer[N_ROLES]
    char* gate_shift          # in `real`
    char* gate_scale
    char* gate_bias
    char* gate_ones
    double* wide_shift
    double* wide_scale
    double* wide_bias
    double* wide_factor
    double* wide_ones
    bint any_wide             # of the tile's gates
    bint gate_first           # dout comes through its gate on its way to the kernel, not in it
    char* weigh_shift
    char* weigh_slope
    char* weigh_rest
    char* weigh_ones
    char* shift_r
    char* mix_g
    char* mix_r
    char* mix_x
    char* mix_bias
    double* values            # the tile's own arrays, if tiles are swept


cdef void lay_out(Job* job, double* values, Py_ssize_t stride, Py_ssize_t first) noexcept nogil:
    """Let the job's arrays per feature begin at feature `first`, `stride` apart.

    A swept tile's are its own and stay in cache: for (16, 65536) they are as large as the data.
    """
    values -= first
    job.stride = stride
    job.gamma = values
    job.beta = values + stride
    job.shift_x = values + 2 * stride
    job.shift_g = values + 3 * stride
    job.factor = values + 4 * stride
    job.scale = values + 5 * stride
    job.slope = values + 6 * stride
    job.bias = values + 7 * stride
    job.mean_g = values + 8 * stride
    job.mean_g_low = values + 9 * stride
    job.retry = values + 10 * stride
    job.wide = values + 11 * stride
    job.factor_g = values + 12 * stride
    job.spread = values + 13 * stride
    job.mean_gx = values + 14 * stride
    values += N_VALUES * stride
    if job.gated:
        job.gate_shift = values
        job.gate_factor = values + stride
        job.gate_scale = values + 2 * stride
        job.gate_bias = values + 3 * stride
        job.gate_wide = values + 4 * stride
        values += N_GATE_VALUES * stride
    job.sums = values


cdef void read_parameter(
    const Parameter* given, Py_ssize_t first, Py_ssize_t n, double* restrict values,
) noexcept nogil:
    cdef Py_ssize_t f
    cdef const char* data = given.data + first * given.stride
    if given.single and given.stride == sizeof(float):  # a step that the compiler can vectorize
        for f in range(n):
            values[f] = (<const float*> data)[f]
    elif given.single:
        for f in range(n):
            values[f] = (<const float*> (data + f * given.stride))[0]
    else:
        for f in range(n):
            values[f] = (<const double*> (data + f * given.stride))[0]


cdef inline void tile_range(
    const Job* job, Py_ssize_t tile, Py_ssize_t* first, Py_ssize_t* n_features,
) noexcept nogil:
    first[0] = tile * job.tile + (job.lead if tile else 0)
    n_features[0] = min(
        job.tile + (0 if tile else job.lead), job.n_features - first[0]
    )


cdef Py_ssize_t group_rows(
    const Plan* plan, const Access* access, Py_ssize_t width, Py_ssize_t step, bint gate_first,
) noexcept nogil:
    """Rows taken at a time: a whole block, or what fits the buffers in multiples of `step`."""
    cdef bint direct = not (gate_first or plan.used[W])
    cdef int r
    for r in range(W):
        direct = direct and access[r] == DIRECT
    if direct:
        return min(plan.block_rows, <Py_ssize_t> BLOCK_ROWS)
    if plan.along:
        step = 1
    return max(step, min(<Py_ssize_t> BLOCK_ROWS, GATHER_ELEMENTS // width // step * step))


cdef inline Py_ssize_t rows_ahead(Py_ssize_t row_bytes) noexcept nogil:
    return max(
        <Py_ssize_t> TREE_ROWS,
        min(<Py_ssize_t> AHEAD_ROWS, AHEAD_BYTES // row_bytes // TREE_ROWS * TREE_ROWS),
    )


cdef void fetch_rows(
    const Plan* plan, const Segment* segment, int role, Access access,
    Py_ssize_t tile_first, Py_ssize_t j0, Py_ssize_t width, Py_ssize_t row, Py_ssize_t n,
    Py_ssize_t ahead, Scratch* s, const real* real_tag, const lane* lane_tag, const lane* factor,
) noexcept nogil:
    """Point s.rows[role] at n rows (and `ahead` more, to prefetch) of the columns from j0 on."""
    cdef Py_ssize_t i, k, known, run
    cdef char* start = plan.base[role] + tile_first * plan.feature_stride[role]
    cdef lane* buffer = <lane*> s.buffer[role]
    cdef lane* packed
    if access != GATHERED:
        start += j0 * plan.itemsize
    known = min(n + ahead, segment.n_rows - row)
    row_pointers(segment, role, start, row, known, s.rows[role])
    for i in range(known, n + ahead):
        s.rows[role][i] = s.rows[role][known - 1]
    if plan.along and ahead:
        for i in range(n):
            bn_prefetch(s.rows[role][i + ahead], width * plan.itemsize)
        ahead = 0
    if access == DIRECT:
        return
    i = 0
    while i < n:
        packed = buffer + i * width
        run = 1
        if plan.storage != NATIVE and access == COPIED:  # rows that touch go as one
            while (
                (run + 1) * width <= TILE_COLUMNS and i + run < n
                and s.rows[role][i + run] == s.rows[role][i] + run * width * plan.itemsize
            ):
                run += 1
        if plan.storage != NATIVE and ahead:  # the kernel cannot: its rows are those in the buffer
            for k in range(i, i + run):
                bn_prefetch(s.rows[role][k + ahead], width * plan.itemsize)
        if access == COPIED and plan.storage == NATIVE:
            memcpy(packed, s.rows[role][i], width * sizeof(real))
        elif access == COPIED:
            widen(plan.storage, s.rows[role][i], run * width, <float*> packed)
        elif plan.storage != NATIVE:
            gather_half_row[lane](
                plan.storage, s.rows[role][i], s.offset[role] + j0, width, packed
            )
        else:
            gather_row[real, lane](
                real_tag, s.rows[role][i], s.offset[role] + j0, width, factor, packed
            )
        for k in range(run):
            s.rows[role][i + k] = <char*> (packed + k * width)
        i += run


cdef void store_rows(
    const Plan* plan, const Segment* segment, int role, Access access, Py_ssize_t tile_first,
    Py_ssize_t j0, Py_ssize_t width, Py_ssize_t row, Py_ssize_t n, Scratch* s,
    const real* real_tag, const lane* lane_tag,
) noexcept nogil:
    """Bring n rows from an output's buffer to where they belong."""
    cdef Py_ssize_t i = 0, run, n_bytes = width * plan.itemsize
    cdef char* start = plan.base[role] + tile_first * plan.feature_stride[role]
    cdef char** rows = s.rows[role]
    cdef lane* buffer = <lane*> s.buffer[role]
    cdef char* packed = <char*> buffer
    if access == GATHERED:
        row_pointers(segment, role, start, row, n, rows)
        for i in range(n):
            if plan.storage != NATIVE:
                scatter_half_row[lane](
                    plan.storage, rows[i], s.offset[role] + j0, width, buffer + i * width
                )
            else:
                scatter_row[real, lane](
                    real_tag, rows[i], s.offset[role] + j0, width, buffer + i * width
                )
        return
    row_pointers(segment, role, start + j0 * plan.itemsize, row, n, rows)
    if access == STREAMED and plan.storage != NATIVE:
        packed = <char*> (buffer + n * width)  # float's half of the buffer, and half as much again
        narrow(plan.storage, <float*> buffer, n * width, packed)
    while i < n:  # rows that touch go as one, for fewer broken lines
        run = 1
        while i + run < n and rows[i + run] == rows[i] + run * n_bytes:
            run += 1
        if access == STREAMED:
            bn_stream(rows[i], packed + i * n_bytes, run * n_bytes)
        else:
            narrow(plan.storage, <float*> (buffer + i * width), run * width, rows[i])
        i += run


cdef void set_gradient(
    Gradient* block, const Job* job, const Plan* plan, Scratch* s, Py_ssize_t n_rows,
    Py_ssize_t j0, Py_ssize_t width, Py_ssize_t ahead, const lane* lane_tag,
) noexcept nogil:
    """What both visits of backward tell their kernels."""
    block.x = s.rows[X]
    block.g = s.rows[G]
    block.y = NULL
    block.n_rows = n_rows
    block.width = width
    block.ahead = ahead
    block.along = plan.along
    block.shift_x = <char*> (<lane*> s.shift_x + j0)
    block.shift_g = <char*> (<lane*> s.shift_g + j0)
    block.scale = <char*> (<lane*> s.scale + j0)
    block.slope = <char*> (<lane*> s.slope + j0)
    block.bias = <char*> (<lane*> s.bias + j0)
    block.sum_1 = s.sum_1 + j0
    block.sum_2 = s.sum_2 + j0
    block.activation = IDENTITY
    block.open_shift = block.open_scale = block.open_bias = block.shift_x
    block.open_slope = job.negative_slope
    if plan.gated and not s.gate_first:
        block.activation = job.activation
        block.open_shift = <char*> (<lane*> s.gate_shift + j0)
        block.open_scale = <char*> (<lane*> s.gate_scale + j0)
        block.open_bias = <char*> (<lane*> s.gate_bias + j0)


cdef void set_all(lane* columns, Py_ssize_t width, lane value) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(width):
        columns[j] = value


cdef void set_factors(
    const Job* job, const Segment* segment, Py_ssize_t first, Py_ssize_t n_features, bint wide,
    Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """The columns of what rows are multiplied by as they are gathered: 1 in native lanes."""
    cdef Py_ssize_t width = segment.n_joined * n_features * segment.n_run
    set_all[lane](<lane*> s.dummy, width, 1)
    set_all[lane](<lane*> s.factor, width, 1)
    set_all[lane](<lane*> s.factor_g, width, 1)
    if wide:
        expand[lane](
            job.factor, NULL, first, n_features, segment.n_joined, segment.n_run, <lane*> s.factor
        )
        expand[lane](
            job.factor_g, NULL, first, n_features, segment.n_joined, segment.n_run,
            <lane*> s.factor_g,
        )


cdef void reduce_rows(
    Job* job, const Segment* segment, const Access* access, Py_ssize_t first,
    Py_ssize_t n_features, Py_ssize_t j0, Py_ssize_t width, Py_ssize_t row, Py_ssize_t n,
    Py_ssize_t ahead, Scratch* s, const real* real_tag, const lane* lane_tag, bint wide,
) noexcept nogil:
    """Add columns j0 .. j0 + width - 1 of n rows to the sums."""
    cdef const Plan* plan = &job.reduce
    cdef bint products = plan.used[G] or plan.used[W]
    cdef lane* shift_x = <lane*> s.shift_x + j0
    cdef lane* shift_g = <lane*> s.shift_g + j0
    cdef Gradient block
    fetch_inputs[real, lane](
        job, plan, segment, access, first, n_features, j0, width, row, n, ahead,
        s, real_tag, lane_tag, wide,
    )
    if plan.used[D] and not wide:
        store_gradient[real](job, plan, segment, first, j0, width, row, n, s, real_tag)
    if plan.storage != NATIVE or s.gate_first or plan.used[W]:
        ahead = 0
    while n % TREE_ROWS and not plan.along:
        s.rows[X][n] = <char*> shift_x
        s.rows[G][n] = <char*> shift_g
        n += 1
    if products:
        set_gradient[lane](&block, job, plan, s, n, j0, width, ahead, lane_tag)
        gradient_rows[lane](&block, lane_tag)
    elif plan.along:
        stats_along[lane](s.rows[X], n, width, shift_x, s.sum_1, s.sum_2)
    else:
        stats_across[lane](
            s.rows[X], n, width, shift_x, s.sum_1 + j0, s.sum_2 + j0, ahead
        )


cdef void reduce_chunk(
    Job* job, Py_ssize_t chunk, Py_ssize_t first, Py_ssize_t n_features, Scratch* s,
    const real* real_tag, const lane* lane_tag, bint wide,
) noexcept nogil:
    """The two sums of one chunk for the tile's features, into job.sums."""
    cdef Plan* plan = &job.reduce
    cdef Segment* segment
    cdef int index, r
    cdef Access access[N_ROLES]
    cdef Py_ssize_t row, row_end, block_end, n, group, width, ahead, n_columns, piece, j0
    cdef double* total = job.sums + chunk * 4 * job.stride + first
    cdef bint first_block = True
    chunk_range(plan, chunk, &index, &row, &row_end)
    segment = &plan.segment[index]
    width = segment.n_joined * n_features * segment.n_run
    for r in range(N_ROLES):
        access[r] = access_to(plan, segment, r, n_features, wide)
        if access[r] == GATHERED:
            column_offsets(plan, segment, r, n_features, s.offset[r])
    prepare_gate[real](job, plan, segment, first, n_features, wide, s, real_tag)
    piece = width
    if not plan.along and (
        access[X] != DIRECT or access[G] != DIRECT or s.gate_first or plan.used[W]
    ):
        piece = min(width, <Py_ssize_t> GATHER_COLUMNS)
    group = group_rows(plan, access, piece, TREE_ROWS, s.gate_first)
    ahead = 0
    if job.prefetch and not wide and not plan.along:
        # A half type's are widened in pieces of some columns, so that more rows are on their way:
        # (16384, 1024) in float16 on one thread 11.7 to 8.3 ms.
        ahead = rows_ahead(width * plan.itemsize) if plan.storage == NATIVE else AHEAD_ROWS
    n_columns = segment.n_joined * n_features * segment.n_lanes
    expand[lane](
        job.shift_x, job.factor if wide else NULL, first, n_features,
        segment.n_joined, segment.n_lanes, <lane*> s.shift_x,
    )
    if plan.gated or access[X] == GATHERED or access[G] == GATHERED or access[R] == GATHERED:
        set_factors[lane](job, segment, first, n_features, wide, s, lane_tag)
    if plan.used[G]:
        expand[lane](
            job.shift_g, job.factor_g if wide else NULL, first, n_features, segment.n_joined,
            segment.n_lanes, <lane*> s.shift_g,
        )
    if plan.used[W]:
        set_all[lane](<lane*> s.weigh_ones, width, 1)
        prepare_weights[lane](job, plan, segment, first, n_features, s, lane_tag)
        memset(s.shift_g, 0, n_columns * sizeof(double))
    while row < row_end:
        block_end = min(row + plan.block_rows, row_end)
        memset(s.sum_1, 0, n_columns * sizeof(double))
        memset(s.sum_2, 0, n_columns * sizeof(double))
        while row < block_end:
            n = min(group, block_end - row)
            j0 = 0
            while j0 < width:
                reduce_rows[real, lane](
                    job, segment, access, first, n_features, j0, min(piece, width - j0), row, n,
                    ahead, s, real_tag, lane_tag, wide,
                )
                j0 += piece
            row += n
        fold_columns(s.sum_1, segment.n_joined, n_features, segment.n_lanes)
        fold_columns(s.sum_2, segment.n_joined, n_features, segment.n_lanes)
        if first_block:  # stored: there is nothing yet to add it to
            first_block = False
            memcpy(total, s.sum_1, n_features * sizeof(double))
            memcpy(total + 2 * job.stride, s.sum_2, n_features * sizeof(double))
            memset(total + job.stride, 0, n_features * sizeof(double))
            memset(total + 3 * job.stride, 0, n_features * sizeof(double))
        else:
            add_compensated(total, total + job.stride, s.sum_1, n_features)
            add_compensated(total + 2 * job.stride, total + 3 * job.stride, s.sum_2, n_features)


cdef void reduce_tile(
    Job* job, Py_ssize_t chunk, Py_ssize_t first, Py_ssize_t n_features, Scratch* s,
    const real* real_tag, const lane* lane_tag, bint wide,
) noexcept nogil:
    """The same for a tile, feature by feature where runs are walked along."""
    cdef Py_ssize_t end = first + n_features
    if job.reduce.along:
        n_features = 1
    while first < end:
        reduce_chunk[real, lane](job, chunk, first, n_features, s, real_tag, lane_tag, wide)
        first += n_features


cdef void apply_columns(
    Job* job, const Segment* segment, Py_ssize_t row, Py_ssize_t row_end, Py_ssize_t tile_first,
    Py_ssize_t n_features, Py_ssize_t j0, Py_ssize_t width, const Access* access, Scratch* s,
    const real* real_tag, const lane* lane_tag, bint wide,
) noexcept nogil:
    """The second visit: columns j0 .. j0 + width - 1 of a tile, for a range of rows."""
    cdef Plan* plan = &job.apply
    cdef bint affine = not plan.used[G] or job.kind == BACKWARD_FROZEN
    cdef Py_ssize_t n, n_padded, i, group = group_rows(
        plan, access, width, APPLY_ROWS, s.gate_first
    )
    cdef Py_ssize_t ahead = 0, kernel_ahead
    cdef lane* dummy = <lane*> s.dummy + job.width
    cdef Block block
    cdef Gradient gradient
    cdef int r
    if job.prefetch_again and access[X] != GATHERED and not plan.along:
        ahead = rows_ahead(width * plan.itemsize)
    kernel_ahead = ahead
    if plan.storage != NATIVE or s.gate_first or plan.used[W]:
        kernel_ahead = 0
    while row < row_end:
        n = min(group, row_end - row)
        if job.prefetch_output and plan.used[Y] and access[Y] == COPIED:
            row_pointers(
                segment, Y, plan.base[Y] + tile_first * plan.feature_stride[Y] + j0 * plan.itemsize,
                row, n, s.rows[Y],
            )
            for i in range(n):
                bn_prefetch(s.rows[Y][i], width * plan.itemsize)
        fetch_inputs[real, lane](
            job, plan, segment, access, tile_first, n_features, j0, width, row, n, ahead,
            s, real_tag, lane_tag, wide,
        )
        for r in range(Y, W):
            if plan.used[r] and access[r] == DIRECT:
                row_pointers(
                    segment, r,
                    plan.base[r] + tile_first * plan.feature_stride[r] + j0 * sizeof(real),
                    row, n, s.rows[r],
                )
            elif plan.used[r]:
                for i in range(n):
                    s.rows[r][i] = <char*> ((<lane*> s.buffer[r]) + i * width)
        n_padded = n
        while n_padded % APPLY_ROWS and not plan.along:
            s.rows[X][n_padded] = <char*> (<lane*> s.shift_x + j0)
            s.rows[G][n_padded] = <char*> (<lane*> s.shift_g + j0)
            s.rows[R][n_padded] = <char*> (<lane*> s.shift_x + j0)
            s.rows[Y][n_padded] = <char*> (dummy + (n_padded % APPLY_ROWS - 1) * width)
            if job.kind == SECOND:
                s.rows[R][n_padded] = <char*> (<lane*> s.shift_r + j0)
                s.rows[D][n_padded] = s.rows[Y][n_padded]
            n_padded += 1
        if job.kind == SECOND:
            second_rows[lane](job, plan, s, n_padded, width, j0, kernel_ahead, lane_tag)
        elif affine:
            block.x = s.rows[G if plan.used[G] else X]
            block.r = s.rows[R] if plan.used[R] and not plan.used[G] else NULL
            block.g = NULL
            block.y = s.rows[Y]
            block.n_rows = n_padded
            block.width = width
            block.ahead = kernel_ahead
            if plan.along and access[Y] == DIRECT:
                block.ahead = job.prefetch_output
            block.along = plan.along
            block.shift = <char*> (<lane*> s.shift_x + j0)
            block.scale = <char*> (<lane*> s.scale + j0)
            block.bias = <char*> (<lane*> s.bias + j0)
            block.activation = job.activation if job.kind < BACKWARD else IDENTITY
            block.slope = job.negative_slope
            apply_rows[lane](&block, lane_tag)
        else:
            set_gradient[lane](
                &gradient, job, plan, s, n_padded, j0, width, kernel_ahead, lane_tag
            )
            gradient.y = s.rows[Y]
            gradient_rows[lane](&gradient, lane_tag)
        for r in range(Y, W):
            if plan.used[r] and access[r] != DIRECT:
                store_rows[real, lane](
                    plan, segment, r, access[r], tile_first, j0, width, row, n, s,
                    real_tag, lane_tag,
                )
        row += n


cdef void apply_chunk(
    Job* job, Py_ssize_t chunk, Py_ssize_t first, Py_ssize_t n_features, Scratch* s,
    const real* real_tag, const lane* lane_tag, bint wide,
) noexcept nogil:
    """Write one chunk of the output for those of the tile's features that are `wide` or not."""
    cdef Plan* plan = &job.apply
    cdef Segment* segment
    cdef int index, r
    cdef Access access[N_ROLES]
    cdef Py_ssize_t row, row_end, width, q, f, f_end, j
    cdef Py_ssize_t wanted = <Py_ssize_t> fold_run(job.wide + first, n_features)
    cdef const double** values = [
        job.scale, job.bias, job.slope, job.shift_g, job.second.shift_r, job.second.mix_g,
        job.second.mix_r, job.second.mix_x, job.second.mix_bias,
    ]
    cdef lane** columns = [
        <lane*> s.scale, <lane*> s.bias, <lane*> s.slope, <lane*> s.shift_g,
        <lane*> s.shift_r, <lane*> s.mix_g, <lane*> s.mix_r, <lane*> s.mix_x, <lane*> s.mix_bias,
    ]
    if not wide:
        wanted = n_features - wanted
    if wanted == 0:
        return
    chunk_range(plan, chunk, &index, &row, &row_end)
    segment = &plan.segment[index]
    width = segment.n_joined * n_features * segment.n_run
    for r in range(N_ROLES):
        access[r] = access_to(plan, segment, r, n_features, wide)
        if access[r] == GATHERED:
            column_offsets(plan, segment, r, n_features, s.offset[r])
    if plan.gated or access[X] == GATHERED or access[G] == GATHERED or access[R] == GATHERED:
        set_factors[lane](job, segment, first, n_features, wide, s, lane_tag)
    expand[lane](
        job.shift_x, job.factor if wide else NULL, first, n_features, segment.n_joined,
        segment.n_lanes, <lane*> s.shift_x,
    )
    for r in range(9 if job.kind == SECOND else 4 if plan.used[G] else 2):
        expand[lane](
            values[r], job.factor_g if wide and values[r] == job.shift_g else NULL, first,
            n_features, segment.n_joined, segment.n_lanes, columns[r],
        )
    if plan.used[W]:
        set_all[lane](<lane*> s.weigh_ones, width, 1)
        prepare_weights[lane](job, plan, segment, first, n_features, s, lane_tag)
    prepare_gate[real](job, plan, segment, first, n_features, wide, s, real_tag)
    if wanted == n_features:
        apply_columns[real, lane](
            job, segment, row, row_end, first, n_features, 0, width, access, s,
            real_tag, lane_tag, wide,
        )
        return
    for q in range(segment.n_joined):
        f = 0
        while f < n_features:
            if job.wide[first + f] != wide:
                f += 1
                continue
            f_end = f + 1
            while f_end < n_features and job.wide[first + f_end] == wide:
                f_end += 1
            j = (q * n_features + f) * segment.n_run
            apply_columns[real, lane](
                job, segment, row, row_end, first, n_features, j, (f_end - f) * segment.n_run,
                access, s, real_tag, lane_tag, wide,
            )
            f = f_end
