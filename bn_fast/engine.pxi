# From arrays to blocks: the walk over an array of any layout, the statistics' finish, the threads.
#
#   (a) Layout table.  Axes are merged where all arrays allow it and sorted by x's strides; the
#       features and the nearest sample axis then decide what a row's columns are:
#
#         layout                          columns [joined][feature][run]     example
#         features adjacent               [1][tile of features][1]           (N, C), NHWC
#         features adjacent, few of them  [rows joined][all features][1]     NHWC with C = 3
#         runs, short                     [1][features side by side][run]    NCHW with 7 x 7
#         runs, long                      [1][1][piece of RUN elements]      NCHW with 56 x 56
#
#       Whatever length does not divide evenly is a second segment.  If the columns do not lie side
#       by side in memory (or are byte-wise something else), rows are gathered into a small buffer
#       first, block by block; x is never copied as a whole.
#   (b) One sweep.  A tile of features is summed, finished and applied by one task while it is in
#       cache.  Where a tile cannot fit, or tiles are fewer than threads, the rows' chunks are the
#       tasks: all sums, then the finish, then all applications in reverse (the tail is still in
#       cache).  Both ways add the same numbers in the same order.
#   (c) The order.  A column's rows are added in blocks of BLOCK_ROWS, the block's columns are
#       folded to features by halves, blocks are added to their chunk and chunks to the total with
#       the rounding errors kept.  Blocks and chunks depend on the shape and strides alone, so the
#       bits do not depend on threads, tiles or instruction set.
#       All chunks share one shift, so partial sums simply add; merging means (Chan, Golub &
#       LeVeque 1983) is needed only where the shifts differ.
#   (d) Wide features.  Where the native lanes cannot be trusted (a sum that overflowed or sank, a
#       shift far from the mean, M = 2 in float32) the feature is settled again in float64 lanes,
#       there scaled by a power of two if need be.  Same kernels, gathered rows; only that feature.

cimport cython
cimport numpy as cnp
from cython.parallel cimport prange
from libc.math cimport INFINITY, NAN, fabs, frexp, isfinite, ldexp, sqrt
from libc.stdlib cimport free, malloc
from libc.stdint cimport INTPTR_MAX
from libc.string cimport memset

import numpy as np

cdef extern from "numpy/arrayobject.h":
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray, cnp.NPY_ORDER, void*, int)

cnp.import_array()

cdef enum:
    X = 0                     # roles of the arrays: x (or the only input), dout, the output
    G = 1
    Y = 2
    N_ROLES = 3
    MAX_DIMS = 64             # NumPy's own limit
    BLOCK_ROWS = 128          # rows between two folds: 16 trees deep, see kernels.pxi (a)
    CHUNK_ROWS = 1024         # rows a chunk has at least, and
    MAX_CHUNKS = 64           # chunks at most: scratch is O(features x chunks)
    MAX_COLUMNS = 512
    JOIN_COLUMNS = 256        # few features: rows are joined up to this many columns
    NARROW = 16               # fewer features than this are joined even if they must be gathered
    MAX_RUN = 256             # a run up to this length is one row
    RUN = 64                  # a longer one is cut into rows of this length
    GATHER_ELEMENTS = 2048    # a gathered group of rows stays in L1
    SWEEP_BYTES = 512 * 1024  # a tile of this size stays in L2 between its two visits
    RUN_SWEEP_BYTES = 8 * 1024 * 1024

cdef enum Kind:
    FORWARD                   # statistics of x, then apply
    FORWARD_FROZEN            # apply with the statistics that are given
    BACKWARD                  # sums of dout, then dx through the batch statistics
    BACKWARD_FROZEN           # sums of dout; dx = gamma inv_std dout

cdef enum Phase:
    SWEEP                     # a task is a tile: start, reduce, finish, apply
    REDUCE                    # a task is a chunk of a tile
    FINISH                    # a task is a tile
    APPLY                     # a task is a chunk of a tile

cdef enum State:
    PENDING
    SETTLED
    SCALED

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

cdef struct Plan:
    Py_ssize_t n_features
    Py_ssize_t feature_stride[N_ROLES]
    char* base[N_ROLES]
    bint used[N_ROLES]
    bint packed[N_ROLES]      # rows go through a buffer
    Py_ssize_t max_tile       # features a tile may have
    bint whole                # features cannot be split into tiles
    bint runs
    Py_ssize_t chunk_rows
    Py_ssize_t n_chunks
    int n_segments
    Segment segment[2]

cdef struct Job:
    Kind kind
    Plan reduce
    Plan apply
    bint exact_mean           # the mean is that of x itself, so sum (x - mean) = 0
    Py_ssize_t count          # values per feature, M
    Py_ssize_t n_features
    Py_ssize_t tile
    Py_ssize_t n_tiles
    double eps
    double* gamma
    double* beta
    double* mean              # mean + mean_low is the mean to twice the digits
    double* mean_low
    double* inv_std
    double* var
    double* dgamma
    double* dbeta
    double* shift_x
    double* shift_g
    double* mean_g            # mean_g + mean_g_low is the mean of dout
    double* mean_g_low
    double* factor
    double* scale
    double* slope
    double* bias
    double* sums              # [chunk][sum 1, its low part, sum 2, its low part][feature]
    char* state
    char* wide
    Py_ssize_t width
    Py_ssize_t buffer_elements
    Py_ssize_t scratch_bytes
    char* scratch

cdef struct Scratch:          # one thread's share; columns are `lane` elements, 8 bytes reserved
    char* rows[N_ROLES][BLOCK_ROWS + TREE_ROWS]
    char* shift_x
    char* shift_g
    char* factor
    char* scale
    char* slope
    char* bias
    char* dummy
    double* sum_1
    double* sum_2
    Py_ssize_t* offset[N_ROLES]
    char* buffer[N_ROLES]


# ---------------------------------------------------------------- layout

cdef inline Py_ssize_t distance(Py_ssize_t stride) noexcept nogil:
    """How far apart a step takes us; a broadcast axis (stride 0) is walked outermost."""
    return (stride if stride > 0 else -stride) if stride else INTPTR_MAX


