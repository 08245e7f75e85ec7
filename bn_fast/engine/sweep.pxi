# reduce and apply: the two visits to a tile, block by block.  They know no operation, no norm and
# no dtype; what a row is made of on its way to the kernel (a gate, weights) comes first.
#
#   (a) The gate.  dout's rows are replaced by what comes through the activation.  The gate is that
#       of forward: its constants, and its lanes.  Without a residual and weights it is in the
#       kernels of backward themselves, but for features whose lanes are wide (see finish_tile):
#       then rows are gated in the arrays' own lanes first, and the columns of such features once
#       more in wide lanes; and whatever lanes the kernel wants comes last.
#   (b) Weights, statistics.  sum w d and sum w d^2, d = x - shift, are the sums that backward's
#       kernel makes of w d and x.  Where w = 0 both are replaced, so that no NaN comes near a sum.
#   (c) Weights, gradients.  The sums run over all elements, but for those of weight 0 whose x or
#       dout is not finite.  In dx = a g - w ((x - mean) b + a sum g / W) the bracket, times w,
#       takes the place of x; where w = 0 it is 0 whatever x is.

# Columns of constants: those of the values (see settle.pxi), and
cdef enum:
    ONES = N_OWN
    SUM_1
    SUM_2
    SPARE                     # rows to write to that nobody reads: APPLY_ROWS - 1 of them
    N_PLAIN_COLUMNS           # all that a call without options needs; then
    NATIVE_ONES = N_PLAIN_COLUMNS
    WIDE_ONES
    WIDE_SHIFT                # forward's constants for the gate, in wide lanes
    WIDE_COEF
    WIDE_BIAS
    WIDE_FACTOR
    WEIGH_SHIFT               # of the bracket in (c)
    WEIGH_COEF
    WEIGH_REST
    HAT_SHIFT = N_PLAIN_COLUMNS  # of norms, which have no options: x_hat = (x - shift) scale + rest
    HAT_SCALE = N_PLAIN_COLUMNS + 1
    HAT_REST = N_PLAIN_COLUMNS + 2
    N_COLUMNS = WEIGH_REST + 1

cdef struct Scratch:          # one thread's share; columns are elements of a visit's lanes
    char* row[N_ROLES][BLOCK_ROWS + TREE_ROWS + AHEAD_ROWS]
    char* column[N_COLUMNS]
    Py_ssize_t* offset[N_ROLES]
    char* buffer[N_ROLES]
    double* values            # the tile's own arrays, if tiles are swept
    double* varying           # sums for gamma and beta since the last fold
    bint adds                 # to these as it applies

cdef struct Visit:            # to one chunk of a tile
    Job* job
    const Plan* plan
    const Segment* segment
    Scratch* s
    bint wide                 # in double lanes, of features that native lanes cannot hold
    Gate gate
    bint any_wide             # of the gate's features
    Access access[N_ROLES]
    Py_ssize_t feature        # the tile's first, and how many it has
    Py_ssize_t n_features
    Py_ssize_t group          # rows taken at a time
    Py_ssize_t ahead          # rows that are prefetched
    Py_ssize_t row            # the rows at hand
    Py_ssize_t n_rows
    Py_ssize_t first          # and their columns; or the features whose rows they are
    Py_ssize_t width
    bint scales               # dout by gamma, where that varies
    bint varies               # gamma and beta along the row


cdef inline bint is_plain_column(int column) noexcept nogil:
    return column < N_PLAIN or N_OWN <= column < N_PLAIN_COLUMNS


cdef Py_ssize_t share_scratch(const Job* job, char* memory, Scratch* s) noexcept nogil:
    """Lay one thread's columns and buffers out in its memory; returns how many bytes they take."""
    cdef Py_ssize_t columns = job.width * sizeof(double)
    cdef char* start = memory
    cdef int c, r
    for c in range(N_COLUMNS):
        if job.has_options or is_plain_column(c) or (job.by_row and c <= HAT_REST):
            s.column[c] = memory
            memory += columns * (APPLY_ROWS - 1 if c == SPARE else 1)
    for r in range(N_ROLES):
        if r == X or r == G or r == Y or (job.has_options and r < S) or (job.by_row and r >= S):
            s.offset[r] = <Py_ssize_t*> memory
            s.buffer[r] = memory + columns
            memory += columns + job.buffer_elements * sizeof(double)
    s.adds = False
    s.values = <double*> memory
    if job.own_values:
        memory += (
            (n_own_values(job) + 4 * job.reduce.n_chunks)
            * (job.schedule.tile + job.schedule.lead) * sizeof(double)
        )
    s.varying = <double*> memory
    if job.varying.unit:
        memory += 2 * job.varying.size * sizeof(double)
    return (memory - start + 63) // 64 * 64


# ---------------------------------------------------------------- columns

cdef inline lane* columns_at(Visit* v, int column, const lane* lane_tag) noexcept nogil:
    """A column of constants, from the visit's first column on."""
    return <lane*> v.s.column[column] + v.first


cdef void set_all(lane* columns, Py_ssize_t width, lane value) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(width):
        columns[j] = value


cdef void expand_values(
    const double* restrict values, const double* restrict factor, Py_ssize_t n_features,
    Py_ssize_t n_joined, Py_ssize_t n_run, lane* restrict columns,
) noexcept nogil:
    cdef Py_ssize_t f, e
    cdef lane value
    if n_run > 1:
        for f in range(n_features):
            value = <lane> (values[f] * (factor[f] if factor != NULL else 1))
            for e in range(n_run):
                columns[f * n_run + e] = value
        return
    if factor != NULL:
        for f in range(n_features):
            columns[f] = <lane> (values[f] * factor[f])
    else:
        for f in range(n_features):
            columns[f] = <lane> values[f]
    for e in range(1, n_joined):
        memcpy(columns + e * n_features, columns, n_features * sizeof(lane))


cdef inline void expand(
    Visit* v, int value, int factor, bint fetched, int column, const lane* lane_tag,
) noexcept nogil:
    """A constant per feature, times its factor if there is one (not -1), to a constant per column:
    of the rows as they are fetched, or as the kernels wind them up."""
    cdef double** values = v.job.value
    expand_values(
        values[value] + v.feature, values[factor] + v.feature if factor >= 0 else NULL,
        v.n_features, v.segment.n_joined,
        v.segment.n_run if fetched else v.segment.n_lanes, <lane*> v.s.column[column],
    )


