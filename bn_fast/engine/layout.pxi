# Layout: from arrays of any shape and strides to rows of columns.  Everything here decides the
# bits, so it comes from shapes, strides and dtypes alone, never from the machine or the threads.
#
# Axes are merged where all arrays allow it and sorted by x's strides; the features and the nearest
# sample axis then decide what a row's columns are:
#
#     Layout     columns [joined][feature][run]     example
#     FEATURES   [1][tile of features][1]           (N, C), NHWC
#     JOINED     [rows joined][all features][1]     NHWC with C = 3: few features side by side
#     RUNS       [1][features side by side][run]    NCHW with 7 x 7: short runs
#     LONG_RUN   [1][1][LANES, wound around]        NCHW with 56 x 56
#     ROWS       a row for each feature             layer norm; instance norm of NCHW
#
# Features may lie along several axes.  Those of the last, and what merges with it, are the plan's;
# the others are walked around its tiles.
#
# Whatever length does not divide evenly is a second segment.  If the columns do not lie side by
# side in memory, rows are gathered into a small buffer first, block by block; x is never copied as
# a whole.  Features that lie in reverse are summed as they lie, see is_turned.
#
# What is done once a column costs as much as some rows; along, each run has a sum in double, and
# features in turn are one stream from memory.  One thread, forward and backward, across and along:
# (8, 64, 8, 8) 42 and 26 us, (16, 64, 12, 12) 100 and 85, but (16, 64, 10, 10) 65 and 72; (32, 256,
# 14, 14) 1280 and 970, (32, 128, 14, 14) 455 and 430, (64, 256, 12, 12) 2030 and 1920, but (64,
# 256, 10, 10) 1080 and 1220, (64, 512, 7, 7) 990 and 1570 (2026-11-26).
# Few rows of many columns cost more than more rows of fewer, as each column has sums and constants:
# (32, 64) forward 1.92 us as 8 rows of 256 columns, 1.82 as 32 of 64; (64, 33) 2.8 us as 9 rows of
# 231 and one of 33, 1.8 as 32 of 66.
#
# Each chunk has sums of its own, and threads share chunks.  By 2^14 elements, not 2^16, one thread
# takes 0 to 4 % longer; (65536, 3) on two threads 111 and 184 us, so 76 and 124; (256, 10, 100) on
# four 93 and 106, 36 and 49; (65536, 3) on eight 36 and 51, 22 and 27 (two Intel CPUs, 2026-11-26).

cdef enum Layout:
    FEATURES
    JOINED
    RUNS
    LONG_RUN
    ROWS

cdef enum:
    MAX_DIMS = 64             # NumPy's own limit
    BLOCK_ROWS = 128          # rows between two folds: 8 trees deep, see kernels.pxi (a)
    MAX_CHUNKS = 64           # of one block or more: scratch is O(features x chunks),
    CHUNK_ELEMENTS = 1 << 14  # and of so many elements, enough for a thread, see above
    FAR_BYTES = 1 << 24       # rows of more than this come from memory
    JOIN_COLUMNS = 256        # few features: rows are joined up to this many columns,
    SHORT_COLUMNS = 64        # up to this many where fewer than
    JOIN_ROWS = 32            # joined rows are left: a column costs as much as some rows, see above
    NARROW = 16               # fewer features than this are joined even if they must be gathered
    ALONG_RUN = 144           # a run from this length on is walked along, not across, see above,
    ALONG_WEIGHED = 256       # one that weights replace, as it cannot take turns, from this,
    SHORT_RUN = 64            # or either from this,
    SHORT_ROWS = 8            # if there are so many times fewer of them
    PIECE = 1024              # in rows of no more than this, and
    BLOCK_ELEMENTS = 8192     # this many between two folds
    BLOCK_SHARE = 4           # float64 is folded so much sooner
    SHARED_RUN_BYTES = 8192   # shorter rows of runs come in smaller chunks, for threads to share
    ROW_LENGTH = 32           # norms: runs from this on are rows, shorter ones columns,
    ROW_PIECE = 2048          # in pieces of this, between two folds as well
    FOLD_ROWS = 64            # rows whose sums for gamma and beta are added before they are folded
    FOLD_COLUMNS = 512        # onto the others, or columns
    TREE_COLUMNS = 64         # columns whose sums for gamma and beta are added in one order
    MAX_UNITS = 32            # features whose sums for gamma and beta are kept apart
    TILE_COLUMNS = 512        # of a tile, but MAX_COLUMNS where only rows are shared out

