# Layout: from arrays of any shape and strides to rows of columns.
#
# Axes are merged where all arrays allow it and sorted by x's strides; the features and the nearest
# sample axis then decide what a row's columns are:
#
#     layout                          columns [joined][feature][run]     example
#     features adjacent               [1][tile of features][1]           (N, C), NHWC
#     features adjacent, few of them  [rows joined][all features][1]     NHWC with C = 3
#     runs, short                     [1][features side by side][run]    NCHW with 7 x 7
#     runs, long                      [1][1][LANES, wound around]        NCHW with 56 x 56
#
# Whatever length does not divide evenly is a second segment.  If the columns do not lie side by
# side in memory, rows are gathered into a small buffer first, block by block; x is never copied as
# a whole.

cdef enum:
    X = 0                     # roles of the arrays: x (or the only input), dout, the output
    G = 1
    R = 2                     # a third input: the residual; in second order the gradient of dx
    Y = 3
    D = 4                     # a second output: the gradient of the residual; of dout
    W = 5                     # weights, which repeat themselves along the features
    N_ROLES = 6
    MAX_DIMS = 64             # NumPy's own limit
    BLOCK_ROWS = 128          # rows between two folds: 16 trees deep, see kernels.pxi (a)
    MAX_CHUNKS = 64           # of one block or more: scratch is O(features x chunks)
    JOIN_COLUMNS = 256        # few features: rows are joined up to this many columns,
    SHORT_COLUMNS = 64        # up to this many where fewer than
    JOIN_ROWS = 32            # joined rows are left: a column costs as much as some rows, see below
    NARROW = 16               # fewer features than this are joined even if they must be gathered
    ALONG_RUN = 256           # a run from this length on is walked along, not across,
    TREE_RUN = 128            # or from this, if along fewer places of trees stay empty
    PIECE = 1024              # in rows of no more than this, and
    BLOCK_ELEMENTS = 8192     # this many between two folds
    BLOCK_SHARE = 4           # float64 is folded so much sooner
    GATHER_ELEMENTS = 2048    # a gathered group of rows stays in L1,
    GATHER_COLUMNS = 256      # not wide, as its sums are taken up and laid down once a group
    AHEAD_BYTES = 8192        # how far ahead rows are prefetched,
    AHEAD_ROWS = 24           # but no more than these and no less than a tree
    AHEAD_RUNS = 2            # a half type's pieces of runs, and a residual's, see below
    SWEEP_BYTES = 4 * 1024 * 1024  # a tile between its two visits: a share of L3, see below
    TILE_COLUMNS = 512        # of a tile, but MAX_COLUMNS where only rows are shared out, see below
    TILE_BYTES = 512          # a row of a tile: narrower ones come in too slowly, see below
    SPLIT_FROM = 256 * 1024   # between these, threads share rows rather than features
    SPLIT_TO = 64 * 1024 * 1024
    ALONG_SWEEP_BYTES = 32 * 1024  # long runs: small features share what a tile costs, in L1
    RUN_SWEEP_BYTES = 8 * 1024 * 1024
    PAGE_BYTES = 4096         # of a row that a thread has for itself, or threads share rows
    STREAM_BYTES = 28 * 1024 * 1024  # all arrays of a call: a share of L3, see below
    PREFETCH_BYTES = 4 * 1024 * 1024
    PREFETCH_OUTPUT = 8 * 1024 * 1024
    SHARE_FEATURES = 64       # fewer are not worth another thread between the visits
    HELD_SIZE = 1 << 14       # elements below which the GIL is not worth handing on

