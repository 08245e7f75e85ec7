# Rows at hand: one thread's columns of constants and buffers, and how rows come to the kernels and
# go back where they belong.  A visit is to one chunk of a tile; it takes rows some at a time.


# Columns of constants: those of the engine's own values (see job.pxi), and
cdef enum:
    SUM_1 = N_VALUES
    SUM_2
    SPARE                     # rows to write to that nobody reads: APPLY_ROWS - 1 of them
    N_PLAIN_COLUMNS           # all that a call without options needs; then
    NATIVE_ONES = N_PLAIN_COLUMNS
    WIDE_ONES
    WIDE_SHIFT                # forward's constants for the gate, in wide lanes
    WIDE_COEF
    WIDE_BIAS
    WIDE_FACTOR
    WEIGH_SHIFT               # of the bracket in filters.pxi (c)
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
    Py_ssize_t shape[N_ROLES][6]  # what these offsets come from, see set_offsets
    char* buffer[N_ROLES]
    double* values            # the tile's own arrays, if tiles are swept
    double* sums              # of the chunk at hand, as the job's
    double* varying           # sums for gamma and beta since the last fold,
    double* fold              # and where they are but for a unit's first
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
    bint as_stored            # the rows at hand go to the kernels as they are, see Plan
    Py_ssize_t feature        # the tile's first, and how many it has
    Py_ssize_t n_features
    Py_ssize_t group          # rows taken at a time
    Py_ssize_t ahead          # rows that are prefetched
    Py_ssize_t row            # the rows at hand
    Py_ssize_t n_rows
    Py_ssize_t first          # and their columns; or the features whose rows they are
    Py_ssize_t width
    double* sum[2]            # of each column of a block
    bint scales               # dout by gamma, where that varies
    bint singly               # rows are written one by one,
    bint stream               # and by the kernel past the caches


cdef inline Py_ssize_t in_turn(const Visit* v) noexcept nogil:
    """Features whose runs take turns as the rows at hand."""
    return v.n_features if v.plan.layout == LONG_RUN else 1


cdef inline void take_rows(Visit* v, Py_ssize_t row_end) noexcept nogil:
    """The next rows up to one as those at hand; of rows of their own some features' pieces."""
    if v.plan.layout == ROWS:
        v.n_rows = min(v.group, v.n_features - v.first)
    else:
        v.n_rows = min(v.group, row_end - v.row) * in_turn(v)


cdef inline void pass_rows(Visit* v) noexcept nogil:
    """On beyond those at hand."""
    if v.plan.layout != ROWS:
        v.row += v.n_rows // in_turn(v)
        return
    v.first += v.n_rows
    if v.first == v.n_features:
        v.first = 0
        v.row += 1


cdef Py_ssize_t share_scratch(const Job* job, char* memory, Scratch* s) noexcept nogil:
    """Lay one thread's columns and buffers out in its memory; returns how many bytes they take."""
    cdef Py_ssize_t columns = pitch(job.width) * sizeof(double)
    cdef Py_ssize_t buffer = sizeof(double) * max(
        <Py_ssize_t> GATHER_ELEMENTS,
        job.width * (
            1 if job.reduce.layout == LONG_RUN else 4 if job.reduce.layout == ROWS else TREE_ROWS
        ),
    )
    cdef bint has_options = job.reduce.gate != NONE or (
        job.array[R] != NULL or job.array[D] != NULL or job.array[W] != NULL
    )
    cdef char* start = memory
    cdef int c, r
    for c in range(N_OWN if has_options else N_PLAIN):
        s.column[c] = memory
        memory += columns
    for c in range(
        SUM_1, N_COLUMNS if has_options else HAT_REST + 1 if job.by_row else N_PLAIN_COLUMNS
    ):
        s.column[c] = memory
        memory += columns * (APPLY_ROWS - 1 if c == SPARE else 1)
    for r in range(N_ROLES):
        if r == X or r == G or r == Y or (has_options and r < S) or (job.by_row and r >= S):
            s.offset[r] = <Py_ssize_t*> memory
            s.buffer[r] = memory + columns
            memory += columns + buffer
    for r in range(N_ROLES):
        s.shape[r][0] = 0  # of no features
    s.adds = False
    s.values = <double*> memory
    memory += (
        (n_own_values(job) + job.op.n_results + 4 * job.reduce.n_chunks)
        * job.own_features * sizeof(double)
    )
    s.fold = <double*> memory
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