cdef struct Segment:
    int n_dims
    Py_ssize_t size[MAX_DIMS]
    Py_ssize_t stride[MAX_DIMS][N_ROLES]
    Py_ssize_t n_rows
    Py_ssize_t offset[N_ROLES]
    Py_ssize_t n_joined
    Py_ssize_t n_run
    Py_ssize_t joined_stride[N_ROLES]
    Py_ssize_t run_stride[N_ROLES]
    Py_ssize_t n_lanes        # columns a feature has in sums and constants: n_run, or LANES
    Py_ssize_t tree_rows      # of x that are added as one tree; half as many of x and dout

cdef struct Place:            # of one value of each feature
    int segment
    Py_ssize_t row
    Py_ssize_t joined
    Py_ssize_t run

# dout comes through an activation: not, in the kernel, or in a buffer on its way there.
cdef enum Gate:
    NONE
    INSIDE
    BEFORE

cdef struct Features:         # the axes that name a statistic, merged
    int n
    int dim[MAX_DIMS]         # whose stride is that of the merged axis
    Py_ssize_t size[MAX_DIMS]

cdef struct Plan:             # of one visit's arrays
    Layout layout
    bint by_row               # runs are rows, if they are not too short
    bint joins                # rows of few features may be joined
    Py_ssize_t along_from     # runs of so many values are walked along
    bint as_stored            # the kernels take rows of a half type as they are
    bint turned               # columns are features from the last to the first, see is_turned
    Storage storage
    Gate gate
    bint used[N_ROLES]
    char* base[N_ROLES]
    cnp.npy_intp* stride[N_ROLES]  # as the arrays have them
    Py_ssize_t feature_stride[N_ROLES]
    Access access[N_ROLES]
    Py_ssize_t n_features     # along the last of their axes
    int n_outer               # axes around it
    Py_ssize_t outer_size[MAX_DIMS]
    Py_ssize_t outer_stride[MAX_DIMS][N_ROLES]
    Py_ssize_t max_tile       # features a tile may have
    Py_ssize_t block_rows     # rows between two folds
    Py_ssize_t chunk_rows
    Py_ssize_t n_chunks
    int n_segments
    Segment segment[2]
    Place sample[3]           # the values that say where a feature lies, see choose_sample

cdef struct Axes:             # the sample axes, sorted and merged
    int n
    Py_ssize_t size[MAX_DIMS]
    Py_ssize_t key[MAX_DIMS]  # strides of the array that sorts them
    Py_ssize_t stride[MAX_DIMS][N_ROLES]


cdef inline Py_ssize_t distance(Py_ssize_t stride) noexcept nogil:
    """How far apart a step takes us; a broadcast axis (stride 0) is walked outermost."""
    return (stride if stride > 0 else -stride) if stride else INTPTR_MAX


cdef inline void set_role(Plan* plan, int role, cnp.ndarray array) noexcept:
    """Give an array (None: no array) its role.  All have the same shape."""
    plan.used[role] = array is not None
    plan.base[role] = <char*> cnp.PyArray_DATA(array) if plan.used[role] else NULL
    plan.stride[role] = cnp.PyArray_STRIDES(array) if plan.used[role] else NULL


cdef Py_ssize_t nearest(cnp.ndarray key, unsigned long long which) noexcept:
    """How far apart the elements are along the nearest axis of a mask, be it of length 1."""
    cdef Py_ssize_t least = INTPTR_MAX
    cdef int d
    for d in range(cnp.PyArray_NDIM(key)):
        if which >> d & 1:
            least = min(least, distance(cnp.PyArray_STRIDES(key)[d]))
    return least


cdef void find_features(
    cnp.ndarray key, unsigned long long which, cnp.npy_intp** stride, bint merges,
    Features* features,
) noexcept:
    """The axes of a mask, merged where that is one longer axis by the strides of each role (NULL:
    none)."""
    cdef cnp.npy_intp* shape = cnp.PyArray_DIMS(key)
    cdef int d, r, last = -1
    cdef bint merge
    features.n = 0
    for d in range(cnp.PyArray_NDIM(key)):
        if not which >> d & 1 or shape[d] == 1:
            continue
        merge = merges and features.n > 0
        for r in range(N_ROLES):
            merge = merge and (stride[r] == NULL or stride[r][last] == stride[r][d] * shape[d])
        if merge:
            features.size[features.n - 1] *= shape[d]
        else:
            features.size[features.n] = shape[d]
            features.n += 1
        features.dim[features.n - 1] = last = d