# Wide tiles beat tiles that fit L2: (1024, 4096) forward, one thread: 2.9 ms with SWEEP_BYTES of
# 0.5 MiB, 2.4 with 1 MiB, 2.0 with 4 MiB, and 3.4 with 0.5 MiB packed on the first visit.  A narrow
# tile is worse than reading x twice: (16384, 1024) backward, two threads: 22 ms with tiles
# of 128 bytes, 16 as chunks of rows; and these are best as whole rows, up to MAX_COLUMNS where no
# buffer has to hold them: (50000, 600), two threads, 0.41 to 0.35 and 0.70 to 0.60 ns an element.
# So it is for threads in cache: (256, 512) forward, two threads: 41 us as tiles of 256 features, 25
# as chunks of rows; and for runs of which a thread has less than PAGE_BYTES side by side: (256, 10,
# 100) forward 72 us as tiles, 36 as chunks.
#
# A residual is met in the second visit, which the hardware's prefetchers do not follow, and runs of
# 16 bits are too short for them: (32, 64, 56, 56) with a residual, forward, 3.0 to 2.8 ms, in
# bfloat16 2.0 to 1.65, backward 3.4 to 2.45.  (float32's in both visits: backward 10 % lost.)
#
# Forward's output begins a run as if it had never been seen, too: (16, 64, 56, 56) 0.70 to 0.63 ms
# with the next run of it prefetched, (4, 33, 17, 40, 40) 0.85 to 0.75; but (8, 3, 224, 224), 5 MB,
# 0.121 to 0.126, and backward, with more to read, gains nothing.  What goes through the buffer is
# asked for before the rows are read: (32, 64, 56, 56) in float16 on one thread 3.4 to 2.9 ms.
#
# What does not fit L3 together goes past it: (32768, 128) forward, 34 MB, 1.90 to 0.98 ms, (16, 64,
# 56, 56) backward, 39 MB, 1.13 to 0.81; but its forward, 26 MB, 0.47 to 0.50.

# Few rows of many columns cost more than more rows of fewer, as each column has sums and constants:
# (32, 64) forward 1.92 us as 8 rows of 256 columns, 1.82 as 32 of 64; (64, 33) 2.8 us as 9 rows of
# 231 and one of 33, 1.8 as 32 of 66.

# How a kernel comes to a row of an array: where it lies; through a buffer (to be read before it is
# overwritten, or converted); the same but written past the caches; or column by column.
cdef enum Access:
    DIRECT
    COPIED
    STREAMED
    GATHERED

cdef struct Segment:
    int n_dims
    Py_ssize_t size[MAX_DIMS]
    Py_ssize_t stride[N_ROLES][MAX_DIMS]
    Py_ssize_t n_rows
    Py_ssize_t offset[N_ROLES]
    Py_ssize_t n_joined
    Py_ssize_t n_run
    Py_ssize_t joined_stride[N_ROLES]
    Py_ssize_t run_stride[N_ROLES]
    Py_ssize_t n_lanes        # columns a feature has in sums and constants: n_run, or LANES

cdef struct Place:            # of one value of each feature
    int segment
    Py_ssize_t row
    Py_ssize_t joined
    Py_ssize_t run

cdef struct Plan:
    Py_ssize_t n_features
    Py_ssize_t feature_stride[N_ROLES]
    char* base[N_ROLES]
    cnp.npy_intp* stride[N_ROLES]  # as the arrays have them
    bint used[N_ROLES]
    bint gated                # dout's rows go through the activation's gate,
    bint gate_first           # not in the kernel but on their way there
    Access access[N_ROLES]
    Storage storage
    Py_ssize_t itemsize
    Py_ssize_t max_tile       # features a tile may have
    bint whole                # features cannot be split into tiles
    bint runs
    bint along                # a row is one feature's, walked along
    Py_ssize_t block_rows     # rows between two folds
    Py_ssize_t chunk_rows
    Py_ssize_t n_chunks
    int n_segments
    Segment segment[2]
    Place sample[3]           # the values that say where a feature lies, see choose_sample

cdef inline Py_ssize_t distance(Py_ssize_t stride) noexcept nogil:
    """How far apart a step takes us; a broadcast axis (stride 0) is walked outermost."""
    return (stride if stride > 0 else -stride) if stride else INTPTR_MAX