cdef void reverse(lane* values, Py_ssize_t n) noexcept nogil:
    """From the last to the first."""
    cdef Py_ssize_t i
    cdef lane value
    for i in range(n // 2):
        value = values[i]
        values[i] = values[n - 1 - i]
        values[n - 1 - i] = value


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
    if v.plan.turned and not v.wide:
        reverse(<lane*> v.s.column[column], v.n_features)


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


cdef void set_offsets(Visit* v, int role, Py_ssize_t n_features) noexcept nogil:
    """Those of a role's columns; most tiles have the last one's."""
    cdef const Segment* segment = v.segment
    cdef Py_ssize_t[6] shape
    shape[0] = n_features
    shape[1] = segment.n_joined
    shape[2] = segment.n_run
    shape[3] = v.plan.feature_stride[role]
    shape[4] = segment.joined_stride[role]
    shape[5] = segment.run_stride[role]
    if memcmp(shape, v.s.shape[role], sizeof(shape)):
        memcpy(v.s.shape[role], shape, sizeof(shape))
        column_offsets(v.plan, segment, role, n_features, v.s.offset[role])


cdef void set_gate(Visit* v, const lane* native_tag) noexcept nogil:
    """The columns of forward's constants, in the lanes that it had, if there is a gate."""
    cdef const Plan* plan = v.plan
    cdef int r
    v.gate = plan.gate
    v.any_wide = False
    if plan.gate == NONE:
        return
    v.any_wide = fold_run(v.job.value[GATE_WIDE] + v.feature, v.n_features) != 0
    expand[lane](v, GATE_SHIFT, -1, False, GATE_SHIFT, native_tag)
    expand[lane](v, GATE_COEF, -1, False, GATE_COEF, native_tag)
    expand[lane](v, GATE_BIAS, -1, False, GATE_BIAS, native_tag)
    set_all[lane](<lane*> v.s.column[NATIVE_ONES], v.width, 1)
    if not (v.any_wide or v.wide):
        return
    v.gate = BEFORE
    for r in range(Y):
        if plan.used[r]:
            set_offsets(v, r, v.n_features)
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
    set_offsets(v, W, v.n_features)
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
    memset(v.s.column[SHIFT_G], 0, v.job.width * sizeof(double))


# ---------------------------------------------------------------- rows in, rows out

cdef inline Py_ssize_t first_column(const Visit* v) noexcept nogil:
    """Of the columns at hand; rows that are features are at hand whole."""
    return 0 if v.plan.layout == ROWS else v.first


cdef inline bint is_adjacent(const Visit* v) noexcept nogil:
    """Whether gamma along a row can be read where it is; a column has but one."""
    cdef Py_ssize_t size = size_of(lanes_of(v.plan.storage))
    return v.plan.layout != ROWS or (
        v.segment.run_stride[S] == size and (not v.wide or size == 8)
    )


cdef void find_rows(
    Visit* v, int role, Py_ssize_t n, bint at_first, char** rows,
) noexcept nogil:
    """Addresses of n rows from those at hand on, and of their first column at hand or their start.
    """
    cdef const Plan* plan = v.plan
    cdef Py_ssize_t i, k, together = in_turn(v)
    cdef char* start
    if plan.layout == ROWS:
        start = feature_at(plan, role, v.feature + v.first)
        row_pointers(v.segment, role, start, v.row, 1, rows)
        for i in range(1, n):
            rows[i] = rows[0] + i * plan.feature_stride[role]
        return
    start = feature_at(
        plan, role, v.feature + (v.n_features - 1 if at_first and plan.turned else 0)
    ) + (v.first * size_of(plan.storage) if at_first else 0)
    row_pointers(v.segment, role, start, v.row, n // together, rows)
    for i in range(n // together - 1 if together > 1 else -1, -1, -1):
        for k in range(together - 1, -1, -1):
            rows[i * together + k] = rows[i] + k * plan.feature_stride[role]


cdef bint rows_touch(const Visit* v) noexcept nogil:
    """Whether a row of an input begins where the last one ends."""
    cdef const Segment* segment = v.segment
    cdef int r, last = segment.n_dims - 1
    cdef bint touch = last >= 0
    for r in range(Y):
        touch = touch and (
            not v.plan.used[r]
            or segment.stride[last][r] == v.width * size_of(v.plan.storage)
        )
    return touch


cdef inline bint lies_across(const Visit* v, int role, const lane* lane_tag) noexcept nogil:
    """Whether the rows at hand are all values of some features that lie one after the other, of a
    number that part_rows knows."""
    cdef const Segment* segment = v.segment
    cdef Py_ssize_t size = sizeof(lane), n = v.n_rows
    return (
        v.plan.layout == FEATURES and not v.wide  # whose factors are still to come
        and (n == 4 or n == 8) and segment.n_dims == 1
        and segment.size[0] == n and segment.stride[0][role] == size
        and v.plan.feature_stride[role] == n * size and size == size_of(v.plan.storage)
    )


cdef inline void prefetch_columns(
    const char* row, const Py_ssize_t* offset, Py_ssize_t width,
) noexcept nogil:
    """From one end of the row to the other."""
    cdef Py_ssize_t first = offset[0], last = offset[width - 1]
    bn_prefetch(row + min(first, last), max(first, last) - min(first, last) + 1)


cdef void fetch_rows(
    Visit* v, int role, Access access, Py_ssize_t ahead, const lane* factor,
) noexcept nogil:
    """Point the role's rows at those at hand (and `ahead` more, to prefetch)."""
    cdef const Plan* plan = v.plan
    cdef char** rows = v.s.row[role]
    cdef Py_ssize_t size = size_of(plan.storage), width = v.width, n = v.n_rows
    cdef Py_ssize_t i, k, known, run, step, together = in_turn(v)
    cdef const Py_ssize_t* offset = v.s.offset[role] + first_column(v)
    cdef lane* buffer = <lane*> v.s.buffer[role]
    cdef lane* packed
    ahead = (ahead + together - 1) // together * together
    known = n if plan.layout == ROWS else min(n + ahead, (v.segment.n_rows - v.row) * together)
    find_rows(v, role, known, access != GATHERED, rows)
    for i in range(known, n + ahead):
        rows[i] = rows[known - 1]
    if plan.layout == LONG_RUN and ahead and access != GATHERED:
        for i in range(n):
            bn_prefetch(rows[i + ahead], width * size)
        ahead = 0
    if access == DIRECT:
        return
    if access == GATHERED:
        if lies_across[lane](v, role, factor):
            part_rows(<const lane*> (rows[0] + offset[0]), width, n, buffer)
        else:
            step = regular_step(offset, width)
            for i in range(n):
                packed = buffer + i * width
                if ahead and step and -LINE_BYTES <= step <= LINE_BYTES:
                    prefetch_columns(rows[i + ahead], offset, width)
                gather_row[lane](plan.storage, rows[i], offset, width, step, packed)
                if factor != NULL:
                    multiply(packed, factor, width)
        for i in range(n + ahead):  # the kernel's own prefetches are of no use here
            rows[i] = <char*> (buffer + min(i, n - 1) * width)
        return
    i = 0
    while i < n:
        packed = buffer + i * width
        run = 1
        while (  # rows of a half type that touch go as one
            is_half(plan.storage) and (run + 1) * width <= TILE_COLUMNS and i + run < n
            and rows[i + run] == rows[i] + run * width * size
        ):
            run += 1
        if is_half(plan.storage) and ahead:  # the kernel cannot: its rows are those in the buffer
            for k in range(i, i + run):
                bn_prefetch(rows[k + ahead], width * size)
        load_adjacent[lane](plan.storage, rows[i], run * width, packed)
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
    if access == GATHERED and lies_across[lane](v, role, lane_tag):
        join_rows(from_, width, n, <lane*> (rows[0] + v.s.offset[role][v.first]))
        return
    if access == GATHERED:
        for i in range(n):
            scatter_row[lane](
                plan.storage, rows[i], v.s.offset[role] + first_column(v), width,
                <const lane*> from_[i],
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

cdef inline int kind_of(const Visit* v, const lane* lane_tag) noexcept nogil:
    if lane is double:
        return DOUBLES
    return HALVES if v.as_stored else FLOATS


cdef inline Py_ssize_t kernel_ahead(const Visit* v) noexcept nogil:
    """Rows that a kernel may prefetch: none where its own are those in a buffer."""
    cdef bint buffered = (
        (is_half(v.plan.storage) and not v.as_stored) or v.gate == BEFORE or v.plan.used[S]
        or (v.plan.used[W] and v.plan.used[Y])
    )
    return 0 if buffered else v.ahead


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
    block.tree_rows = v.segment.tree_rows
    block.ahead = kernel_ahead(v)
    block.turns = n_rows if v.plan.layout == ROWS else in_turn(v)
    block.turn_bytes = sizeof(lane) * (1 if v.plan.layout == ROWS else LANES)
    block.singly = v.singly
    block.stream = v.stream
    block.weighed = weighs_in_kernel(v.plan) and not v.wide
    block.walk = (
        ALONG if v.plan.layout == LONG_RUN else BY_ROW if v.plan.layout == ROWS else ACROSS
    )
    block.kind = kind_of[lane](v, lane_tag)
    block.brain = v.plan.storage == BFLOAT16
    for r in range(3):
        block.shift[r] = block.coef[r] = some
    block.bias = block.gate_shift = block.gate_coef = block.gate_bias = some
    block.activation = IDENTITY
    block.slope = v.job.negative_slope
    block.sum_1 = v.sum[0] + v.first
    block.sum_2 = v.sum[1] + v.first


cdef void fill_gradient(
    Block* block, Visit* v, Py_ssize_t n_rows, const lane* lane_tag,
) noexcept nogil:
    """The block of x and dout, for their sums or for dx."""
    fill_block[lane](block, v, n_rows, lane_tag)
    block.formula = (
        SCALED_GRADIENT if v.plan.used[S] and v.plan.layout == ROWS else GRADIENT
    )
    block.shift[G] = <char*> columns_at[lane](v, SHIFT_G, lane_tag)
    block.coef[X] = <char*> columns_at[lane](v, COEF_X, lane_tag)
    block.coef[G] = <char*> columns_at[lane](v, COEF_G, lane_tag)
    block.bias = <char*> columns_at[lane](v, BIAS, lane_tag)
    if v.gate == INSIDE:
        block.activation = v.job.activation
        block.gate_shift = <char*> columns_at[lane](v, GATE_SHIFT, lane_tag)
        block.gate_coef = <char*> columns_at[lane](v, GATE_COEF, lane_tag)
        block.gate_bias = <char*> columns_at[lane](v, GATE_BIAS, lane_tag)


cdef Py_ssize_t pad_rows(
    Visit* v, int role, int column, Py_ssize_t step, const lane* lane_tag,
) noexcept nogil:
    """Point rows beyond those at hand at a column, up to a multiple of `step`; runs need none."""
    cdef Py_ssize_t n = v.n_rows
    while n % step and v.plan.layout != LONG_RUN and v.plan.layout != ROWS:
        v.s.row[role][n] = <char*> columns_at[lane](v, column, lane_tag)
        n += 1
    return n