cdef void set_features(Plan* plan, const Features* features) noexcept:
    cdef int r, d, last = features.n - 1
    plan.n_features = features.size[last] if last >= 0 else 1
    plan.n_outer = max(last, 0)
    # A norm's joined rows must not depend on how many samples there are, which axis 0 says.
    plan.joins = not plan.by_row or (last >= 0 and features.dim[last] > 0)
    for r in range(N_ROLES):
        plan.feature_stride[r] = (
            plan.stride[r][features.dim[last]] if plan.used[r] and plan.n_features > 1 else 0
        )
        for d in range(plan.n_outer):
            plan.outer_stride[d][r] = plan.stride[r][features.dim[d]] if plan.used[r] else 0
    for d in range(plan.n_outer):
        plan.outer_size[d] = features.size[d]


cdef void sort_axes(
    const Plan* plan, cnp.ndarray key, unsigned long long which, Axes* axes,
) noexcept:
    """The sample axes, the farthest apart in the key first (insertion sort: axes are few)."""
    cdef cnp.npy_intp* shape = cnp.PyArray_DIMS(key)
    cdef cnp.npy_intp* stride = cnp.PyArray_STRIDES(key)
    cdef int r, d, k
    axes.n = 0
    for d in range(cnp.PyArray_NDIM(key)):
        if which >> d & 1 or shape[d] == 1:
            continue
        k = axes.n
        while k > 0 and distance(axes.key[k - 1]) < distance(stride[d]):
            axes.size[k] = axes.size[k - 1]
            axes.key[k] = axes.key[k - 1]
            memcpy(axes.stride[k], axes.stride[k - 1], sizeof(axes.stride[k]))
            k -= 1
        axes.size[k] = shape[d]
        axes.key[k] = stride[d]
        for r in range(N_ROLES):
            axes.stride[k][r] = plan.stride[r][d] if plan.used[r] else 0
        axes.n += 1


cdef void merge_axes(Axes* axes) noexcept:
    """Merge an axis with the next where that is one longer axis in every array."""
    cdef int r, d, k = 0
    cdef bint merge
    for d in range(1, axes.n):
        merge = True
        for r in range(N_ROLES):
            merge = merge and axes.stride[k][r] == axes.stride[d][r] * axes.size[d]
        if merge:
            axes.size[k] *= axes.size[d]
        else:
            k += 1
            axes.size[k] = axes.size[d]
        axes.key[k] = axes.key[d]
        memcpy(axes.stride[k], axes.stride[d], sizeof(axes.stride[k]))
    if axes.n > 0:
        axes.n = k + 1


cdef Py_ssize_t gcd(Py_ssize_t a, Py_ssize_t b) noexcept:
    while b:
        a, b = b, a % b
    return a


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
            rest.offset[r] = main.stride[last][r] * (length - left)
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
            main.stride[last][r] *= piece


cdef bint rows_are_stacked(const Plan* plan, const Axes* axes, bint runs) noexcept:
    """Whether in all arrays but the weights the columns of a row lie side by side, and upon them
    those of the next row, or the next feature's run."""
    cdef Py_ssize_t size = size_of(plan.storage), last = axes.n - 1, inner, outer
    cdef int r
    for r in range(W):
        if not plan.used[r]:
            continue
        inner = axes.stride[last][r] if axes.n > 0 else 0
        outer = plan.feature_stride[r]
        if runs:
            if inner != size or outer != axes.size[last] * size:
                return False
        elif inner != plan.n_features * size or (plan.n_features > 1 and outer != size):
            return False
    return True