cdef void expand_constants(
    Visit* v, const int* columns, int n, const lane* lane_tag,
) noexcept nogil:
    cdef int i, factor
    for i in range(n):
        factor = -1
        if v.wide and columns[i] == SHIFT_X:
            factor = FACTOR_X
        elif v.wide and (columns[i] == SHIFT_G or columns[i] == SHIFT_R):
            factor = FACTOR_G
        expand[lane](v, columns[i], factor, False, columns[i], lane_tag)


cdef void set_factors(Visit* v, const lane* lane_tag) noexcept nogil:
    """The columns of what rows are multiplied by as they are gathered: 1 in native lanes."""
    set_all[lane](<lane*> v.s.column[ONES], v.width, 1)
    if v.wide and v.plan.layout != ROWS:
        expand[lane](v, FACTOR_X, -1, True, FACTOR_X, lane_tag)
        expand[lane](v, FACTOR_G, -1, True, FACTOR_G, lane_tag)
    else:
        set_all[lane](<lane*> v.s.column[FACTOR_X], v.width, 1)
        set_all[lane](<lane*> v.s.column[FACTOR_G], v.width, 1)


cdef void set_gate(Visit* v, const lane* native_tag) noexcept nogil:
    """The columns of forward's constants, in the lanes that it had, if there is a gate."""
    cdef const Plan* plan = v.plan
    cdef const double* wide = v.job.value[GATE_WIDE]
    cdef Py_ssize_t f
    cdef int r
    v.gate = plan.gate
    v.any_wide = False
    if plan.gate == NONE:
        return
    expand[lane](v, GATE_SHIFT, -1, False, GATE_SHIFT, native_tag)
    expand[lane](v, GATE_COEF, -1, False, GATE_COEF, native_tag)
    expand[lane](v, GATE_BIAS, -1, False, GATE_BIAS, native_tag)
    set_all[lane](<lane*> v.s.column[NATIVE_ONES], v.width, 1)
    for f in range(v.feature, v.feature + v.n_features):
        v.any_wide = v.any_wide or wide[f] != 0
    if not (v.any_wide or v.wide):
        return
    v.gate = BEFORE
    for r in range(Y):
        if plan.used[r]:
            column_offsets(plan, v.segment, r, v.n_features, v.s.offset[r])
    expand[double](v, GATE_SHIFT, GATE_FACTOR, False, WIDE_SHIFT, NULL)
    expand[double](v, GATE_COEF, -1, False, WIDE_COEF, NULL)
    expand[double](v, GATE_BIAS, -1, False, WIDE_BIAS, NULL)
    expand[double](v, GATE_FACTOR, -1, True, WIDE_FACTOR, NULL)
    set_all[double](<double*> v.s.column[WIDE_ONES], v.width, 1)


cdef void set_weights(Visit* v, const lane* lane_tag) noexcept nogil:
    """The columns of weigh_rows; in dx the kernel's own are set aside."""
    cdef Py_ssize_t j
    cdef lane* coef = <lane*> v.s.column[WEIGH_SHIFT]
    cdef lane* rest = <lane*> v.s.column[WEIGH_REST]
    cdef lane* bias = <lane*> v.s.column[WEIGH_COEF]
    column_offsets(v.plan, v.segment, W, v.n_features, v.s.offset[W])
    set_all[lane](<lane*> v.s.column[ONES], v.width, 1)
    if v.plan.used[Y]:
        expand[lane](v, SHIFT_G, FACTOR_G, True, WEIGH_REST, lane_tag)
        expand[lane](v, COEF_G, -1, True, WEIGH_SHIFT, lane_tag)
        expand[lane](v, BIAS, -1, True, WEIGH_COEF, lane_tag)
        for j in range(v.width):
            rest[j] = bias[j] - rest[j] * coef[j]
        expand[lane](v, COEF_X, -1, True, WEIGH_COEF, lane_tag)
        set_all[lane](<lane*> v.s.column[SHIFT_X], v.width, 0)
        set_all[lane](<lane*> v.s.column[COEF_X], v.width, 1)
        set_all[lane](<lane*> v.s.column[BIAS], v.width, 0)
    expand[lane](v, SHIFT_X, FACTOR_X, True, WEIGH_SHIFT, lane_tag)
    memset(v.s.column[SHIFT_G], 0, v.segment.n_joined * v.n_features * v.segment.n_lanes * 8)


# ---------------------------------------------------------------- rows in, rows out

cdef inline Py_ssize_t first_column(const Visit* v) noexcept nogil:
    """Of the columns at hand; rows that are features are at hand whole."""
    return 0 if v.plan.layout == ROWS else v.first


cdef void find_rows(
    Visit* v, int role, Py_ssize_t n, bint at_first, char** rows,
) noexcept nogil:
    """Addresses of n rows from those at hand on, and of their first column at hand or their start.
    """
    cdef const Plan* plan = v.plan
    cdef Py_ssize_t i
    cdef char* start
    if plan.layout == ROWS:
        start = feature_at(plan, role, v.feature + v.first)
        row_pointers(v.segment, role, start, v.row, 1, rows)
        for i in range(1, n):
            rows[i] = rows[0] + i * plan.feature_stride[role]
        return
    start = feature_at(plan, role, v.feature) + (
        v.first * size_of(plan.storage) if at_first else 0
    )
    row_pointers(v.segment, role, start, v.row, n, rows)


cdef void fetch_rows(
    Visit* v, int role, Access access, Py_ssize_t ahead, const lane* factor,
) noexcept nogil:
    """Point the role's rows at those at hand (and `ahead` more, to prefetch)."""
    cdef const Plan* plan = v.plan
    cdef char** rows = v.s.row[role]
    cdef Py_ssize_t size = size_of(plan.storage), width = v.width, n = v.n_rows
    cdef Py_ssize_t i, k, known, run
    cdef lane* buffer = <lane*> v.s.buffer[role]
    cdef lane* packed
    cdef bint half = is_half(plan.storage)
    known = n if plan.layout == ROWS else min(n + ahead, v.segment.n_rows - v.row)
    find_rows(v, role, known, access != GATHERED, rows)
    for i in range(known, n + ahead):
        rows[i] = rows[known - 1]
    if plan.layout == LONG_RUN and ahead:
        for i in range(n):
            bn_prefetch(rows[i + ahead], width * size)
        ahead = 0
    if access == DIRECT:
        return
    i = 0
    while i < n:
        packed = buffer + i * width
        run = 1
        if half and access == COPIED:  # rows that touch go as one
            while (
                (run + 1) * width <= TILE_COLUMNS and i + run < n
                and rows[i + run] == rows[i] + run * width * size
            ):
                run += 1
        if half and ahead:  # the kernel cannot: its rows are those in the buffer
            for k in range(i, i + run):
                bn_prefetch(rows[k + ahead], width * size)
        if access == COPIED:
            load_adjacent[lane](plan.storage, rows[i], run * width, packed)
        else:
            gather_row[lane](
                plan.storage, rows[i], v.s.offset[role] + first_column(v), width, factor, packed
            )
        for k in range(run):
            rows[i + k] = <char*> (packed + k * width)
        i += run