cdef inline void set_role(Plan* plan, int role, cnp.ndarray array) noexcept:
    """Give an array (None: no array) its role.  All have the same shape."""
    plan.used[role] = array is not None
    plan.base[role] = <char*> cnp.PyArray_DATA(array) if plan.used[role] else NULL
    plan.stride[role] = cnp.PyArray_STRIDES(array) if plan.used[role] else NULL


cdef void make_plan(Plan* plan, cnp.ndarray key, int axis, Py_ssize_t itemsize) noexcept:
    """Collapse the arrays of all roles into segments.

    The key's strides alone sort the axes and choose between runs and features, so that all plans
    of a call choose alike and can share tiles.
    """
    cdef cnp.npy_intp* shape = cnp.PyArray_DIMS(key)
    cdef cnp.npy_intp* key_stride = cnp.PyArray_STRIDES(key)
    cdef Py_ssize_t key_step[MAX_DIMS]
    cdef Py_ssize_t size[MAX_DIMS]
    cdef Py_ssize_t step[N_ROLES][MAX_DIMS]
    cdef int r, d, k, n = 0, ndim = cnp.PyArray_NDIM(key)
    cdef Py_ssize_t length, join, unit
    cdef Py_ssize_t n_features = shape[axis]
    cdef Py_ssize_t rows
    cdef bint merge, side_by_side, stacked
    cdef Segment* main = &plan.segment[0]
    cdef Segment* rest = &plan.segment[1]
    plan.n_features = n_features
    plan.storage = storage_of(key)
    plan.itemsize = itemsize
    for r in range(N_ROLES):
        plan.feature_stride[r] = plan.stride[r][axis] if plan.used[r] and n_features > 1 else 0
    # Sample axes, the farthest apart in x first (insertion sort: axes are few).
    for d in range(ndim):
        if d == axis or shape[d] == 1:
            continue
        k = n
        while k > 0 and distance(key_step[k - 1]) < distance(key_stride[d]):
            size[k] = size[k - 1]
            key_step[k] = key_step[k - 1]
            for r in range(N_ROLES):
                step[r][k] = step[r][k - 1]
            k -= 1
        size[k] = shape[d]
        key_step[k] = key_stride[d]
        for r in range(N_ROLES):
            step[r][k] = plan.stride[r][d] if plan.used[r] else 0
        n += 1
    # Merge an axis with the next where that is one longer axis in every array.
    k = 0
    for d in range(1, n):
        merge = True
        for r in range(N_ROLES):
            merge = merge and step[r][k] == step[r][d] * size[d]
        if merge:
            size[k] *= size[d]
        else:
            k += 1
            size[k] = size[d]
        key_step[k] = key_step[d]
        for r in range(N_ROLES):
            step[r][k] = step[r][d]
    if n > 0:
        n = k + 1
    length = size[n - 1] if n > 0 else 1
    rows = cnp.PyArray_SIZE(key) // (n_features * length)

    plan.runs = n > 0 and (
        n_features == 1
        or distance(key_step[n - 1]) < distance(key_stride[axis])
    )
    side_by_side = True       # the columns of one row, before joining or stacking
    stacked = True            # joined rows, or the runs of neighboring features, touch as well
    for r in range(W):
        if not plan.used[r]:
            continue
        if plan.runs:
            side_by_side = side_by_side and step[r][n - 1] == itemsize
            stacked = stacked and plan.feature_stride[r] == length * itemsize
        else:
            side_by_side = side_by_side and (
                n_features == 1 or plan.feature_stride[r] == itemsize
            )
            stacked = stacked and n > 0 and step[r][n - 1] == n_features * itemsize
    stacked = stacked and side_by_side

    main.n_dims = n
    for d in range(n):
        main.size[d] = size[d]
        for r in range(N_ROLES):
            main.stride[r][d] = step[r][d]
    main.n_joined = main.n_run = 1
    for r in range(N_ROLES):
        main.offset[r] = main.joined_stride[r] = main.run_stride[r] = 0
    plan.n_segments = 1
    plan.whole = False
    plan.along = False
    plan.max_tile = min(
        n_features, TILE_COLUMNS if plan.runs or plan.storage != NATIVE else MAX_COLUMNS
    )
    if plan.runs:
        for r in range(N_ROLES):
            main.run_stride[r] = step[r][n - 1]
        plan.along = length >= ALONG_RUN or (
            length >= TREE_RUN and empty(length, TREE_RUN) * rows < empty(rows, 8) * length
        )
        cut_axis(plan, even_piece(length) if plan.along else length, False)
        if not plan.along:
            plan.max_tile = min(n_features, TILE_COLUMNS // length) if stacked else 1
    elif n > 0 and 2 * n_features <= JOIN_COLUMNS and (stacked or n_features < NARROW):
        join = max(SHORT_COLUMNS // n_features, length // JOIN_ROWS)
        join = min(join, length, JOIN_COLUMNS // n_features)
        if join > 1:
            for r in range(N_ROLES):
                main.joined_stride[r] = step[r][n - 1]
            plan.whole = True
            cut_axis(plan, join, True)
    for r in range(N_ROLES):
        plan.access[r] = DIRECT if plan.storage == NATIVE else COPIED
        if not plan.used[r] or r == W:
            continue
        if plan.runs:
            side_by_side = step[r][n - 1] == itemsize
        else:
            side_by_side = (n_features == 1 or plan.feature_stride[r] == itemsize) and (
                not plan.whole or main.joined_stride[r] == n_features * itemsize
            )
        if not side_by_side:
            plan.access[r] = GATHERED
            plan.max_tile = min(plan.max_tile, <Py_ssize_t> TILE_COLUMNS)
    for d in range(plan.n_segments):
        plan.segment[d].n_lanes = LANES if plan.along else plan.segment[d].n_run
        plan.segment[d].n_rows = 1
        for k in range(plan.segment[d].n_dims):
            plan.segment[d].n_rows *= plan.segment[d].size[k]
    unit = max(1, BLOCK_ELEMENTS // main.n_run) if plan.along else (
        # Rows of runs that threads will have to share, see PAGE_BYTES: (128, 33, 7, 7) forward on
        # two threads 37 to 25 us.
        <Py_ssize_t> BLOCK_ROWS // 2 if plan.runs and (
            n_features * main.n_run * itemsize < 2 * PAGE_BYTES
        ) else <Py_ssize_t> BLOCK_ROWS
    )
    plan.chunk_rows = (main.n_rows // MAX_CHUNKS // unit + 1) * unit
    # float64's lanes are no more exact than what they add, so they are folded sooner (as late as
    # float32's: dbeta was off by up to 40 roundings at M = 1e5).
    plan.block_rows = unit if itemsize <= 4 else max(1, unit // BLOCK_SHARE)
    plan.n_chunks = (
        (main.n_rows + plan.chunk_rows - 1) // plan.chunk_rows + plan.n_segments - 1
    )


cdef inline Py_ssize_t empty(Py_ssize_t n, Py_ssize_t places) noexcept:
    """Places that stay empty in the last tree over n elements."""
    return (places - n % places) % places


cdef Py_ssize_t even_piece(Py_ssize_t length) noexcept:
    """The longest equal pieces of a run, PIECE at most; PIECE where none are found soon."""
    cdef Py_ssize_t parts = (length + PIECE - 1) // PIECE, tried
    for tried in range(16):
        if length % (parts + tried) == 0:
            return length // (parts + tried)
    return PIECE


cdef void cut_axis(Plan* plan, Py_ssize_t piece, bint joined) noexcept:
    """Turn the last axis of the main segment into columns, `piece` of its elements a row; what is
    left over becomes the second segment."""
    cdef Segment* main = &plan.segment[0]
    cdef Segment* rest = &plan.segment[1]
    cdef int r, last = main.n_dims - 1
    cdef Py_ssize_t length = main.size[last], left = length % piece
    if left:
        rest[0] = main[0]
        rest.n_dims = last
        for r in range(N_ROLES):
            rest.offset[r] = main.stride[r][last] * (length - left)
        if joined:
            rest.n_joined = left
        else:
            rest.n_run = left
        plan.n_segments = 2
    if joined:
        main.n_joined = piece
    else:
        main.n_run = piece
    if length // piece == 1:
        main.n_dims = last
    else:
        main.size[last] = length // piece
        for r in range(N_ROLES):
            main.stride[r][last] *= piece


cdef void chunk_range(
    const Plan* plan, Py_ssize_t chunk, int* segment, Py_ssize_t* first, Py_ssize_t* last,
) noexcept nogil:
    cdef Py_ssize_t n_main = plan.n_chunks - (plan.n_segments - 1)
    if chunk < n_main:
        segment[0] = 0
        first[0] = chunk * plan.chunk_rows
        last[0] = min(first[0] + plan.chunk_rows, plan.segment[0].n_rows)
    else:
        segment[0] = 1
        first[0] = 0
        last[0] = plan.segment[1].n_rows


cdef void row_pointers(
    const Segment* segment, int role, char* start, Py_ssize_t first, Py_ssize_t n, char** rows,
) noexcept nogil:
    """Addresses of rows first .. first + n - 1, by an odometer over the segment's axes."""
    cdef Py_ssize_t digit[MAX_DIMS]
    cdef int d, last = segment.n_dims - 1
    cdef Py_ssize_t done = 0, k, run, step, left = first
    cdef char* row = start + segment.offset[role]
    if last < 0:
        rows[0] = row
        return
    for d in range(last, -1, -1):
        digit[d] = left % segment.size[d]
        left = left // segment.size[d]
        row += digit[d] * segment.stride[role][d]
    step = segment.stride[role][last]
    while True:
        run = min(segment.size[last] - digit[last], n - done)
        for k in range(run):
            rows[done + k] = row + k * step
        done += run
        if done == n:
            return
        row -= digit[last] * step
        digit[last] = 0
        d = last - 1
        while True:
            digit[d] += 1
            row += segment.stride[role][d]
            if digit[d] < segment.size[d]:
                break
            row -= digit[d] * segment.stride[role][d]
            digit[d] = 0
            d -= 1


cdef inline Access access_to(
    const Plan* plan, const Segment* segment, int role, Py_ssize_t n_features, bint wide,
) noexcept nogil:
    """How the columns of n_features of a tile's features are come by.  Of joined rows a part, as a
    thread's share of the features in a retry, does not lie side by side."""
    cdef bint part = segment.n_joined > 1 and n_features < plan.n_features
    return GATHERED if plan.used[role] and (wide or part) else plan.access[role]


cdef void column_offsets(
    const Plan* plan, const Segment* segment, int role, Py_ssize_t n_features, Py_ssize_t* offset,
) noexcept nogil:
    cdef Py_ssize_t q, f, e, j = 0
    for q in range(segment.n_joined):
        for f in range(n_features):
            for e in range(segment.n_run):
                offset[j] = (
                    q * segment.joined_stride[role] + f * plan.feature_stride[role]
                    + e * segment.run_stride[role]
                )
                j += 1


cdef void expand(
    const double* restrict values, const double* restrict factor, Py_ssize_t first,
    Py_ssize_t n_features, Py_ssize_t n_joined, Py_ssize_t n_run, lane* restrict columns,
) noexcept nogil:
    """A constant per feature, times its factor if there is one, to a constant per column."""
    cdef Py_ssize_t f, e
    cdef lane value
    if n_run > 1:
        for f in range(n_features):
            value = <lane> (values[first + f] * (factor[first + f] if factor != NULL else 1))
            for e in range(n_run):
                columns[f * n_run + e] = value
        return
    if factor != NULL:
        for f in range(n_features):
            columns[f] = <lane> (values[first + f] * factor[first + f])
    else:
        for f in range(n_features):
            columns[f] = <lane> values[first + f]
    for e in range(1, n_joined):
        memcpy(columns + e * n_features, columns, n_features * sizeof(lane))