cdef void choose_layout(
    Plan* plan, const Axes* axes, Py_ssize_t feature_key, Py_ssize_t rows,
) noexcept:
    """Choose the row of the table, and cut the last axis accordingly.  The key's strides alone
    choose between runs and features, so that all plans of a call choose alike and can share tiles.
    """
    cdef Segment* main = &plan.segment[0]
    cdef Py_ssize_t n = plan.n_features, join, whole, piece
    cdef Py_ssize_t length = axes.size[axes.n - 1] if axes.n > 0 else 1
    cdef bint runs = axes.n > 0 and (
        (n == 1 and not plan.by_row) or distance(axes.key[axes.n - 1]) < feature_key
        or plan.feature_stride[S] != 0  # columns have no gamma of their own
    )
    cdef bint stacked = rows_are_stacked(plan, axes, runs)
    cdef int r
    plan.layout = FEATURES
    plan.max_tile = min(n, <Py_ssize_t> MAX_COLUMNS)
    if runs and plan.by_row and length < ROW_LENGTH and plan.feature_stride[S] == 0:
        runs = False
        n = TILE_COLUMNS  # not joined
    if runs:
        for r in range(N_ROLES):
            main.run_stride[r] = axes.stride[axes.n - 1][r]
        if plan.by_row:
            plan.layout = ROWS
            plan.max_tile = min(n, <Py_ssize_t> BLOCK_ROWS)
            piece = ROW_PIECE // (BLOCK_SHARE if plan.storage == FLOAT64 else 1)
            cut_axis(plan, min(length, piece), False)
        elif length >= plan.along_from or (length >= SHORT_RUN and SHORT_ROWS * rows <= length):
            plan.layout = LONG_RUN
            cut_axis(plan, even_piece(length), False)
        else:
            plan.layout = RUNS
            cut_axis(plan, length, False)
            plan.max_tile = min(n, MAX_COLUMNS // length) if stacked else 1
    elif axes.n > 0 and plan.joins and not plan.used[S] and (
        2 * n <= JOIN_COLUMNS and (stacked or n < NARROW)
    ):
        join = max(SHORT_COLUMNS // n, length // JOIN_ROWS)
        join = min(join, length, JOIN_COLUMNS // n)
        whole = LANES // gcd(n, LANES)
        if stacked and whole * n <= 2 * JOIN_COLUMNS + LANES and whole <= length // JOIN_ROWS:
            join = max(whole, join // whole * whole)
        if join > 1:
            plan.layout = JOINED
            for r in range(N_ROLES):
                main.joined_stride[r] = axes.stride[axes.n - 1][r]
            cut_axis(plan, join, True)


cdef bint is_turned(const Plan* plan) noexcept:
    """Whether features of x and dout lie side by side but for the direction: sums are then taken as
    they lie, and turned.  Reversed (1000, 256) on two threads 61 and 98 us, so 52 and 82, (4096,
    1024) 1.21 and 2.58 ms, 1.03 and 2.01 (AMD EPYC, Zen 4, 2026-11-26)."""
    cdef Py_ssize_t step = -size_of(plan.storage)
    cdef int r
    for r in range(G + 1, N_ROLES):
        if plan.used[r]:
            return False
    return (
        plan.layout == FEATURES and plan.gate == NONE and not plan.by_row
        and not is_half(plan.storage) and plan.feature_stride[X] == step
        and (not plan.used[G] or plan.feature_stride[G] == step)
    )


cdef void choose_accesses(Plan* plan) noexcept:
    cdef const Segment* main = &plan.segment[0]
    cdef Py_ssize_t n = plan.n_features, size = size_of(plan.storage)
    cdef bint side_by_side
    cdef int r
    plan.turned = is_turned(plan)
    for r in range(N_ROLES):
        plan.access[r] = COPIED if is_half(plan.storage) else DIRECT
        if not plan.used[r] or r >= W:
            continue
        if plan.layout == RUNS or plan.layout == LONG_RUN or plan.layout == ROWS:
            side_by_side = main.run_stride[r] == size
        else:
            side_by_side = (n == 1 or plan.turned or plan.feature_stride[r] == size) and (
                plan.layout != JOINED or main.joined_stride[r] == n * size
            )
        if not side_by_side:
            plan.access[r] = GATHERED
            plan.max_tile = min(plan.max_tile, <Py_ssize_t> TILE_COLUMNS)


cdef inline Py_ssize_t rows_of_tree(
    const Plan* plan, const Segment* segment,
) noexcept nogil:
    """Sixteen of x or eight of x and dout; half as many where rows lie whole pages apart, which
    would fill the ways of L1's sets twice: (32, 256, 14, 14) forward 250 us by eights, 290 by
    sixteens.  And rows come in from memory in better order by eights: sums of (50000, 256), one
    thread, 3.0 ms by sixteens, 2.1.  (A norm's order must not depend on how many samples there
    are; half types have float32's.)"""
    cdef Py_ssize_t last = segment.n_dims - 1, size = size_of(plan.storage)
    cdef Py_ssize_t lane_bytes = max(size, <Py_ssize_t> sizeof(float))
    cdef bint pages = (
        last >= 0 and segment.stride[last][X] * lane_bytes // size % PAGE_BYTES == 0
    )
    cdef bint far = not plan.by_row and lane_bytes * segment.n_rows * segment.n_joined * (
        plan.n_features * segment.n_run
    ) > FAR_BYTES
    return TREE_ROWS if pages or far else 2 * TREE_ROWS


cdef void cut_rows(Plan* plan) noexcept:
    """Into blocks and chunks: they say in which order a column's rows are added."""
    cdef Segment* main = &plan.segment[0]
    cdef Py_ssize_t unit = BLOCK_ROWS, least
    cdef int d, k
    for d in range(plan.n_segments):
        plan.segment[d].n_lanes = LANES if plan.layout == LONG_RUN else plan.segment[d].n_run
        plan.segment[d].n_rows = 1
        for k in range(plan.segment[d].n_dims):
            plan.segment[d].n_rows *= plan.segment[d].size[k]
        plan.segment[d].tree_rows = rows_of_tree(plan, &plan.segment[d])
    if plan.layout == ROWS:
        for d in range(plan.n_segments):
            plan.segment[d].n_lanes = 1
        unit = max(main.n_rows, <Py_ssize_t> 1)
    elif plan.layout == LONG_RUN:
        unit = max(1, BLOCK_ELEMENTS // main.n_run)
    elif plan.layout == RUNS and (
        plan.n_features * main.n_run * size_of(plan.storage) < SHARED_RUN_BYTES
    ):
        unit = BLOCK_ROWS // 2  # (128, 33, 7, 7) forward on two threads 37 to 25 us
    plan.chunk_rows = (main.n_rows // MAX_CHUNKS // unit + 1) * unit
    if plan.layout != ROWS:
        least = CHUNK_ELEMENTS // (plan.n_features * main.n_joined * main.n_run)
        plan.chunk_rows = max(plan.chunk_rows, (least + unit - 1) // unit * unit)
    # float64's lanes are no more exact than what they add, so they are folded sooner (as late as
    # float32's: dbeta was off by up to 40 roundings at M = 1e5).
    plan.block_rows = max(1, unit // BLOCK_SHARE) if plan.storage == FLOAT64 else unit
    plan.n_chunks = (
        (main.n_rows + plan.chunk_rows - 1) // plan.chunk_rows + plan.n_segments - 1
    )


cdef void make_plan(
    Plan* plan, cnp.ndarray key, unsigned long long which, const Features* features,
) noexcept:
    """Collapse the arrays of all roles, which have been set, into segments of rows."""
    cdef Axes axes
    cdef Segment* main = &plan.segment[0]
    cdef Py_ssize_t length
    cdef int d
    cdef Py_ssize_t rows = cnp.PyArray_SIZE(key)
    plan.storage = storage_of(key)
    set_features(plan, features)
    sort_axes(plan, key, which, &axes)
    merge_axes(&axes)
    main.n_dims = axes.n
    main.n_joined = main.n_run = 1
    memcpy(main.size, axes.size, axes.n * sizeof(Py_ssize_t))
    memcpy(main.stride, axes.stride, axes.n * sizeof(axes.stride[0]))
    memset(main.offset, 0, sizeof(main.offset))
    memset(main.joined_stride, 0, sizeof(main.joined_stride))
    memset(main.run_stride, 0, sizeof(main.run_stride))
    plan.n_segments = 1
    length = axes.size[axes.n - 1] if axes.n > 0 else 1
    for d in range(features.n):
        rows = rows // features.size[d]
    choose_layout(plan, &axes, nearest(key, which), rows // length)
    choose_accesses(plan)
    cut_rows(plan)


cdef inline Access access_to(
    const Plan* plan, const Segment* segment, int role, Py_ssize_t n_features, bint wide,
) noexcept nogil:
    """How the columns of n_features of a tile's features are come by.  Of joined rows a part, as a
    thread's share of the features in a retry, does not lie side by side."""
    cdef bint part = segment.n_joined > 1 and n_features < plan.n_features
    return GATHERED if plan.used[role] and (wide or part) else plan.access[role]


# ---------------------------------------------------------------- where rows and columns lie

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


cdef inline char* feature_at(const Plan* plan, int role, Py_ssize_t feature) noexcept nogil:
    cdef char* at = plan.base[role]
    cdef Py_ssize_t outer
    cdef int d
    if plan.n_outer:
        outer = feature // plan.n_features
        feature = feature % plan.n_features
        for d in range(plan.n_outer - 1, -1, -1):
            at += outer % plan.outer_size[d] * plan.outer_stride[d][role]
            outer = outer // plan.outer_size[d]
    return at + feature * plan.feature_stride[role]


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
        row += digit[d] * segment.stride[d][role]
    step = segment.stride[last][role]
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
            row += segment.stride[d][role]
            if digit[d] < segment.size[d]:
                break
            row -= digit[d] * segment.stride[d][role]
            digit[d] = 0
            d -= 1


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


cdef inline char* value_at(
    const Plan* plan, int role, Py_ssize_t feature, const Place* place,
) noexcept nogil:
    cdef const Segment* segment = &plan.segment[place.segment]
    cdef char* row
    row_pointers(segment, role, feature_at(plan, role, feature), place.row, 1, &row)
    return row + place.joined * segment.joined_stride[role] + place.run * segment.run_stride[role]


# ---------------------------------------------------------------- which values say where data lies

cdef inline double load_native(const Plan* plan, const char* value) noexcept nogil:
    """A weight, or gamma where it varies: as the lanes are, of a half type's array float32."""
    return load_value(lanes_of(plan.storage), value)


cdef bint find_weight(
    const Plan* plan, Py_ssize_t feature, Place* place, int direction, double least,
) noexcept nogil:
    """Take the place on to the nearest of at least that weight: from its row on in the direction,
    the values of a row in turn."""
    cdef char* rows[BLOCK_ROWS]
    cdef const Segment* segment
    cdef const char* value
    cdef Py_ssize_t n, i, turn, q, e
    while 0 <= place.segment < plan.n_segments:
        segment = &plan.segment[place.segment]
        while 0 <= place.row < segment.n_rows:
            n = segment.n_rows - place.row if direction > 0 else place.row + 1
            n = min(n, <Py_ssize_t> BLOCK_ROWS)
            i = place.row if direction > 0 else place.row - n + 1
            row_pointers(segment, W, feature_at(plan, W, feature), i, n, rows)
            for turn in range(n):
                i = turn if direction > 0 else n - 1 - turn
                for q in range(segment.n_joined):
                    value = rows[i] + q * segment.joined_stride[W]
                    for e in range(segment.n_run):
                        if load_native(plan, value + e * segment.run_stride[W]) >= least:
                            place.row += direction * turn
                            place.joined = q
                            place.run = e
                            return True
            place.row += direction * n
        place.segment += direction
        if 0 <= place.segment < plan.n_segments:
            place.row = 0 if direction > 0 else plan.segment[place.segment].n_rows - 1
    return False


cdef void choose_sample(
    const Plan* plan, Py_ssize_t feature, double least, Place* sample,
) noexcept nogil:
    """Where the three values lie from which a feature's shift is guessed: first, in the middle,
    last, each with at least that weight, if there are weights."""
    cdef const Segment* main = &plan.segment[0]
    cdef Place* place
    cdef int k
    for k in range(3):
        place = &sample[k]
        place.segment = 0
        place.row = (main.n_rows - 1) * k // 2
        place.joined = (main.n_joined - 1) * k // 2
        place.run = (main.n_run - 1) * k // 2
        if not plan.used[W] or load_native(plan, value_at(plan, W, feature, place)) >= least:
            continue
        if k == 2:
            place.segment = plan.n_segments - 1
            place.row = plan.segment[place.segment].n_rows - 1
        if not find_weight(plan, feature, place, -1 if k == 2 else 1, least):
            place[0] = sample[0]  # none from the middle on; but from the first row there is


# ---------------------------------------------------------------- whose sums are kept apart

cdef Py_ssize_t unit_features(const Plan* plan, Py_ssize_t n_features) noexcept:
    """Features whose sums for gamma and beta one thread makes, of all of them, in order: whole
    folds, or whole turns of the axes around the plan's."""
    cdef Py_ssize_t step = FOLD_ROWS if plan.layout == ROWS else FOLD_COLUMNS
    cdef Py_ssize_t least = max(step, (n_features + MAX_UNITS - 1) // MAX_UNITS)
    if plan.n_outer:
        step = plan.n_features
    return (least + step - 1) // step * step