cdef void store_rows(
    Visit* v, int role, Access access, char** from_rows, const lane* lane_tag,
) noexcept nogil:
    """Bring the rows at hand of an output to where they belong."""
    cdef const Plan* plan = v.plan
    cdef char** rows = v.s.row[role]
    cdef Py_ssize_t i = 0, run, width = v.width, n = v.n_rows
    cdef Py_ssize_t n_bytes = width * size_of(plan.storage)
    cdef char* from_[BLOCK_ROWS]
    cdef char* packed
    memcpy(from_, from_rows, n * sizeof(char*))  # they may be the role's own
    find_rows(v, role, n, access != GATHERED, rows)
    if access == GATHERED:
        for i in range(n):
            scatter_row[lane](
                plan.storage, rows[i], v.s.offset[role] + first_column(v), width,
                <lane*> from_[i],
            )
        return
    if access == STREAMED and is_half(plan.storage):
        # To float's half of the buffer, and half as much again.
        packed = <char*> (<lane*> v.s.buffer[role] + n * width)
        narrow(plan.storage, <float*> v.s.buffer[role], n * width, packed)
    while i < n:  # rows that touch go as one, for fewer broken lines
        run = 1
        while (
            i + run < n and rows[i + run] == rows[i] + run * n_bytes
            and from_[i + run] == from_[i] + run * width * <Py_ssize_t> sizeof(lane)
        ):
            run += 1
        if access == STREAMED and is_half(plan.storage):
            bn_stream(rows[i], packed + i * n_bytes, run * n_bytes)
        else:
            store_adjacent[lane](
                plan.storage, <lane*> from_[i], run * width, access == STREAMED, rows[i]
            )
        i += run


# ---------------------------------------------------------------- blocks of rows

cdef void fill_block(
    Block* block, Visit* v, Py_ssize_t n_rows, const lane* lane_tag,
) noexcept nogil:
    """What all kernels are told; pointers that a formula does not use are some that can be read."""
    cdef char* some = <char*> columns_at[lane](v, SHIFT_X, lane_tag)
    cdef int r
    for r in range(N_ROLES):
        block.row[r] = v.s.row[r]
    block.n_rows = n_rows
    block.width = v.width
    block.ahead = 0
    block.walk = (
        ALONG if v.plan.layout == LONG_RUN else BY_ROW if v.plan.layout == ROWS else ACROSS
    )
    block.varies = v.varies
    for r in range(3):
        block.shift[r] = block.coef[r] = some
    block.bias = block.open_shift = block.open_scale = block.open_bias = some
    block.activation = IDENTITY
    block.slope = v.job.negative_slope
    block.sum_1 = <double*> v.s.column[SUM_1] + v.first
    block.sum_2 = <double*> v.s.column[SUM_2] + v.first


cdef void fill_gradient(
    Block* block, Visit* v, Py_ssize_t n_rows, Py_ssize_t ahead, const lane* lane_tag,
) noexcept nogil:
    """The block of x and dout, for their sums or for dx."""
    fill_block[lane](block, v, n_rows, lane_tag)
    block.ahead = ahead
    block.formula = (
        SCALED_GRADIENT if v.plan.used[S] and v.plan.layout == ROWS else GRADIENT
    )
    block.shift[G] = <char*> columns_at[lane](v, SHIFT_G, lane_tag)
    block.coef[X] = <char*> columns_at[lane](v, COEF_X, lane_tag)
    block.coef[G] = <char*> columns_at[lane](v, COEF_G, lane_tag)
    block.bias = <char*> columns_at[lane](v, BIAS, lane_tag)
    if v.gate == INSIDE:
        block.activation = v.job.activation
        block.open_shift = <char*> columns_at[lane](v, GATE_SHIFT, lane_tag)
        block.open_scale = <char*> columns_at[lane](v, GATE_COEF, lane_tag)
        block.open_bias = <char*> columns_at[lane](v, GATE_BIAS, lane_tag)


cdef Py_ssize_t pad_rows(
    Visit* v, int role, int column, Py_ssize_t step, const lane* lane_tag,
) noexcept nogil:
    """Point rows beyond those at hand at a column, up to a multiple of `step`; runs need none."""
    cdef Py_ssize_t n = v.n_rows
    while n % step and v.plan.layout != LONG_RUN and v.plan.layout != ROWS:
        v.s.row[role][n] = <char*> columns_at[lane](v, column, lane_tag)
        n += 1
    return n


# ---------------------------------------------------------------- the gate

cdef void open_rows(
    Visit* v, int shift, int coef, int bias, int ones, Py_ssize_t ahead, char* buffer,
    const lane* lane_tag,
) noexcept nogil:
    """What of the rows of dout comes through, into a buffer, to which the rows of D then point."""
    cdef Block block
    cdef Py_ssize_t i, n
    cdef int r
    for r in range(Y):
        n = pad_rows[lane](v, r, ones, APPLY_ROWS, lane_tag)
    for i in range(n):
        v.s.row[D][i] = buffer + i * v.width * sizeof(lane)
    fill_block[lane](&block, v, n, lane_tag)
    block.row[Y] = v.s.row[D]
    block.ahead = ahead
    block.shift[X] = <char*> columns_at[lane](v, shift, lane_tag)
    block.coef[X] = <char*> columns_at[lane](v, coef, lane_tag)
    block.bias = <char*> columns_at[lane](v, bias, lane_tag)
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
                columns_at[double](v, WIDE_FACTOR if r == X else WIDE_ONES, NULL),
            )
    open_rows[double](
        v, WIDE_SHIFT, WIDE_COEF, WIDE_BIAS, WIDE_ONES, 0, v.s.buffer[Y], NULL
    )
    for j in range(v.width):
        f = v.feature + (v.first + j) // v.segment.n_run % v.n_features
        if wide[f] != 0:
            for i in range(v.n_rows):
                gated[i * v.width + j] = <lane> opened[i * v.width + j]


cdef void open_natively(Visit* v, const lane* native_tag) noexcept nogil:
    """What comes through, in the arrays' own lanes whatever those of the visit are, in D's buffer.
    """
    cdef int r
    for r in range(Y):
        if v.plan.used[r]:
            fetch_rows[lane](
                v, r, access_to(v.plan, v.segment, r, v.n_features, False), 0,
                columns_at[lane](v, NATIVE_ONES, native_tag),
            )
    open_rows[lane](
        v, GATE_SHIFT, GATE_COEF, GATE_BIAS, NATIVE_ONES, 0, v.s.buffer[D], native_tag
    )
    if v.any_wide:
        open_wide_features[lane](v, <lane*> v.s.buffer[D])