cdef void make_plan(
    Plan* plan, cnp.ndarray x, cnp.ndarray dout, cnp.ndarray out, int axis, Py_ssize_t itemsize,
) noexcept:
    """Collapse the arrays (None where a role is not used; all of x's shape) into segments."""
    cdef cnp.npy_intp* shape = cnp.PyArray_DIMS(x)
    cdef cnp.npy_intp* stride[N_ROLES]
    cdef Py_ssize_t size[MAX_DIMS]
    cdef Py_ssize_t step[N_ROLES][MAX_DIMS]
    cdef int r, d, k, n = 0, ndim = cnp.PyArray_NDIM(x)
    cdef Py_ssize_t length, join, piece, outer = 1
    cdef Py_ssize_t n_features = shape[axis]
    cdef bint merge, side_by_side, stacked
    cdef Segment* main = &plan.segment[0]
    cdef Segment* rest = &plan.segment[1]
    plan.n_features = n_features
    for r, array in enumerate((x, dout, out)):
        plan.used[r] = array is not None
        plan.base[r] = NULL
        stride[r] = NULL
        if plan.used[r]:
            plan.base[r] = <char*> cnp.PyArray_DATA(<cnp.ndarray> array)
            stride[r] = cnp.PyArray_STRIDES(<cnp.ndarray> array)
        plan.feature_stride[r] = stride[r][axis] if plan.used[r] and n_features > 1 else 0
    # Sample axes, the farthest apart in x first (insertion sort: axes are few).
    for d in range(ndim):
        if d == axis or shape[d] == 1:
            continue
        k = n
        while k > 0 and distance(step[X][k - 1]) < distance(stride[X][d]):
            size[k] = size[k - 1]
            for r in range(N_ROLES):
                step[r][k] = step[r][k - 1]
            k -= 1
        size[k] = shape[d]
        for r in range(N_ROLES):
            step[r][k] = stride[r][d] if plan.used[r] else 0
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
        for r in range(N_ROLES):
            step[r][k] = step[r][d]
    if n > 0:
        n = k + 1
    length = size[n - 1] if n > 0 else 1
    for d in range(n - 1):
        outer *= size[d]

    plan.runs = n > 0 and (
        n_features == 1
        or distance(step[X][n - 1]) < distance(plan.feature_stride[X])
    )
    side_by_side = True       # the columns of one row, before joining or stacking
    stacked = True            # joined rows, or the runs of neighboring features, touch as well
    for r in range(N_ROLES):
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
    plan.max_tile = min(n_features, MAX_COLUMNS)
    if plan.runs:
        for r in range(N_ROLES):
            main.run_stride[r] = step[r][n - 1]
        if length <= MAX_RUN and (outer >= TREE_ROWS or length < 2 * RUN):
            piece = length
        else:
            piece = min(RUN, max(16, length // TREE_ROWS // 16 * 16))
        cut_axis(plan, piece, False)
        plan.max_tile = min(n_features, MAX_COLUMNS // length) if (
            stacked and piece == length
        ) else 1
    elif n > 0 and 2 * n_features <= JOIN_COLUMNS and (stacked or n_features < NARROW):
        join = min(length, JOIN_COLUMNS // n_features)
        if join > 1:
            for r in range(N_ROLES):
                main.joined_stride[r] = step[r][n - 1]
            plan.whole = True
            cut_axis(plan, join, True)
    for r in range(N_ROLES):
        plan.packed[r] = plan.used[r] and not (
            (step[r][n - 1] == itemsize) if plan.runs else
            (
                (n_features == 1 or plan.feature_stride[r] == itemsize)
                and (not plan.whole or main.joined_stride[r] == n_features * itemsize)
            )
        )
    for d in range(plan.n_segments):
        plan.segment[d].n_rows = 1
        for k in range(plan.segment[d].n_dims):
            plan.segment[d].n_rows *= plan.segment[d].size[k]
    plan.chunk_rows = max(
        <Py_ssize_t> CHUNK_ROWS,
        (main.n_rows // MAX_CHUNKS + BLOCK_ROWS) // BLOCK_ROWS * BLOCK_ROWS,
    )
    plan.n_chunks = (
        (main.n_rows + plan.chunk_rows - 1) // plan.chunk_rows + plan.n_segments - 1
    )


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
    const double* values, const double* factor, Py_ssize_t first, Py_ssize_t n_features,
    const Segment* segment, lane* columns,
) noexcept nogil:
    """A constant per feature, times its factor if there is one, to a constant per column."""
    cdef Py_ssize_t q, f, e, j = 0
    cdef double value
    for q in range(segment.n_joined):
        for f in range(first, first + n_features):
            value = values[f] * factor[f] if factor != NULL else values[f]
            for e in range(segment.n_run):
                columns[j] = <lane> value
                j += 1


# ---------------------------------------------------------------- a tile's sweeps

cdef Py_ssize_t group_rows(const bint* packed, Py_ssize_t width) noexcept nogil:
    """Rows taken at a time: a whole block, or what fits the buffers in multiples of a tree."""
    if not (packed[X] or packed[G] or packed[Y]):
        return BLOCK_ROWS
    return max(
        <Py_ssize_t> TREE_ROWS, min(<Py_ssize_t> BLOCK_ROWS, GATHER_ELEMENTS // width // TREE_ROWS * TREE_ROWS)
    )


cdef void fetch_rows(
    const Plan* plan, const Segment* segment, int role, bint packed, Py_ssize_t tile_first,
    Py_ssize_t first_column, Py_ssize_t width, Py_ssize_t row, Py_ssize_t n, Scratch* s,
    const real* real_tag, const lane* lane_tag,
) noexcept nogil:
    """Point s.rows[role] at n rows of the input, in place or gathered as `lane` elements."""
    cdef Py_ssize_t i
    cdef char* start = plan.base[role] + tile_first * plan.feature_stride[role]
    cdef lane* buffer = <lane*> s.buffer[role]
    if not packed:
        start += first_column * sizeof(real)
    row_pointers(segment, role, start, row, n, s.rows[role])
    if packed:
        for i in range(n):
            gather_row[real, lane](
                real_tag, s.rows[role][i], s.offset[role] + first_column, width,
                (<lane*> s.factor) + first_column if role == X else (<lane*> s.dummy),
                buffer + i * width,
            )
            s.rows[role][i] = <char*> (buffer + i * width)


cdef void set_ones(Scratch* s, Py_ssize_t width, const lane* lane_tag) noexcept nogil:
    """The factor of roles other than x."""
    cdef Py_ssize_t j
    for j in range(width):
        (<lane*> s.dummy)[j] = 1


cdef void reduce_chunk(
    Job* job, Py_ssize_t chunk, Py_ssize_t first, Py_ssize_t n_features, Scratch* s,
    const real* real_tag, const lane* lane_tag, bint wide,
) noexcept nogil:
    """The two sums of one chunk for the tile's features, into job.sums."""
    cdef Plan* plan = &job.reduce
    cdef Segment* segment
    cdef int index, r
    cdef bint packed[N_ROLES]
    cdef Py_ssize_t row, row_end, block_end, n, i, group, width
    cdef double* total = job.sums + chunk * 4 * job.n_features + first
    chunk_range(plan, chunk, &index, &row, &row_end)
    segment = &plan.segment[index]
    width = segment.n_joined * n_features * segment.n_run
    for r in range(N_ROLES):
        packed[r] = plan.used[r] and (wide or plan.packed[r])
        if packed[r]:
            column_offsets(plan, segment, r, n_features, s.offset[r])
    group = group_rows(packed, width)
    expand[lane](job.shift_x, job.factor if wide else NULL, first, n_features, segment, <lane*> s.shift_x)
    set_ones(s, width, lane_tag)
    if packed[X]:
        for i in range(width):
            (<lane*> s.factor)[i] = 1
        if wide:
            expand[lane](job.factor, NULL, first, n_features, segment, <lane*> s.factor)
    if plan.used[G]:
        expand[lane](job.shift_g, NULL, first, n_features, segment, <lane*> s.shift_g)
    for r in range(4):
        memset(total + r * job.n_features, 0, n_features * sizeof(double))
    while row < row_end:
        block_end = min(row + BLOCK_ROWS, row_end)
        memset(s.sum_1, 0, width * sizeof(double))
        memset(s.sum_2, 0, width * sizeof(double))
        while row < block_end:
            n = min(group, block_end - row)
            for r in range(2):
                if plan.used[r]:
                    fetch_rows[real, lane](
                        plan, segment, r, packed[r], first, 0, width, row, n, s, real_tag, lane_tag
                    )
            row += n
            while n % TREE_ROWS:
                s.rows[X][n] = s.shift_x
                s.rows[G][n] = s.shift_g
                n += 1
            if plan.used[G]:
                grad_stats_block[lane](
                    s.rows[X], s.rows[G], n, width, <lane*> s.shift_x, <lane*> s.shift_g,
                    s.sum_1, s.sum_2,
                )
            else:
                stats_block[lane](
                    s.rows[X], n, width, <lane*> s.shift_x, s.sum_1, s.sum_2
                )
        fold_columns(s.sum_1, segment.n_joined, n_features, segment.n_run)
        fold_columns(s.sum_2, segment.n_joined, n_features, segment.n_run)
        add_compensated(total, total + job.n_features, s.sum_1, n_features)
        add_compensated(
            total + 2 * job.n_features, total + 3 * job.n_features, s.sum_2, n_features
        )


cdef void apply_columns(
    Job* job, const Segment* segment, Py_ssize_t row, Py_ssize_t row_end, Py_ssize_t tile_first,
    Py_ssize_t j0, Py_ssize_t width, const bint* packed, Scratch* s, const real* real_tag,
    const lane* lane_tag,
) noexcept nogil:
    """The second visit: columns j0 .. j0 + width - 1 of a tile, for a range of rows."""
    cdef Plan* plan = &job.apply
    cdef Py_ssize_t n, i, group = group_rows(packed, width)
    cdef lane* dummy = <lane*> s.dummy + MAX_COLUMNS
    cdef int r
    while row < row_end:
        n = min(group, row_end - row)
        for r in range(2):
            if plan.used[r]:
                fetch_rows[real, lane](
                    plan, segment, r, packed[r], tile_first, j0, width, row, n, s, real_tag, lane_tag
                )
        row_pointers(
            segment, Y,
            plan.base[Y] + tile_first * plan.feature_stride[Y] + (0 if packed[Y] else j0 * sizeof(real)),
            row, n, s.rows[Y],
        )
        if packed[Y]:
            # The rows' addresses wait in the unused tail of the buffer's pointers: scatter below.
            for i in range(n):
                s.rows[Y][i] = <char*> ((<lane*> s.buffer[Y]) + i * width)
        if plan.used[G]:
            grad_apply_block[lane](
                s.rows[X], s.rows[G], s.rows[Y], n, width,
                <lane*> s.shift_x + j0, <lane*> s.shift_g + j0, <lane*> s.scale + j0,
                <lane*> s.slope + j0, <lane*> s.bias + j0, dummy,
            )
        else:
            apply_block[lane](
                s.rows[X], s.rows[Y], n, width,
                <lane*> s.shift_x + j0, <lane*> s.scale + j0, <lane*> s.bias + j0, dummy,
            )
        if packed[Y]:
            row_pointers(
                segment, Y, plan.base[Y] + tile_first * plan.feature_stride[Y], row, n, s.rows[Y]
            )
            for i in range(n):
                scatter_row[real, lane](
                    real_tag, s.rows[Y][i], s.offset[Y] + j0, 0, width,
                    (<lane*> s.buffer[Y]) + i * width,
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
    cdef bint packed[N_ROLES]
    cdef Py_ssize_t row, row_end, width, q, f, f_end, j, wanted = 0
    for f in range(first, first + n_features):
        wanted += job.wide[f] == wide
    if wanted == 0:
        return
    chunk_range(plan, chunk, &index, &row, &row_end)
    segment = &plan.segment[index]
    width = segment.n_joined * n_features * segment.n_run
    for r in range(N_ROLES):
        packed[r] = plan.used[r] and (wide or plan.packed[r])
        if packed[r]:
            column_offsets(plan, segment, r, n_features, s.offset[r])
    set_ones(s, width, lane_tag)
    if packed[X]:
        expand[lane](job.factor, NULL, first, n_features, segment, <lane*> s.factor)
    expand[lane](job.shift_x, job.factor, first, n_features, segment, <lane*> s.shift_x)
    if plan.used[G]:
        expand[lane](job.shift_g, NULL, first, n_features, segment, <lane*> s.shift_g)
        expand[lane](job.slope, NULL, first, n_features, segment, <lane*> s.slope)
    expand[lane](job.scale, NULL, first, n_features, segment, <lane*> s.scale)
    expand[lane](job.bias, NULL, first, n_features, segment, <lane*> s.bias)
    if wanted == n_features:
        apply_columns[real, lane](
            job, segment, row, row_end, first, 0, width, packed, s, real_tag, lane_tag
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
                job, segment, row, row_end, first, j, (f_end - f) * segment.n_run, packed, s,
                real_tag, lane_tag,
            )
            f = f_end


# ---------------------------------------------------------------- statistics per feature

cdef inline double low_limit(const real* real_tag) noexcept nogil:
    """Constants between this and its inverse leave the lanes room for x - shift and its square."""
    if real is float:
        return 1e-30
    else:
        return 1e-290


cdef inline bint in_range(double value, double low) noexcept nogil:
    """Zero, NaN and infinity pass: they come out the same in any lane."""
    cdef double size = fabs(value)
    return value == 0 or not (size < low or (size > 1 / low and isfinite(value)))


cdef inline bint too_few(const Job* job, const real* real_tag) noexcept nogil:
    """M = 2: dx = gamma r^3 eps (dout - mean dout) is all that is left when two terms of the size of
    dout cancel.  In float32 that leaves no digit, so such features take the float64 lanes."""
    if real is float:
        return job.count <= 2
    else:
        return False


cdef inline double power_of_two(double value) noexcept nogil:
    """The power of two below |value|, kept where it and its inverse are normal."""
    cdef int exponent
    if value == 0 or not isfinite(value):
        return 1
    frexp(value, &exponent)
    return ldexp(1.0, max(-1000, min(1000, exponent - 1)))


cdef double total_sum(Job* job, int which, Py_ssize_t f) noexcept nogil:
    """Chunk sums in order, errors kept; `which` is 0 or 2."""
    cdef double* sums = job.sums + which * job.n_features + f
    cdef double high = 0, low = 0
    cdef Py_ssize_t chunk
    for chunk in range(job.reduce.n_chunks):
        add_compensated(&high, &low, sums, 1)
        low += sums[job.n_features]
        sums += 4 * job.n_features
    return high + low if isfinite(high) else high


cdef double median_of_three(
    char** rows, const Py_ssize_t* offset, const real* real_tag,
) noexcept nogil:
    """A value near the middle of the data that no single outlier can be; 0 if it is not finite."""
    cdef double a = (<const real*> (rows[0] + offset[0]))[0]
    cdef double b = (<const real*> (rows[1] + offset[1]))[0]
    cdef double c = (<const real*> (rows[2] + offset[2]))[0]
    cdef double middle = max(min(a, b), min(max(a, b), c))
    return middle if isfinite(a) and isfinite(b) and isfinite(c) else 0


cdef void sample_shift(
    const Plan* plan, int role, Py_ssize_t first, Py_ssize_t n_features, double* shift,
    const real* real_tag,
) noexcept nogil:
    """The shift of every feature of a tile: from its first, middle and last value."""
    cdef const Segment* segment = &plan.segment[0]
    cdef char* rows[3]
    cdef Py_ssize_t offset[3]
    cdef Py_ssize_t f, k
    cdef char* start = plan.base[role] + first * plan.feature_stride[role]
    for k in range(3):
        row_pointers(segment, role, start, (segment.n_rows - 1) * k // 2, 1, &rows[k])
        offset[k] = (
            (segment.n_joined - 1) * k // 2 * segment.joined_stride[role]
            + (segment.n_run - 1) * k // 2 * segment.run_stride[role]
        )
    for f in range(first, first + n_features):
        shift[f] = median_of_three[real](rows, offset, real_tag)
        for k in range(3):
            offset[k] += plan.feature_stride[role]


cdef void start_tile(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, const real* real_tag,
) noexcept nogil:
    cdef Py_ssize_t f
    for f in range(first, first + n_features):
        job.state[f] = PENDING
        job.factor[f] = 1
        job.shift_g[f] = 0
        if job.kind != FORWARD:
            job.shift_x[f] = <double> (<real> job.mean[f])
    if job.kind == FORWARD:
        sample_shift[real](&job.reduce, X, first, n_features, job.shift_x, real_tag)
    elif job.kind == BACKWARD and job.exact_mean:
        sample_shift[real](&job.reduce, G, first, n_features, job.shift_g, real_tag)


cdef bint settle_forward(Job* job, Py_ssize_t f, const real* real_tag) noexcept nogil:
    """Mean, variance and inverse deviation from the shifted sums, or another shift or scale to try.

    With d = x - shift:  mean = shift + S1/M,  M var = S2 - S1^2/M.  The subtraction is harmless
    while (mean - shift)^2 <= 9 var; the median of three is within that but for contrived data.
    """
    cdef double m = <double> job.count
    cdef double s1 = total_sum(job, 0, f), s2 = total_sum(job, 2, f)
    cdef double shift = job.shift_x[f], factor = job.factor[f]
    cdef double delta = s1 / m, m2 = s2 - s1 * delta
    cdef double low = low_limit(real_tag), spread, high
    cdef bint finite = isfinite(s1) and isfinite(s2)
    cdef bint first_try = job.state[f] == PENDING
    if finite and delta * delta * m > 9 * m2:
        job.shift_x[f] = shift + delta / factor
        job.state[f] = SCALED
        return False
    if first_try and (not finite or too_few(job, real_tag)):
        # float32: the float64 lanes hold every square.  float64: scaled by 2^-540 they do.
        if real is double:
            job.factor[f] = ldexp(1.0, -540)
        job.state[f] = SCALED
        return False
    spread = m2 / m if m2 > 0 else 0
    if first_try and finite and s1 != 0 and spread + job.eps < low and fabs(shift) < 1e140:
        if real is double:
            job.factor[f] = ldexp(1.0, 540)
        job.state[f] = SCALED
        return False
    if not finite:
        spread = NAN
    high = shift + delta / factor
    job.mean[f] = high
    job.mean_low[f] = (shift - high) + delta / factor if isfinite(high) else 0
    job.var[f] = spread / factor / factor
    spread += job.eps * factor * factor
    job.inv_std[f] = factor / sqrt(spread) if spread != 0 else 0
    return True


cdef bint settle_backward(Job* job, Py_ssize_t f, const real* real_tag) noexcept nogil:
    """dbeta = S1 + M shift_g and, with x - mean = d - rest,  dgamma = r (S2 - rest S1)."""
    cdef double m = <double> job.count
    cdef double s1 = total_sum(job, 0, f), s2 = total_sum(job, 2, f)
    cdef double r = job.inv_std[f], factor = job.factor[f]
    cdef double rest = (job.mean[f] - job.shift_x[f]) + job.mean_low[f]
    if job.state[f] == PENDING and not (
        isfinite(s1) and isfinite(s2) and not too_few(job, real_tag)
        and (fabs(s2) >= m * low_limit(real_tag) or (s1 == 0 and s2 == 0))
    ):
        job.shift_x[f] = job.mean[f]
        if real is double:
            job.factor[f] = power_of_two(r)
        job.state[f] = SCALED
        return False
    job.dbeta[f] = s1 + m * job.shift_g[f]
    job.mean_g[f] = job.shift_g[f] + s1 / m
    job.mean_g_low[f] = (job.shift_g[f] - job.mean_g[f]) + s1 / m
    job.dgamma[f] = r / factor * s2
    if rest != 0:
        job.dgamma[f] -= r * rest * s1
    return True


cdef void set_constants(Job* job, Py_ssize_t f, const real* real_tag) noexcept nogil:
    """What the second visit multiplies and adds, and whether the native lanes can do it.

    The shift is the mean rounded to x's dtype, so x - shift is exact near the mean; the rest of the
    mean goes into the constant.  Tried in the native lanes first, then in the wide ones.
    """
    cdef double low = low_limit(real_tag), m = <double> job.count
    cdef double gamma = job.gamma[f], r = job.inv_std[f], a = gamma * r
    cdef double shift, rest, factor, scale, slope, bias, slope_g
    cdef bint wide
    for wide in range(2):
        shift = job.mean[f] if wide else <double> (<real> job.mean[f])
        rest = (job.mean[f] - shift) + job.mean_low[f]
        factor = power_of_two(r) if wide and sizeof(real) == sizeof(double) else 1
        if job.kind == BACKWARD:
            # dx = a ((dout - mean_g) - (x - mean) r dgamma / M); M = 1 leaves dx = 0.
            job.shift_g[f] = job.mean_g[f] if wide else <double> (<real> job.mean_g[f])
            scale = a
            slope_g = job.dgamma[f] / m if job.count > 1 else 0
            slope = a * slope_g * (r / factor)
            bias = -a * ((job.mean_g[f] - job.shift_g[f]) + job.mean_g_low[f])
            if rest != 0:
                bias += slope * factor * rest
        elif job.kind == BACKWARD_FROZEN:
            # dx = gamma inv_std dout: the affine kernel on dout.
            shift = rest = bias = slope = slope_g = job.shift_g[f] = 0
            factor = 1
            scale = a
        else:
            job.shift_g[f] = slope = slope_g = 0
            scale = gamma * (r / factor)
            bias = job.beta[f] - rest * a if rest != 0 else job.beta[f]
        if not wide and (
            in_range(shift, low) and in_range(r, low) and in_range(scale, low)
            and in_range(job.shift_g[f], low) and in_range(slope, low) and in_range(bias, low)
            and (scale != 0 or gamma == 0 or r == 0) and (slope != 0 or slope_g == 0 or a == 0)
            and (job.kind == FORWARD_FROZEN or not too_few(job, real_tag))
        ):
            break
    job.shift_x[f] = shift
    job.factor[f] = factor
    job.scale[f] = scale
    job.slope[f] = slope
    job.bias[f] = bias
    job.wide[f] = wide


cdef void reduce_tile_wide(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, Scratch* s, const real* real_tag,
) noexcept nogil:
    cdef Py_ssize_t chunk
    for chunk in range(job.reduce.n_chunks):
        reduce_chunk[real, double](
            job, chunk, first, n_features, s, real_tag, <const double*> NULL, True
        )


cdef void finish_tile(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, Scratch* s, const real* real_tag,
) noexcept nogil:
    """Settle the tile's features, again in wide lanes where needed, and set their constants."""
    cdef Py_ssize_t f, unsettled
    cdef bint done
    cdef int attempt
    if job.kind != FORWARD_FROZEN:
        for attempt in range(4):
            unsettled = 0
            for f in range(first, first + n_features):
                if job.state[f] == SETTLED:
                    continue
                if job.kind == FORWARD:
                    done = settle_forward[real](job, f, real_tag)
                else:
                    done = settle_backward[real](job, f, real_tag)
                if done:
                    job.state[f] = SETTLED
                else:
                    unsettled += 1
            if unsettled == 0:
                break
            reduce_tile_wide[real](job, first, n_features, s, real_tag)
    for f in range(first, first + n_features):
        set_constants[real](job, f, real_tag)


# ---------------------------------------------------------------- tasks and threads

cdef void run_tasks(
    Job* job, Phase phase, Py_ssize_t task, Py_ssize_t end, char* memory, const real* real_tag,
) noexcept nogil:
    """Tasks task .. end - 1 of a phase, by one thread in its part of the scratch memory."""
    cdef Scratch s
    cdef Py_ssize_t first, n_features, chunk, index
    share_scratch(job, memory, &s)
    while task < end:
        if phase == SWEEP or phase == FINISH:
            first = task * job.tile
        elif phase == REDUCE:
            first = task // job.reduce.n_chunks * job.tile
        else:
            index = job.n_tiles * job.apply.n_chunks - 1 - task
            first = index // job.apply.n_chunks * job.tile
        n_features = min(job.tile, job.n_features - first)
        if phase == SWEEP and job.kind != FORWARD_FROZEN:
            start_tile[real](job, first, n_features, real_tag)
            for chunk in range(job.reduce.n_chunks):
                reduce_chunk[real, real](
                    job, chunk, first, n_features, &s, real_tag, real_tag, False
                )
        if phase == REDUCE:
            reduce_chunk[real, real](
                job, task % job.reduce.n_chunks, first, n_features, &s, real_tag, real_tag, False
            )
        if phase == SWEEP or phase == FINISH:
            finish_tile[real](job, first, n_features, &s, real_tag)
        if phase == SWEEP:
            for chunk in range(job.apply.n_chunks - 1, -1, -1):
                apply_one[real](job, chunk, first, n_features, &s, real_tag)
        elif phase == APPLY:
            apply_one[real](job, index % job.apply.n_chunks, first, n_features, &s, real_tag)
        task += 1


cdef void apply_one(
    Job* job, Py_ssize_t chunk, Py_ssize_t first, Py_ssize_t n_features, Scratch* s,
    const real* real_tag,
) noexcept nogil:
    apply_chunk[real, real](job, chunk, first, n_features, s, real_tag, real_tag, False)
    apply_chunk[real, double](
        job, chunk, first, n_features, s, real_tag, <const double*> NULL, True
    )


cdef void share_scratch(Job* job, char* memory, Scratch* s) noexcept nogil:
    """Lay one thread's columns and buffers out in its memory."""
    cdef Py_ssize_t columns = job.width * sizeof(double)
    cdef int r
    s.shift_x = memory
    s.shift_g = memory + columns
    s.factor = memory + 2 * columns
    s.scale = memory + 3 * columns
    s.slope = memory + 4 * columns
    s.bias = memory + 5 * columns
    s.sum_1 = <double*> (memory + 6 * columns)
    s.sum_2 = <double*> (memory + 7 * columns)
    for r in range(N_ROLES):
        s.offset[r] = <Py_ssize_t*> (memory + (8 + r) * columns)
    s.dummy = memory + 11 * columns
    memory += 11 * columns + 4 * MAX_COLUMNS * sizeof(double)
    for r in range(N_ROLES):
        s.buffer[r] = memory + r * job.buffer_elements * sizeof(double)


cdef void run_phase(
    Job* job, Phase phase, Py_ssize_t n_tasks, int n_threads, const real* real_tag,
) noexcept nogil:
    cdef int t
    if n_threads > n_tasks:
        n_threads = <int> n_tasks
    if n_threads <= 1:
        run_tasks[real](job, phase, 0, n_tasks, job.scratch, real_tag)
        return
    for t in prange(n_threads, num_threads=n_threads, schedule="static", chunksize=1):
        run_tasks[real](
            job, phase, t * n_tasks // n_threads, (t + 1) * n_tasks // n_threads,
            job.scratch + t * job.scratch_bytes, real_tag,
        )


cdef void run_job(Job* job, bint sweep, int n_threads, const real* real_tag) noexcept nogil:
    cdef Py_ssize_t tile
    if sweep:
        run_phase[real](job, SWEEP, job.n_tiles, n_threads, real_tag)
        return
    if job.kind != FORWARD_FROZEN:
        for tile in range(job.n_tiles):
            start_tile[real](
                job, tile * job.tile, min(job.tile, job.n_features - tile * job.tile), real_tag
            )
        run_phase[real](job, REDUCE, job.n_tiles * job.reduce.n_chunks, n_threads, real_tag)
    run_phase[real](job, FINISH, job.n_tiles, n_threads, real_tag)
    run_phase[real](job, APPLY, job.n_tiles * job.apply.n_chunks, n_threads, real_tag)


cdef void choose_tile(Job* job, Py_ssize_t itemsize, int n_threads, bint* sweep) noexcept:
    """Tile width, and whether a tile is swept at once.  Neither touches the result's bits."""
    cdef Py_ssize_t bytes = job.count * itemsize * (1 if job.kind < BACKWARD else 2)
    cdef Py_ssize_t limit = min(job.reduce.max_tile, job.apply.max_tile)
    cdef Py_ssize_t line = 64 // itemsize
    job.tile = limit
    if job.reduce.whole or job.apply.whole:
        job.tile = job.n_features
        sweep[0] = n_threads <= 1 and bytes * job.tile <= SWEEP_BYTES
    elif job.apply.runs:
        sweep[0] = bytes * limit <= RUN_SWEEP_BYTES and job.n_features >= 2 * limit * n_threads
        if not sweep[0] and job.n_features >= 2 * n_threads and bytes <= RUN_SWEEP_BYTES:
            job.tile = max(1, min(limit, job.n_features // (2 * n_threads)))
            sweep[0] = True
    else:
        job.tile = min(limit, SWEEP_BYTES // bytes // line * line)
        if n_threads > 1:
            job.tile = min(job.tile, max(line, job.n_features // (2 * n_threads) // line * line))
        sweep[0] = job.tile >= line and job.n_features >= job.tile * n_threads
        if not sweep[0]:
            job.tile = limit
            sweep[0] = n_threads <= 1 and bytes * limit <= SWEEP_BYTES
    job.n_tiles = (job.n_features + job.tile - 1) // job.tile


cdef Py_ssize_t widest(const Plan* plan, Py_ssize_t tile) noexcept:
    return plan.segment[0].n_joined * tile * plan.segment[0].n_run


cdef bint overlap(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether the two arrays' extents in memory meet (they may still interleave)."""
    cdef char* low[2]
    cdef char* high[2]
    cdef Py_ssize_t span
    cdef int d, k
    for k in range(2):
        array = a if k == 0 else b
        low[k] = <char*> cnp.PyArray_DATA(array)
        high[k] = low[k] + cnp.PyArray_ITEMSIZE(array)
        for d in range(cnp.PyArray_NDIM(array)):
            span = (cnp.PyArray_DIMS(array)[d] - 1) * cnp.PyArray_STRIDES(array)[d]
            if span > 0:
                high[k] += span
            else:
                low[k] += span
    return low[0] < high[1] and low[1] < high[0]


cdef int load_parameter(cnp.ndarray values, double* target) except -1:
    """A one-dimensional float32 or float64 array, any stride, as double."""
    cdef char* data = <char*> cnp.PyArray_DATA(values)
    cdef Py_ssize_t f, stride = cnp.PyArray_STRIDES(values)[0]
    cdef int kind = cnp.PyArray_TYPE(values)
    for f in range(cnp.PyArray_DIMS(values)[0]):
        if kind == cnp.NPY_FLOAT32:
            target[f] = (<float*> (data + f * stride))[0]
        else:
            target[f] = (<double*> (data + f * stride))[0]
    return 0


cdef int execute(
    Job* job, cnp.ndarray x, cnp.ndarray dout, cnp.ndarray out, int axis, int n_threads,
    cnp.ndarray gamma, cnp.ndarray beta,
) except -1:
    """Plan, allocate, run.  x has at least one element."""
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(x)
    cdef Py_ssize_t n = cnp.PyArray_DIMS(x)[axis], n_sums, n_values
    cdef bint sweep, single = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32
    cdef double* values
    cdef char* memory
    job.n_features = n
    job.count = cnp.PyArray_SIZE(x) // n
    make_plan(&job.reduce, x, dout, None, axis, itemsize)
    if job.kind == BACKWARD_FROZEN:
        make_plan(&job.apply, dout, None, out, axis, itemsize)
    else:
        make_plan(&job.apply, x, dout, out, axis, itemsize)
    # An array that is overwritten is read through the buffer, so that kernels may assume that
    # nothing they read is what they write.
    if overlap(dout if job.kind == BACKWARD_FROZEN else x, out):
        job.apply.packed[X] = True
    if job.apply.used[G] and overlap(dout, out):
        job.apply.packed[G] = True
    choose_tile(job, itemsize, n_threads, &sweep)
    job.width = max(widest(&job.reduce, job.tile), widest(&job.apply, job.tile))
    job.width = (job.width + 7) // 8 * 8
    job.buffer_elements = max(<Py_ssize_t> GATHER_ELEMENTS, TREE_ROWS * job.width)
    job.scratch_bytes = (
        11 * job.width + 4 * MAX_COLUMNS + 3 * job.buffer_elements
    ) * sizeof(double)
    n_sums = 4 * job.reduce.n_chunks * n if job.kind != FORWARD_FROZEN else 0
    n_values = (10 * n + n_sums + (2 * n + 7) // 8 + 7) // 8 * 8
    memory = <char*> malloc(n_values * sizeof(double) + n_threads * job.scratch_bytes + 64)
    if memory == NULL:
        raise MemoryError("bn_fast: no memory for the scratch of this call")
    try:
        values = <double*> ((<size_t> memory + 63) // 64 * 64)
        job.gamma = values
        job.beta = values + n
        job.shift_x = values + 2 * n
        job.shift_g = values + 3 * n
        job.factor = values + 4 * n
        job.scale = values + 5 * n
        job.slope = values + 6 * n
        job.bias = values + 7 * n
        job.mean_g = values + 8 * n
        job.mean_g_low = values + 9 * n
        job.sums = values + 10 * n
        job.state = <char*> (job.sums + n_sums)
        job.wide = job.state + n
        job.scratch = <char*> (values + n_values)
        load_parameter(gamma, job.gamma)
        if beta is not None:
            load_parameter(beta, job.beta)
        with nogil:
            if single:
                run_job[float](job, sweep, n_threads, <const float*> NULL)
            else:
                run_job[double](job, sweep, n_threads, <const double*> NULL)
    finally:
        free(memory)
    return 0


# ---------------------------------------------------------------- the doors

cdef inline bint is_plain_array(object array) noexcept:
    """An ndarray proper, float32 or float64, aligned and native."""
    return (
        cnp.PyArray_CheckExact(array)
        and (
            cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32 or cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64
        )
        and cnp.PyArray_ISBEHAVED_RO(array)
    )


cdef inline bint is_plain_parameter(object values, Py_ssize_t n) noexcept:
    return (
        is_plain_array(values) and cnp.PyArray_NDIM(values) == 1
        and cnp.PyArray_DIMS(values)[0] == n
    )


def is_plain(x, gamma, beta, axis, out):
    """Whether the arguments of a forward call need no conversion and no check: the straight road."""
    cdef Py_ssize_t n
    if out is not None or not is_plain_array(x) or cnp.PyArray_NDIM(x) < 2:
        return False
    if type(axis) is not int or not 0 <= axis < cnp.PyArray_NDIM(x):
        return False
    n = cnp.PyArray_DIMS(x)[<int> axis]
    return is_plain_parameter(gamma, n) and is_plain_parameter(beta, n)


def are_plain_statistics(mean, var, Py_ssize_t n_features):
    """Whether running averages need no conversion and no check; no variance is negative."""
    cdef char* data
    cdef Py_ssize_t f, stride
    if not (is_plain_parameter(mean, n_features) and is_plain_parameter(var, n_features)):
        return False
    data = <char*> cnp.PyArray_DATA(var)
    stride = cnp.PyArray_STRIDES(var)[0]
    for f in range(n_features):
        if cnp.PyArray_TYPE(var) == cnp.NPY_FLOAT32:
            if (<float*> (data + f * stride))[0] < 0:
                return False
        elif (<double*> (data + f * stride))[0] < 0:
            return False
    return True


def running_average(cnp.ndarray old not None, cnp.ndarray stats not None, int row, momentum, x):
    """A new array, momentum * old + (1 - momentum) * stats[row]; momentum None: a copy of old.

    float32 only where both old and x are.
    """
    cdef Py_ssize_t f, n = cnp.PyArray_DIMS(old)[0]
    cdef cnp.npy_intp length = n
    cdef double* batch = <double*> cnp.PyArray_DATA(stats) + row * n
    cdef double weight
    cdef double* values
    cdef cnp.ndarray new = cnp.PyArray_EMPTY(1, &length, cnp.NPY_FLOAT64, 0), narrow
    values = <double*> cnp.PyArray_DATA(new)
    load_parameter(old, values)
    if momentum is not None:
        weight = momentum
        for f in range(n):
            values[f] = weight * values[f] + (1 - weight) * batch[f]
    if cnp.PyArray_TYPE(old) == cnp.NPY_FLOAT32 and cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32:
        narrow = cnp.PyArray_EMPTY(1, &length, cnp.NPY_FLOAT32, 0)
        store_parameter(values, narrow)
        return narrow
    return new


def is_plain_gradient(dout, x, out):
    """Whether dout can be used as it is beside a plain x: same type and shape."""
    cdef int d
    if out is not None or not is_plain_array(dout):
        return False
    if (
        cnp.PyArray_TYPE(dout) != cnp.PyArray_TYPE(x)
        or cnp.PyArray_NDIM(dout) != cnp.PyArray_NDIM(x)
    ):
        return False
    for d in range(cnp.PyArray_NDIM(x)):
        if cnp.PyArray_DIMS(dout)[d] != cnp.PyArray_DIMS(x)[d]:
            return False
    return True


def forward(
    cnp.ndarray x not None, cnp.ndarray gamma not None, cnp.ndarray beta not None, int axis,
    double eps, cnp.ndarray out, cnp.ndarray mean, cnp.ndarray var, int n_threads,
):
    """Normalize x along every axis but one.

    mean and var: None for those of the batch, else frozen statistics, float64 and contiguous.
    Returns out (new if None), stats (4, n_features) float64: mean, the mean's low part, inv_std,
    var.
    """
    cdef Job job
    cdef Py_ssize_t f, n = cnp.PyArray_DIMS(x)[axis]
    cdef cnp.npy_intp shape[2]
    cdef cnp.ndarray stats
    cdef double* values
    shape[0] = 4
    shape[1] = n
    if out is None:
        out = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    stats = cnp.PyArray_EMPTY(2, shape, cnp.NPY_FLOAT64, 0)
    values = <double*> cnp.PyArray_DATA(stats)
    job.kind = FORWARD if mean is None else FORWARD_FROZEN
    job.eps = eps
    job.exact_mean = True
    job.mean = values
    job.mean_low = values + n
    job.inv_std = values + 2 * n
    job.var = values + 3 * n
    if mean is not None:
        load_parameter(mean, job.mean)
        load_parameter(var, job.var)
        for f in range(n):
            job.mean_low[f] = 0
            job.inv_std[f] = 1 / sqrt(job.var[f] + eps)
    elif cnp.PyArray_SIZE(x) == 0:
        for f in range(4 * n):
            values[f] = NAN
    if cnp.PyArray_SIZE(x) > 0:
        execute(&job, x, None, out, axis, n_threads, gamma, beta)
    return out, stats


def backward(
    cnp.ndarray dout not None, cnp.ndarray x not None, cnp.ndarray gamma not None,
    cnp.ndarray stats not None, int axis, cnp.ndarray out, bint frozen, bint exact_mean,
    int n_threads,
):
    """Gradients dx (in out, new if None), dgamma, dbeta from dout and the forward's x and stats.

    frozen: the statistics were given, so dx = gamma inv_std dout.  exact_mean: they are x's own.
    """
    cdef Job job
    cdef Py_ssize_t f, n = cnp.PyArray_DIMS(x)[axis]
    cdef cnp.ndarray dgamma, dbeta, sums
    cdef cnp.npy_intp shape[2]
    cdef double* values = <double*> cnp.PyArray_DATA(stats)
    if out is None:
        out = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    shape[0] = 2
    shape[1] = n
    sums = cnp.PyArray_ZEROS(2, shape, cnp.NPY_FLOAT64, 0)
    job.kind = BACKWARD_FROZEN if frozen else BACKWARD
    job.exact_mean = exact_mean
    job.eps = 0
    job.mean = values
    job.mean_low = values + n
    job.inv_std = values + 2 * n
    job.var = NULL
    job.dgamma = <double*> cnp.PyArray_DATA(sums)
    job.dbeta = job.dgamma + n
    if cnp.PyArray_SIZE(x) > 0:
        execute(&job, x, dout, out, axis, n_threads, gamma, None)
    dgamma = cnp.PyArray_EMPTY(1, &shape[1], cnp.PyArray_TYPE(x), 0)
    dbeta = cnp.PyArray_EMPTY(1, &shape[1], cnp.PyArray_TYPE(x), 0)
    store_parameter(job.dgamma, dgamma)
    store_parameter(job.dbeta, dbeta)
    return out, dgamma, dbeta


cdef void store_parameter(const double* values, cnp.ndarray target) noexcept:
    cdef Py_ssize_t f
    for f in range(cnp.PyArray_DIMS(target)[0]):
        if cnp.PyArray_TYPE(target) == cnp.NPY_FLOAT32:
            (<float*> cnp.PyArray_DATA(target))[f] = <float> values[f]
        else:
            (<double*> cnp.PyArray_DATA(target))[f] = values[f]