cdef void open_slowly(Visit* v, const lane* lane_tag) noexcept nogil:
    """The slow way, where lanes differ: what comes through, as `lane`, in G's buffer."""
    cdef lane* final = <lane*> v.s.buffer[G]
    cdef const lane* factor = columns_at[lane](v, FACTOR_G, lane_tag)
    cdef Py_ssize_t i, start
    if v.plan.storage == FLOAT64:
        open_natively[double](v, NULL)
    else:
        open_natively[float](v, NULL)
    for i in range(v.n_rows):
        start = i * v.width
        if v.plan.storage == FLOAT64:
            gather_step[double, lane](
                <double*> v.s.buffer[D] + start, 1, v.width, factor, final + start
            )
        else:
            gather_step[float, lane](
                <float*> v.s.buffer[D] + start, 1, v.width, factor, final + start
            )
        v.s.row[G][i] = <char*> (final + start)


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
        t = (x[j] - shift[j]) * coef[j] + rest[j]
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
    cdef Storage storage = FLOAT64 if v.plan.storage == FLOAT64 else FLOAT32
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
    if segment.run_stride[W] == 0:
        step = 0
        line *= v.n_features
    elif segment.run_stride[W] != size_of(storage):
        direct = False
    direct = direct and line >= NARROW
    row_pointers(segment, W, v.plan.base[W], v.row, v.n_rows, s.row[W])
    for i in range(v.n_rows):
        x = <lane*> s.row[X][i]
        g = <lane*> s.row[G][i]
        if ahead:  # the kernel cannot: its rows are those in the buffers
            bn_prefetch(s.row[X][i + ahead], v.width * sizeof(lane))
            if v.plan.used[G]:
                bn_prefetch(s.row[G][i + ahead], v.width * sizeof(lane))
        if not direct:
            gather_row[lane](
                storage, s.row[W][i], offset, v.width, columns_at[lane](v, ONES, lane_tag), gathered
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

cdef Py_ssize_t point_parameters(Visit* v, int role, const lane* lane_tag) noexcept nogil:
    """Point the role's rows at gamma or beta as the rows at hand have them, in the visit's lanes;
    returns how far apart a row's are: 1, or 0 if it has but one."""
    cdef const Plan* plan = v.plan
    cdef Storage storage = FLOAT64 if plan.storage == FLOAT64 else FLOAT32
    cdef Py_ssize_t i, step = v.segment.run_stride[S] if plan.layout == ROWS else 0
    cdef char** rows = v.s.row[role]
    cdef lane* buffer = <lane*> v.s.buffer[role]
    find_rows(v, role, v.n_rows, False, rows)
    if sizeof(lane) == size_of(storage) and (step == 0 or step == sizeof(lane)):
        return step != 0
    if step != 0:  # all rows have the same, or there is but one, see rows_at_hand
        gather_row[lane](
            storage, rows[0], v.s.offset[S], v.width, <lane*> v.s.column[ONES], buffer
        )
    for i in range(v.n_rows):
        if step == 0:
            buffer[i] = <lane> load_value(storage, rows[i])
        rows[i] = <char*> (buffer + (i if step == 0 else 0))
    return step != 0


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


# ---------------------------------------------------------------- chunks

cdef inline const lane* gather_factors(Visit* v, int column, const lane* lane_tag) noexcept nogil:
    """What columns are multiplied by as they are gathered.  A row of its own has its feature's."""
    if v.plan.layout != ROWS:
        return columns_at[lane](v, column, lane_tag)
    if v.wide and column != ONES:
        set_all[lane](
            <lane*> v.s.column[column], v.width,
            <lane> v.job.value[column][v.feature + v.first],
        )
    return <lane*> v.s.column[column]


cdef inline bint is_adjacent(const Visit* v) noexcept nogil:
    """Whether gamma along a row can be read where it is, or there is but one."""
    cdef Py_ssize_t stride = v.segment.run_stride[S]
    cdef Py_ssize_t size = 8 if v.plan.storage == FLOAT64 else 4
    return v.plan.layout != ROWS or stride == 0 or (stride == size and (not v.wide or size == 8))


cdef inline bint is_alone(const Visit* v) noexcept nogil:
    """Whether rows of their own are taken one by one: their factors differ, or gamma is gathered."""
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
    return max(<Py_ssize_t> 4, n // 4 * 4) if v.plan.layout == ROWS else n


cdef void fetch_inputs(Visit* v, const lane* lane_tag) noexcept nogil:
    """Point the rows at those of the inputs, as the gate has made them."""
    cdef const Plan* plan = v.plan
    cdef bint slowly = v.gate == BEFORE and (v.wide or v.any_wide)
    cdef bint runs_ahead = plan.layout == LONG_RUN and v.job.schedule.prefetch and not v.wide
    cdef Py_ssize_t i, ahead
    cdef int r, factor
    if slowly:
        open_slowly[lane](v, lane_tag)
    for r in range(Y):
        if plan.used[r] and not (slowly and r != X):
            ahead = v.ahead
            if runs_ahead and (r == R or is_half(plan.storage)):
                ahead = AHEAD_RUNS
            factor = FACTOR_X if r == X else FACTOR_G
            if r == R and v.job.op.formula != MIXED:  # a residual; ddx is scaled as dout is
                factor = ONES
            fetch_rows[lane](v, r, v.access[r], ahead, gather_factors[lane](v, factor, lane_tag))
    if v.scales and plan.used[S] and plan.used[G]:
        if plan.layout == ROWS:  # the kernels multiply
            v.varies = point_parameters[lane](v, S, lane_tag)
        else:
            scale_rows[lane](v, lane_tag)
    if v.gate == BEFORE and not slowly:
        open_rows[lane](
            v, GATE_SHIFT, GATE_COEF, GATE_BIAS, NATIVE_ONES, v.ahead, v.s.buffer[D], lane_tag
        )
        for i in range(v.n_rows):
            v.s.row[G][i] = v.s.row[D][i]


cdef inline Py_ssize_t kernel_ahead(const Visit* v) noexcept nogil:
    """Rows that a kernel may prefetch: none where its own are those in a buffer."""
    cdef bint buffered = (
        is_half(v.plan.storage) or v.gate == BEFORE or v.plan.used[W] or v.plan.used[S]
    )
    return 0 if buffered else v.ahead


cdef void enter_chunk(
    Visit* v, Py_ssize_t chunk, Py_ssize_t* row_end, const lane* lane_tag,
) noexcept nogil:
    """Find the chunk's rows, and how to come to their columns; set the columns of gate and factors.
    """
    cdef const Plan* plan = v.plan
    cdef bint gathers = plan.gate != NONE
    cdef Py_ssize_t n = 1 if plan.layout == ROWS else v.n_features  # of a row
    cdef int index, r
    chunk_range(plan, chunk, &index, &v.row, row_end)
    v.segment = &plan.segment[index]
    v.first = 0
    v.width = v.segment.n_joined * n * v.segment.n_run
    for r in range(N_ROLES):
        v.access[r] = access_to(plan, v.segment, r, v.n_features, v.wide)
        if v.access[r] == GATHERED:
            gathers = gathers or r < Y
            column_offsets(plan, v.segment, r, n, v.s.offset[r])
    if plan.used[S] and not is_adjacent(v):
        gathers = True
        column_offsets(plan, v.segment, S, n, v.s.offset[S])
    if plan.storage == FLOAT64:
        set_gate[double](v, NULL)
    else:
        set_gate[float](v, NULL)
    if gathers:
        set_factors[lane](v, lane_tag)


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
    fill_gradient[lane](&block, v, n, kernel_ahead(v), lane_tag)
    reduce_block[lane](&block, plan.used[G] or plan.used[W], lane_tag)


cdef void reduce_block_of_rows(
    Visit* v, Py_ssize_t row_end, Py_ssize_t piece, const lane* lane_tag,
) noexcept nogil:
    """The sums of rows up to one, on their features; in columns, `piece` at a time."""
    cdef const Segment* segment = v.segment
    cdef Py_ssize_t width = v.width
    cdef Py_ssize_t n_columns = segment.n_joined * v.n_features * segment.n_lanes
    memset(v.s.column[SUM_1], 0, n_columns * sizeof(double))
    memset(v.s.column[SUM_2], 0, n_columns * sizeof(double))
    while v.row < row_end:
        v.n_rows = min(v.group, row_end - v.row)
        v.first = 0
        while v.first < width:
            v.width = min(piece, width - v.first)
            reduce_rows[lane](v, lane_tag)
            v.first += piece
        v.row += v.n_rows
    v.first = 0
    v.width = width
    fold_columns(
        <double*> v.s.column[SUM_1], segment.n_joined, v.n_features, segment.n_lanes
    )
    fold_columns(
        <double*> v.s.column[SUM_2], segment.n_joined, v.n_features, segment.n_lanes
    )


cdef void reduce_own_rows(
    Visit* v, Py_ssize_t row_end, double* total, const lane* lane_tag,
) noexcept nogil:
    """The sums of features whose rows are their own, piece by piece of these."""
    cdef Py_ssize_t n = v.n_features, stride = v.job.stride
    cdef double* sum_1 = <double*> v.s.column[SUM_1]
    cdef double* sum_2 = <double*> v.s.column[SUM_2]
    cdef Py_ssize_t row = v.row
    while v.row < row_end:
        v.first = 0
        while v.first < n:
            v.n_rows = min(v.group, n - v.first)
            reduce_rows[lane](v, lane_tag)
            v.first += v.n_rows
        v.first = 0
        if v.row == row:
            memcpy(total, sum_1, n * sizeof(double))
            memcpy(total + 2 * stride, sum_2, n * sizeof(double))
            memset(total + stride, 0, n * sizeof(double))
            memset(total + 3 * stride, 0, n * sizeof(double))
        else:
            add_compensated(total, total + stride, sum_1, n)
            add_compensated(total + 2 * stride, total + 3 * stride, sum_2, n)
        v.row += 1


cdef void reduce_chunk(Visit* v, Py_ssize_t chunk, const lane* lane_tag) noexcept nogil:
    """The two sums of one chunk for the visit's features, into the job's."""
    cdef Job* job = v.job
    cdef const Plan* plan = v.plan
    cdef Py_ssize_t row_end, piece, n = v.n_features, stride = job.stride
    cdef double* total = job.sums + chunk * 4 * stride + v.feature
    cdef double* sum_1 = <double*> v.s.column[SUM_1]
    cdef double* sum_2 = <double*> v.s.column[SUM_2]
    cdef bint first_block = True
    enter_chunk[lane](v, chunk, &row_end, lane_tag)
    piece = v.width
    if plan.layout != LONG_RUN and plan.layout != ROWS and (
        v.access[X] != DIRECT or v.access[G] != DIRECT or v.gate == BEFORE or plan.used[W]
        or plan.used[S]
    ):
        piece = min(piece, <Py_ssize_t> GATHER_COLUMNS)
    v.group = rows_at_hand(v, piece, TREE_ROWS)
    v.ahead = 0
    if (
        job.schedule.prefetch and not v.wide and plan.layout != LONG_RUN and plan.layout != ROWS
    ):
        # A half type's are widened in pieces of some columns, so that more rows are on their way:
        # (16384, 1024) in float16 on one thread 11.7 to 8.3 ms.
        v.ahead = (
            AHEAD_ROWS if is_half(plan.storage)
            else rows_ahead(v.width * size_of(plan.storage))
        )
    expand_constants[lane](v, job.op.reduce_columns, job.op.n_reduce, lane_tag)
    if plan.used[W]:
        set_weights[lane](v, lane_tag)
    if plan.layout == ROWS:
        reduce_own_rows[lane](v, row_end, total, lane_tag)
    while v.row < row_end:
        reduce_block_of_rows[lane](
            v, min(v.row + plan.block_rows, row_end), piece, lane_tag
        )
        if first_block:  # stored: there is nothing yet to add it to
            first_block = False
            memcpy(total, sum_1, n * sizeof(double))
            memcpy(total + 2 * stride, sum_2, n * sizeof(double))
            memset(total + stride, 0, n * sizeof(double))
            memset(total + 3 * stride, 0, n * sizeof(double))
        else:
            add_compensated(total, total + stride, sum_1, n)
            add_compensated(total + 2 * stride, total + 3 * stride, sum_2, n)


cdef void point_outputs(Visit* v, const lane* lane_tag) noexcept nogil:
    """Point the rows of the outputs at where they belong, or into their buffers."""
    cdef const Plan* plan = v.plan
    cdef Py_ssize_t i
    cdef int r
    for r in range(Y, W):
        if plan.used[r] and v.access[r] == DIRECT:
            find_rows(v, r, v.n_rows, True, v.s.row[r])
        elif plan.used[r]:
            for i in range(v.n_rows):
                v.s.row[r][i] = <char*> (<lane*> v.s.buffer[r] + i * v.width)


cdef Py_ssize_t pad_outputs(Visit* v, const lane* lane_tag) noexcept nogil:
    """Rows beyond those at hand, for kernels that take APPLY_ROWS at a time."""
    cdef Scratch* s = v.s
    cdef lane* spare = <lane*> s.column[SPARE]
    cdef Py_ssize_t i, n = pad_rows[lane](v, X, SHIFT_X, APPLY_ROWS, lane_tag)
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
    fill_gradient[lane](&block, v, n, kernel_ahead(v), lane_tag)
    block.shift[R] = <char*> columns_at[lane](v, SHIFT_R, lane_tag)
    if v.plan.used[Y]:
        block.formula = MIXED
        block.coef[X] = <char*> columns_at[lane](v, MIX_X, lane_tag)
        block.coef[G] = <char*> columns_at[lane](v, MIX_G, lane_tag)
        block.coef[R] = <char*> columns_at[lane](v, MIX_R, lane_tag)
        block.bias = <char*> columns_at[lane](v, MIX_BIAS, lane_tag)
        apply_block[lane](&block, lane_tag)
    fill_gradient[lane](&block, v, n, kernel_ahead(v), lane_tag)
    block.row[G] = v.s.row[R]
    block.row[Y] = v.s.row[D]
    block.shift[G] = <char*> columns_at[lane](v, SHIFT_R, lane_tag)
    apply_block[lane](&block, lane_tag)


cdef void apply_affine(Visit* v, Py_ssize_t n, const lane* lane_tag) noexcept nogil:
    cdef const Plan* plan = v.plan
    cdef Block block
    if plan.used[S]:
        n = v.n_rows
        v.varies = point_parameters[lane](v, S, lane_tag)
        point_parameters[lane](v, B, lane_tag)
    fill_block[lane](&block, v, n, lane_tag)
    block.row[X] = v.s.row[v.job.op.input if plan.used[G] else X]
    block.ahead = kernel_ahead(v)
    if plan.layout == LONG_RUN and v.access[Y] == DIRECT:
        block.ahead = v.job.schedule.prefetch_output
    block.formula = (
        SCALED if plan.used[S] else ADDED if plan.used[R] and not plan.used[G] else AFFINE
    )
    block.coef[X] = <char*> columns_at[lane](v, COEF_X, lane_tag)
    block.bias = <char*> columns_at[lane](v, BIAS, lane_tag)
    if not v.job.op.takes_dout:
        block.activation = v.job.activation
    apply_block[lane](&block, lane_tag)


# ---------------------------------------------------------------- gradients of gamma and beta
#
# Where these vary within a statistic, their gradients are sums over rows of all features, and the
# order must not depend on tiles: four rows whose numbers begin with a multiple of four, or
# TREE_COLUMNS columns likewise, are added in native lanes if all of them can, else in wide ones;
# then one after the other, and after FOLD_ROWS or FOLD_COLUMNS to the unit's totals, with the
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
            sum_four_rows[lane](x + i, g + i, v.width, shift + i, scale + i, rest + i, s, ss)
            i += 4
            continue
        if step == 0:
            sum_of_row[lane](x[i], g[i], v.width, shift + i, scale + i, rest + i, 0, s, ss)
        elif step == 1:
            sum_one_row[lane](x[i], g[i], v.width, shift[i], scale[i], rest[i], 1, s, ss)
        else:
            sum_one_row[lane](x[i], g[i], v.width, shift[i], scale[i], rest[i], step, s, ss)
        i += 1


cdef void differentiate_own_rows(Visit* v, const lane* lane_tag) noexcept nogil:
    """dx of the rows at hand, which are features, and dbeta and dgamma."""
    cdef Block block
    cdef const lane** x
    cdef const lane** g
    cdef lane** y
    cdef double* s
    cdef Py_ssize_t i = 0, n = v.n_rows, size = sizeof(lane)
    cdef int r
    if v.varies and v.plan.feature_stride[S] == 0:
        s = v.s.varying + (v.s.row[S][0] - v.plan.base[S]) // size
        fill_gradient[lane](&block, v, n, 0, lane_tag)
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
                s, s + v.job.varying.size,
            )
            i += 4
    add_own_rows[lane](v, i, v.varies, size, lane_tag)
    if i == n:
        return
    v.first += i
    fill_gradient[lane](&block, v, n - i, 0, lane_tag)
    v.first -= i
    for r in range(N_ROLES):
        block.row[r] += i
    apply_block[lane](&block, lane_tag)


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
    if plan.used[W]:
        weigh_rows[lane](v, lane_tag)
    point_outputs[lane](v, lane_tag)
    n = pad_outputs[lane](v, lane_tag)
    if v.job.op.formula == MIXED:
        apply_mixed[lane](v, n, lane_tag)
    elif v.job.op.formula == AFFINE:
        apply_affine[lane](v, n, lane_tag)
    elif v.s.adds and not v.wide:
        differentiate_own_rows[lane](v, lane_tag)
    else:
        fill_gradient[lane](&block, v, n, kernel_ahead(v), lane_tag)
        apply_block[lane](&block, lane_tag)
    for r in range(Y, W):
        if plan.used[r] and v.access[r] != DIRECT:
            store_rows[lane](v, r, v.access[r], v.s.row[r], lane_tag)


cdef void apply_rows(Visit* v, Py_ssize_t row_end, const lane* lane_tag) noexcept nogil:
    """The same for all rows up to one; of rows of their own, piece by piece."""
    cdef const Plan* plan = v.plan
    if v.s.adds:
        set_hat_columns[lane](v, lane_tag)
    v.group = rows_at_hand(v, v.width, APPLY_ROWS)
    v.ahead = 0
    if (
        v.job.schedule.prefetch_again and v.access[X] != GATHERED and plan.layout != LONG_RUN
        and plan.layout != ROWS
    ):
        v.ahead = rows_ahead(v.width * size_of(plan.storage))
    while v.row < row_end and plan.layout != ROWS:
        v.n_rows = min(v.group, row_end - v.row)
        apply_at_hand[lane](v, lane_tag)
        v.row += v.n_rows
    while v.row < row_end:
        v.first = 0
        while v.first < v.n_features:
            v.n_rows = min(v.group, v.n_features - v.first)
            apply_at_hand[lane](v, lane_tag)
            v.first += v.n_rows
        v.row += 1


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


# ---------------------------------------------------------------- tiles

cdef inline Py_ssize_t visited_together(
    const Job* job, const Plan* plan, bint applies, Py_ssize_t first, Py_ssize_t n,
) noexcept nogil:
    """Of n features: one where runs are walked along; where rows are their own and written, those
    of the same lanes."""
    cdef const double* wide = job.value[WIDE]
    cdef Py_ssize_t alike = 1
    if plan.layout == ROWS and applies:
        while alike < n and wide[first + alike] == wide[first]:
            alike += 1
        return alike
    return 1 if plan.layout == LONG_RUN else n


cdef void visit_tile(
    Job* job, bint applies, Py_ssize_t chunk, Py_ssize_t first, Py_ssize_t n_features, bint wide,
    Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """One visit to one chunk of a tile."""
    cdef Visit v
    v.job = job
    v.plan = &job.apply if applies else &job.reduce
    v.s = s
    v.wide = wide
    v.scales = True
    v.varies = False
    v.feature = first
    while v.feature < first + n_features:
        v.n_features = visited_together(
            job, v.plan, applies, v.feature, first + n_features - v.feature
        )
        if applies:
            apply_chunk[lane](&v, chunk, lane_tag)
        else:
            reduce_chunk[lane](&v, chunk, lane_tag)
        v.feature += v.n_features


cdef void reduce_tile(
    Job* job, Py_ssize_t chunk, Py_ssize_t first, Py_ssize_t n, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    visit_tile[lane](job, False, chunk, first, n, False, s, lane_tag)


cdef void apply_tile(
    Job* job, Py_ssize_t chunk, Py_ssize_t first, Py_ssize_t n, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """In native lanes, then in wide ones, for the features that need them."""
    cdef Py_ssize_t end = first + n
    cdef double n_wide = fold_run(job.value[WIDE] + first, n)
    if n_wide != 0 and job.apply.layout == LONG_RUN:
        n = 1
    while first < end:
        visit_tile[lane](job, True, chunk, first, n, False, s, lane_tag)
        if n_wide != 0:
            visit_tile[double](job, True, chunk, first, n, True, s, NULL)
        first += n


cdef void start_tile(Job* job, Py_ssize_t first, Py_ssize_t n, const lane* lane_tag) noexcept nogil:
    cdef Py_ssize_t f
    for f in range(first, first + n):
        job.value[FACTOR_X][f] = job.value[FACTOR_G][f] = 1
    if job.reduce.gate != NONE:
        start_gate[lane](job, first, n, lane_tag)
    job.op.start(job, first, n, lane_tag)


cdef void settle_tile(
    Job* job, Py_ssize_t first, Py_ssize_t n, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """Settle the sums of the tile's features, again in wide lanes where needed."""
    cdef double* retry = job.value[RETRY]
    cdef Py_ssize_t f, chunk
    cdef double unsettled
    cdef int attempt
    merge_chunks(job, first, n)
    unsettled = job.op.settle(job, first, n, True)
    for attempt in range(3):
        if unsettled == 0:
            break
        for f in range(first, first + n):
            if retry[f] != 0:
                job.op.retry(job, f, lane_tag)
        for chunk in range(job.reduce.n_chunks):
            visit_tile[double](job, False, chunk, first, n, True, s, NULL)
        merge_chunks(job, first, n)
        unsettled = 0
        for f in range(first, first + n):
            if retry[f] != 0:
                unsettled += job.op.settle(job, f, 1, False)


cdef void finish_tile(
    Job* job, Py_ssize_t first, Py_ssize_t n, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """What comes between the visits to the tile's features: sums are settled, constants are set."""
    cdef double** v = job.value
    cdef Py_ssize_t f
    if job.reduces:
        settle_tile[lane](job, first, n, s, lane_tag)
    if not (job.applies or job.varying.unit):
        return
    read_parameter(&job.gamma_given, first, n, v[GAMMA] + first)
    if job.beta_given.data != NULL:
        read_parameter(&job.beta_given, first, n, v[BETA] + first)
    job.op.set_constants(job, first, n, False, lane_tag)
    if fold_run(v[WIDE] + first, n) == 0:  # none
        return
    for f in range(first, first + n):
        if v[WIDE][f] != 0:
            if lane is double:
                v[FACTOR_X][f] = wide_factor(v[MEAN][f], v[INV_STD][f])
            job.op.set_constants(job, f, 1, True, lane_tag)
            v[WIDE][f] = 1


# ---------------------------------------------------------------- gradients of gamma and beta alone

cdef void add_columns(Visit* v, Py_ssize_t size, const lane* lane_tag) noexcept nogil:
    """The same of the rows at hand, each of one value of every feature."""
    cdef const lane* shift = <lane*> v.s.column[HAT_SHIFT]
    cdef const lane* scale = <lane*> v.s.column[HAT_SCALE]
    cdef const lane* rest = <lane*> v.s.column[HAT_REST]
    cdef double* s
    cdef Py_ssize_t i, j
    for i in range(v.n_rows):
        s = v.s.varying + (v.s.row[S][i] - v.plan.base[S]) // size
        for j in range(0, v.width, 64):  # TREE_COLUMNS; Cython wants a literal step
            sum_of_row[lane](
                <lane*> v.s.row[X][i] + j, <lane*> v.s.row[G][i] + j,
                min(<Py_ssize_t> TREE_COLUMNS, v.width - j), shift + j, scale + j, rest + j, 1,
                s, s + v.job.varying.size,
            )


cdef void add_features(Visit* v, const lane* lane_tag) noexcept nogil:
    """dbeta and dgamma of the visit's features, into the thread's sums."""
    cdef const Plan* plan = v.plan
    cdef Py_ssize_t chunk, row_end, size = 8 if plan.storage == FLOAT64 else 4
    set_hat_columns[lane](v, lane_tag)
    for chunk in range(plan.n_chunks):
        enter_chunk[lane](v, chunk, &row_end, lane_tag)
        v.group = rows_at_hand(v, v.width, 4)
        v.ahead = 0
        while v.row < row_end:
            v.n_rows = min(v.group, row_end - v.row)
            if plan.layout == ROWS:
                v.n_rows = min(v.group, v.n_features - v.first)
            fetch_inputs[lane](v, lane_tag)
            find_rows(v, S, v.n_rows, False, v.s.row[S])
            if plan.layout == ROWS:
                add_own_rows[lane](v, 0, v.segment.run_stride[S] // size, size, lane_tag)
                v.first += v.n_rows
                if v.first < v.n_features:
                    continue
                v.first = 0
                v.row += 1
            else:
                add_columns[lane](v, size, lane_tag)
                v.row += v.n_rows


cdef void sum_parameters(
    Job* job, Py_ssize_t first, Py_ssize_t n, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """dbeta and dgamma of a tile, which has been finished and not yet been written over; those of
    rows in native lanes come with dx."""
    cdef const double* wide = job.value[WIDE] + first
    cdef bint own = job.apply.layout == ROWS, any_wide = fold_run(wide, n) != 0
    cdef Py_ssize_t part = n, k = 0
    cdef Visit v
    v.job = job
    v.plan = &job.apply
    v.s = s
    v.segment = &v.plan.segment[0]
    v.scales = v.varies = v.wide = False
    s.adds = own and job.applies and not any_wide and is_adjacent(&v)
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


cdef void fold_parameters(Job* job, Py_ssize_t first, Py_ssize_t n, Scratch* s) noexcept nogil:
    """A tile's sums for gamma and beta onto its unit's, where it ends a fold."""
    cdef Py_ssize_t size = job.varying.size, end = first % job.apply.n_features + n
    cdef double* total = job.varying.totals + first // job.varying.unit * 4 * size
    s.adds = False
    if end == job.apply.n_features or (
        end % (FOLD_ROWS if job.apply.layout == ROWS else FOLD_COLUMNS) == 0
    ):
        add_compensated(total, total + size, s.varying, size)
        add_compensated(total + 2 * size, total + 3 * size, s.varying + size, size)
        memset(s.varying, 0, 2 * size * sizeof(double))


# ---------------------------------------------------------------- threads
#
# A tile of features is summed, finished and applied by one thread while it is in cache ("swept").
# Where a tile cannot fit, or tiles are fewer than threads, the rows' chunks are shared out: all
# sums, then the finish, then all output in reverse (the tail is still in cache).  Both ways add the
# same numbers in the same order: a column's rows in blocks, the block's columns folded to features
# by halves, blocks added to their chunk and chunks to the total with the rounding errors kept.  All
# chunks share one shift, so partial sums simply add.

cdef void sweep_tiles(
    Job* job, Py_ssize_t tile, Py_ssize_t end, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """Tiles tile .. end - 1 from their first visit to their last."""
    cdef Job own
    cdef Py_ssize_t first, n, chunk
    if job.own_values:
        own = job[0]
        job = &own
    if job.varying.unit:
        memset(s.varying, 0, 2 * job.varying.size * sizeof(double))
    for tile in range(tile, end):
        tile_range(&job.schedule, &job.apply, tile, &first, &n)
        if job.own_values:
            lay_out(job, s.values, job.schedule.tile + job.schedule.lead, first)
        if job.reduces or job.reduce.gate != NONE:
            start_tile[lane](job, first, n, lane_tag)
        if job.reduces:
            for chunk in range(job.reduce.n_chunks):
                reduce_tile[lane](job, chunk, first, n, s, lane_tag)
        finish_tile[lane](job, first, n, s, lane_tag)
        if job.varying.unit:
            sum_parameters[lane](job, first, n, s, lane_tag)
        if job.applies:
            for chunk in range(job.apply.n_chunks - 1, -1, -1):
                apply_tile[lane](job, chunk, first, n, s, lane_tag)
        if job.varying.unit:
            fold_parameters(job, first, n, s)


cdef void visit_chunks(
    Job* job, bint applies, Py_ssize_t task, Py_ssize_t end, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """One visit to chunks of tiles; the tiles of a row follow one another.  The second visit is in
    reverse, as the tail of what a thread summed is still in its cache."""
    cdef Py_ssize_t first, n, index, turn, n_tasks = end - task
    for turn in range(n_tasks):
        index = end - 1 - turn if applies else task + turn
        tile_range(&job.schedule, &job.apply, index % job.schedule.n_tiles, &first, &n)
        if applies:
            apply_tile[lane](job, index // job.schedule.n_tiles, first, n, s, lane_tag)
        else:
            reduce_tile[lane](job, index // job.schedule.n_tiles, first, n, s, lane_tag)


cdef void visit_features(
    Job* job, bint finishes, int thread, int n_threads, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """What comes before or after the first visit, feature by feature: a thread's share of each
    tile."""
    cdef Py_ssize_t tile, first, n, share, start
    for tile in range(job.schedule.n_tiles):
        tile_range(&job.schedule, &job.apply, tile, &first, &n)
        share = max(<Py_ssize_t> SHARE_FEATURES, (n + n_threads - 1) // n_threads)
        start = thread * share
        if start >= n:
            continue
        share = min(share, n - start)
        if finishes:
            finish_tile[lane](job, first + start, share, s, lane_tag)
        else:
            start_tile[lane](job, first + start, share, lane_tag)


cdef void run_share(Job* job, int thread, int n_threads, const lane* lane_tag) noexcept nogil:
    """What one of n threads does of a call."""
    cdef Scratch s
    cdef Py_ssize_t tiles = job.schedule.n_tiles
    cdef Py_ssize_t n = tiles * job.reduce.n_chunks, m = tiles * job.apply.n_chunks
    cdef Py_ssize_t together = job.schedule.together, shares = (tiles + together - 1) // together
    share_scratch(job, job.scratch + thread * job.scratch_bytes, &s)
    if job.schedule.sweep:
        sweep_tiles[lane](
            job, thread * shares // n_threads * together,
            min(tiles, (thread + 1) * shares // n_threads * together), &s, lane_tag,
        )
    else:
        if job.reduces or job.reduce.gate != NONE:
            visit_features[lane](job, False, thread, n_threads, &s, lane_tag)
            bn_barrier(n_threads)
        if job.reduces:
            visit_chunks[lane](
                job, False, thread * n // n_threads, (thread + 1) * n // n_threads, &s, lane_tag
            )
            bn_barrier(n_threads)
        visit_features[lane](job, True, thread, n_threads, &s, lane_tag)
        if job.applies:
            bn_barrier(n_threads)
            visit_chunks[lane](
                job, True, thread * m // n_threads, (thread + 1) * m // n_threads, &s, lane_tag
            )
    if job.schedule.stream or job.schedule.stream_gradient:
        bn_stream_end()


cdef void run_job(Job* job, const lane* lane_tag) noexcept nogil:
    """One parallel region a call, its phases apart by barriers: with a region for each (256, 512)
    took 21.9 and 33.6 us on two threads, so 20.2 and 30.8."""
    if job.schedule.n_threads <= 1:
        run_share[lane](job, 0, 1, lane_tag)
        return
    with parallel(num_threads=job.schedule.n_threads):
        run_share[lane](job, threadid(), bn_team(), lane_tag)


cdef void run_natively(Job* job) noexcept nogil:
    if job.reduce.storage == FLOAT64:
        run_job[double](job, NULL)
    else:
        run_job[float](job, NULL)
