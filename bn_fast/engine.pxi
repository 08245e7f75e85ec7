# The engine: tasks, threads, and the functions that Python calls.
#
#   (a) One sweep.  A tile of features is summed, finished and applied by one task while it is in
#       cache.  Where a tile cannot fit, or tiles are fewer than threads, the rows' chunks are the
#       tasks: all sums, then the finish, then all applications in reverse (the tail is still in
#       cache).  Both ways add the same numbers in the same order.
#   (b) The order.  A column's rows are added in blocks of BLOCK_ROWS, the block's columns are
#       folded to features by halves, blocks are added to their chunk and chunks to the total with
#       the rounding errors kept.  Blocks and chunks depend on the shape and strides alone, so the
#       bits do not depend on threads, tiles or instruction set.
#       All chunks share one shift, so partial sums simply add; merging means (Chan, Golub &
#       LeVeque 1983) is needed only where the shifts differ.
#   (c) Wide features.  Where the native lanes cannot be trusted (a sum that overflowed or sank, a
#       shift far from the mean, M = 2 in float32) the feature is settled again in float64 lanes,
#       there scaled by a power of two if need be.  Same kernels, gathered rows; only that feature.

cimport numpy as cnp
from cython.parallel cimport parallel, threadid
from libc.math cimport INFINITY, NAN, fabs, frexp, isfinite, ldexp, sqrt
from libc.stdlib cimport calloc, free, malloc
from libc.stdint cimport INTPTR_MAX
from libc.string cimport memcpy, memset

import numpy as np

cdef extern from "numpy/arrayobject.h":
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray, cnp.NPY_ORDER, void*, int)

cdef extern from "_native.h" nogil:
    void bn_read_stack()
    int bn_startable(int n_threads)
    void bn_barrier(int n_threads)
    int bn_team "omp_get_num_threads" ()

cnp.import_array()
bn_read_stack()

include "kernels.pxi"
include "half.pxi"
include "layout.pxi"
include "sweep.pxi"
include "options.pxi"
include "statistics.pxi"

# Where the engine's ways part. Tests draw sizes on both sides of each.
boundaries = {
    "TREE_ROWS": TREE_ROWS,
    "APPLY_ROWS": APPLY_ROWS,
    "MAX_COLUMNS": MAX_COLUMNS,
    "STRIP": STRIP,
    "LANES": LANES,
    "HALF_PIECE": HALF_PIECE,
    "BLOCK_ROWS": BLOCK_ROWS,
    "MAX_CHUNKS": MAX_CHUNKS,
    "JOIN_COLUMNS": JOIN_COLUMNS,
    "SHORT_COLUMNS": SHORT_COLUMNS,
    "JOIN_ROWS": JOIN_ROWS,
    "NARROW": NARROW,
    "ALONG_RUN": ALONG_RUN,
    "TREE_RUN": TREE_RUN,
    "PIECE": PIECE,
    "BLOCK_ELEMENTS": BLOCK_ELEMENTS,
    "BLOCK_SHARE": BLOCK_SHARE,
    "GATHER_ELEMENTS": GATHER_ELEMENTS,
    "GATHER_COLUMNS": GATHER_COLUMNS,
    "AHEAD_ROWS": AHEAD_ROWS,
    "SWEEP_BYTES": SWEEP_BYTES,
    "TILE_COLUMNS": TILE_COLUMNS,
    "TILE_BYTES": TILE_BYTES,
    "SPLIT_FROM": SPLIT_FROM,
    "SPLIT_TO": SPLIT_TO,
    "ALONG_SWEEP_BYTES": ALONG_SWEEP_BYTES,
    "RUN_SWEEP_BYTES": RUN_SWEEP_BYTES,
    "PAGE_BYTES": PAGE_BYTES,
    "STREAM_BYTES": STREAM_BYTES,
    "PREFETCH_BYTES": PREFETCH_BYTES,
    "PREFETCH_OUTPUT": PREFETCH_OUTPUT,
    "SHARE_FEATURES": SHARE_FEATURES,
    "HELD_SIZE": HELD_SIZE,
}


cdef void sweep_tiles(
    Job* job, Py_ssize_t tile, Py_ssize_t end, Scratch* s, const real* real_tag,
) noexcept nogil:
    """Tiles tile .. end - 1 from their first visit to their last."""
    cdef Job own
    cdef Py_ssize_t first, n_features, chunk
    if job.own_values:
        own = job[0]
        job = &own
    for tile in range(tile, end):
        tile_range(job, tile, &first, &n_features)
        if job.own_values:
            lay_out(job, s.values, job.tile + job.lead, first)
        if job.reduces or job.gated:
            start_tile[real](job, first, n_features, real_tag)
        if job.reduces:
            for chunk in range(job.reduce.n_chunks):
                reduce_tile[real, real](
                    job, chunk, first, n_features, s, real_tag, real_tag, False
                )
        finish_tile[real](job, first, n_features, s, real_tag)
        if job.applies:
            for chunk in range(job.apply.n_chunks - 1, -1, -1):
                apply_tile[real](job, chunk, first, n_features, s, real_tag)


cdef void visit_chunks(
    Job* job, bint applies, Py_ssize_t task, Py_ssize_t end, Scratch* s, const real* real_tag,
) noexcept nogil:
    """One visit to chunks of tiles; the tiles of a row follow one another.  The second visit is in
    reverse, as the tail of what a thread summed is still in its cache."""
    cdef Py_ssize_t first, n_features, index, turn, n_tasks = end - task
    for turn in range(n_tasks):
        index = end - 1 - turn if applies else task + turn
        tile_range(job, index % job.n_tiles, &first, &n_features)
        if applies:
            apply_tile[real](job, index // job.n_tiles, first, n_features, s, real_tag)
        else:
            reduce_tile[real, real](
                job, index // job.n_tiles, first, n_features, s, real_tag, real_tag, False
            )


cdef void visit_features(
    Job* job, bint finishes, int thread, int n_threads, Scratch* s, const real* real_tag,
) noexcept nogil:
    """What comes before or after the first visit, feature by feature: a thread's share of each
    tile."""
    cdef Py_ssize_t tile, first, n_features, share, start
    for tile in range(job.n_tiles):
        tile_range(job, tile, &first, &n_features)
        share = max(<Py_ssize_t> SHARE_FEATURES, (n_features + n_threads - 1) // n_threads)
        start = thread * share
        if start >= n_features:
            continue
        share = min(share, n_features - start)
        if finishes:
            finish_tile[real](job, first + start, share, s, real_tag)
        else:
            start_tile[real](job, first + start, share, real_tag)


cdef void apply_tile(
    Job* job, Py_ssize_t chunk, Py_ssize_t first, Py_ssize_t n_features, Scratch* s,
    const real* real_tag,
) noexcept nogil:
    """The second visit to a tile, feature by feature where runs are walked along."""
    cdef Py_ssize_t end = first + n_features
    cdef double n_wide = fold_run(job.wide + first, n_features)
    cdef bint native = n_wide < n_features
    if job.apply.along:
        n_features = 1
    while first < end:
        if native:
            apply_chunk[real, real](job, chunk, first, n_features, s, real_tag, real_tag, False)
        if n_wide != 0:
            apply_chunk[real, double](
                job, chunk, first, n_features, s, real_tag, <const double*> NULL, True
            )
        first += n_features


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
    s.offset[X] = <Py_ssize_t*> (memory + 8 * columns)
    s.offset[G] = <Py_ssize_t*> (memory + 9 * columns)
    s.offset[Y] = <Py_ssize_t*> (memory + 10 * columns)
    s.dummy = memory + 11 * columns
    s.factor_g = memory + 15 * columns
    memory += 16 * columns
    for r in range(N_ROLES):
        if r == X or r == G or r == Y or job.has_options:
            s.buffer[r] = memory
            memory += job.buffer_elements * sizeof(double)
    if job.has_options:
        s.offset[R] = <Py_ssize_t*> memory
        s.offset[D] = <Py_ssize_t*> (memory + columns)
        s.offset[W] = <Py_ssize_t*> (memory + 2 * columns)
        s.gate_shift = memory + 3 * columns
        s.gate_scale = memory + 4 * columns
        s.gate_bias = memory + 5 * columns
        s.gate_ones = memory + 6 * columns
        s.wide_shift = <double*> (memory + 7 * columns)
        s.wide_scale = <double*> (memory + 8 * columns)
        s.wide_bias = <double*> (memory + 9 * columns)
        s.wide_factor = <double*> (memory + 10 * columns)
        s.wide_ones = <double*> (memory + 11 * columns)
        s.weigh_shift = memory + 12 * columns
        s.weigh_slope = memory + 13 * columns
        s.weigh_rest = memory + 14 * columns
        s.weigh_ones = memory + 15 * columns
        s.shift_r = memory + 16 * columns
        s.mix_g = memory + 17 * columns
        s.mix_r = memory + 18 * columns
        s.mix_x = memory + 19 * columns
        s.mix_bias = memory + 20 * columns
        memory += N_OPTION_COLUMNS * columns
    s.values = <double*> memory


cdef void run_share(
    Job* job, bint sweep, int thread, int n_threads, const real* real_tag,
) noexcept nogil:
    """What one of n threads does of a call."""
    cdef Scratch s
    cdef Py_ssize_t n = job.n_tiles * job.reduce.n_chunks, m = job.n_tiles * job.apply.n_chunks
    share_scratch(job, job.scratch + thread * job.scratch_bytes, &s)
    if sweep:
        n = job.n_tiles
        sweep_tiles[real](
            job, thread * n // n_threads, (thread + 1) * n // n_threads, &s, real_tag
        )
    else:
        if job.reduces or job.gated:
            visit_features[real](job, False, thread, n_threads, &s, real_tag)
            bn_barrier(n_threads)
        if job.reduces:
            visit_chunks[real](
                job, False, thread * n // n_threads, (thread + 1) * n // n_threads, &s, real_tag
            )
            bn_barrier(n_threads)
        visit_features[real](job, True, thread, n_threads, &s, real_tag)
        if job.applies:
            bn_barrier(n_threads)
            visit_chunks[real](
                job, True, thread * m // n_threads, (thread + 1) * m // n_threads, &s, real_tag
            )
    if job.stream or job.stream_gradient:
        bn_stream_end()


cdef void run_job(Job* job, bint sweep, int n_threads, const real* real_tag) noexcept nogil:
    """One parallel region a call, its phases apart by barriers: with a region for each (256, 512)
    took 21.9 and 33.6 us on two threads, so 20.2 and 30.8."""
    if n_threads <= 1:
        run_share[real](job, sweep, 0, 1, real_tag)
        return
    with parallel(num_threads=n_threads):
        run_share[real](job, sweep, threadid(), bn_team(), real_tag)


cdef void run_typed(Job* job, bint single, bint sweep, int n_threads) noexcept nogil:
    if single:
        run_job[float](job, sweep, n_threads, <const float*> NULL)
    else:
        run_job[double](job, sweep, n_threads, <const double*> NULL)


cdef Py_ssize_t columns_to_line(const Plan* plan, Py_ssize_t itemsize) noexcept:
    """Columns before the output's first cache line, if every row has them.

    Tiles begin there.  Two threads that write to one line, once a row, cost (128, 256) on two
    threads 20 us of 29.
    """
    cdef const Segment* main = &plan.segment[0]
    cdef int d
    for d in range(main.n_dims):
        if main.stride[Y][d] % 64:
            return 0
    if not plan.used[Y] or plan.access[Y] == GATHERED or (<size_t> plan.base[Y]) % itemsize:
        return 0
    return (64 - (<size_t> plan.base[Y]) % 64) % 64 // itemsize


cdef inline Py_ssize_t even_part(Py_ssize_t n, Py_ssize_t limit, Py_ssize_t step) noexcept:
    """n in as few equal parts, multiples of `step`, as `limit` allows; 0 if it allows none."""
    cdef Py_ssize_t parts
    limit = limit // step * step
    if limit == 0:
        return 0
    parts = (n + limit - 1) // limit
    return ((n + parts - 1) // parts + step - 1) // step * step


cdef void choose_tile(Job* job, Py_ssize_t itemsize, int n_threads, bint* sweep) noexcept:
    """Tile width, and whether a tile is swept at once.  Neither touches the result's bits."""
    cdef Py_ssize_t bytes = job.count * itemsize * (1 if job.kind < BACKWARD else 2)
    cdef Py_ssize_t limit = min(job.reduce.max_tile, job.apply.max_tile)
    cdef Py_ssize_t line = 64 // itemsize
    cdef Py_ssize_t share = (job.n_features + n_threads - 1) // n_threads  # of a thread
    cdef Py_ssize_t narrow
    job.tile = limit
    job.lead = 0
    if job.reduce.whole or job.apply.whole:
        job.tile = job.n_features
        sweep[0] = n_threads <= 1 and bytes * job.tile <= SWEEP_BYTES
    elif job.apply.runs:
        if job.apply.along:
            limit = min(limit, max(<Py_ssize_t> 1, ALONG_SWEEP_BYTES // bytes))
        job.tile = even_part(share, min(limit, RUN_SWEEP_BYTES // bytes), 1)
        # Else, as with three features for two threads, one of them would wait too long; or all of
        # them would have pages in common, every few of one's runs beside those of another.
        sweep[0] = job.tile > 0 and 5 * job.n_features >= 4 * share * n_threads and (
            n_threads <= 1 or job.reduce.n_chunks < n_threads
            or share * job.apply.segment[0].n_run * itemsize >= PAGE_BYTES
        )
        if not sweep[0]:
            job.tile = 1 if job.apply.along else limit
    else:
        # Several tiles, from one cache line of the output to another; or all features as one.
        job.lead = columns_to_line(&job.apply, itemsize)
        narrow = min(limit, <Py_ssize_t> TILE_COLUMNS)
        if job.reduce.used[W] or job.apply.used[W] or job.gated:
            limit = narrow
        job.tile = even_part(share, min(narrow - line, SWEEP_BYTES // bytes), line)
        sweep[0] = job.tile > 0 and job.n_features > job.tile * (n_threads - 1) and (
            bytes * job.n_features < SPLIT_FROM
            or (
                job.tile * itemsize >= TILE_BYTES
                and (
                    n_threads <= 1 or job.reduce.n_chunks < n_threads
                    or bytes * job.n_features > SPLIT_TO
                )
            )
        )
        if job.n_features <= (limit if not sweep[0] else narrow if n_threads <= 1 else 0):
            job.lead = 0
            job.tile = job.n_features
            sweep[0] = n_threads <= 1 and bytes * job.tile <= SWEEP_BYTES
        elif not sweep[0]:
            job.tile = limit - line
    job.n_tiles = max(<Py_ssize_t> 1, (job.n_features - job.lead + job.tile - 1) // job.tile)


cdef void choose_access(Job* job, bint sweep, Py_ssize_t itemsize) noexcept:
    """Detours around the caches that pay for large arrays."""
    cdef Py_ssize_t bytes = job.count * job.n_features * itemsize
    cdef Py_ssize_t n_arrays = 0
    cdef Plan* plan = &job.apply
    cdef int r
    for r in range(W):
        n_arrays += job.reduce.used[r] or plan.used[r]
    job.stream = BN_STREAMS and n_arrays * bytes >= STREAM_BYTES
    job.stream_gradient = job.stream and job.reduce.used[D] and not sweep
    job.prefetch = bytes >= PREFETCH_BYTES
    job.prefetch_again = job.prefetch and not sweep
    job.prefetch_output = bytes >= PREFETCH_OUTPUT
    for r in range(Y, W):
        if job.stream and plan.used[r] and plan.access[r] != GATHERED:
            plan.access[r] = STREAMED


cdef Py_ssize_t widest(const Plan* plan, Py_ssize_t tile) noexcept:
    return plan.segment[0].n_joined * (1 if plan.along else tile) * plan.segment[0].n_run


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


cdef inline int parameter_type(cnp.ndarray x) noexcept:
    """The type that parameters and their gradients have beside x: its own, or a half's lanes'."""
    return cnp.NPY_FLOAT32 if cnp.PyArray_ITEMSIZE(x) <= 4 else cnp.NPY_FLOAT64


cdef void set_parameter(Parameter* given, cnp.ndarray values) noexcept:
    """A one-dimensional float32 or float64 array, any stride; or None."""
    given.data = NULL
    if values is not None:
        given.data = <const char*> cnp.PyArray_DATA(values)
        given.stride = cnp.PyArray_STRIDES(values)[0]
        given.single = cnp.PyArray_TYPE(values) == cnp.NPY_FLOAT32


cdef void load_parameter(cnp.ndarray values, double* target) noexcept:
    cdef Parameter given
    set_parameter(&given, values)
    read_parameter(&given, 0, cnp.PyArray_DIMS(values)[0], target)


cdef void plan_visits(
    Job* job, cnp.ndarray x, cnp.ndarray dout, cnp.ndarray residual, cnp.ndarray weights,
    cnp.ndarray dresidual, cnp.ndarray out, int axis,
) noexcept:
    """Give the arrays their roles in both visits.  In second order residual and dresidual are ddx
    and ddout, an input and an output of the second visit alone."""
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(x)
    cdef Plan* reduce = &job.reduce
    cdef Plan* apply = &job.apply
    cdef bint second = job.kind == SECOND
    # What came through the gate is read again from dresidual; but not where 16 bits rounded it.
    cdef bint rounded = itemsize == 2 and job.activation != RELU
    cdef cnp.ndarray g = dout if dresidual is None or second or rounded else dresidual
    cdef double least
    cdef int r
    job.gated = job.kind >= BACKWARD and job.activation != IDENTITY
    reduce.gated = job.gated
    apply.gated = job.gated and (dresidual is None or rounded)
    for r in range(N_ROLES):
        set_role(reduce, r, None)
        set_role(apply, r, None)
    set_role(reduce, X, x)
    set_role(reduce, G, dout)
    set_role(reduce, R, residual if reduce.gated else None)
    set_role(reduce, D, None if second else dresidual)
    set_role(reduce, W, weights)
    if job.kind == BACKWARD_FROZEN and not apply.gated:
        set_role(apply, X, g)
    else:
        set_role(apply, X, x)
        set_role(apply, G, g)
    set_role(apply, R, residual if apply.gated or job.kind < BACKWARD or second else None)
    set_role(apply, D, dresidual if second else None)
    set_role(apply, W, weights if job.kind == BACKWARD else None)
    reduce.gate_first = reduce.used[R] or reduce.used[W]
    apply.gate_first = apply.used[R] or apply.used[W] or job.kind == BACKWARD_FROZEN
    set_role(apply, Y, out)
    make_plan(reduce, x, axis, itemsize)
    make_plan(apply, x, axis, itemsize)
    # Half of the mean weight: values that have less make up less than half of the whole, and may
    # hold anything, as under a mask the padding's filler.
    least = job.total / job.count / 2 if job.kind == FORWARD else 0
    if itemsize <= 4:
        choose_sample(reduce, least, <const float*> NULL)
    else:
        choose_sample(reduce, least, <const double*> NULL)
    # An array that is overwritten is read through the buffer, so that kernels may assume that
    # nothing they read is what they write.
    if out is not None:
        for r in range(Y):
            array = residual if r == R else g if r == G or not apply.used[G] else x
            if job.kind < BACKWARD and r == X:
                array = x
            if apply.used[r] and apply.access[r] == DIRECT and overlap(array, out):
                apply.access[r] = COPIED


cdef int execute(
    Job* job, cnp.ndarray x, cnp.ndarray dout, cnp.ndarray out, int axis, int n_threads,
    cnp.ndarray gamma, cnp.ndarray beta, cnp.ndarray residual=None, cnp.ndarray dresidual=None,
    cnp.ndarray weights=None,
) except -1:
    """Plan, allocate, run.  x has at least one element."""
    cdef int r
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(x)
    cdef Py_ssize_t n = cnp.PyArray_DIMS(x)[axis], per_feature, n_values, n_own
    cdef bint sweep, single = itemsize <= 4
    cdef double* values
    cdef char* memory
    set_parameter(&job.gamma_given, gamma)
    set_parameter(&job.beta_given, beta)
    job.n_features = n
    job.count = cnp.PyArray_SIZE(x) // n
    if job.reduces and weights is None:
        job.total = <double> job.count
    plan_visits(job, x, dout, residual, weights, dresidual, out, axis)
    job.has_options = (
        job.gated or residual is not None or weights is not None or dresidual is not None
    )
    choose_tile(job, itemsize, n_threads, &sweep)
    job.width = max(
        widest(&job.reduce, job.tile + job.lead), widest(&job.apply, job.tile + job.lead)
    )
    job.width = (job.width + 7) // 8 * 8
    job.buffer_elements = max(
        <Py_ssize_t> GATHER_ELEMENTS,
        job.width * (1 if job.reduce.along and job.apply.along else TREE_ROWS),
    )
    choose_access(job, sweep, itemsize)
    n_threads = <int> min(
        <Py_ssize_t> n_threads,
        job.n_tiles * (1 if sweep else max(job.reduce.n_chunks, job.apply.n_chunks)),
    )
    job.own_values = sweep and job.n_tiles > 1
    per_feature = N_VALUES
    if job.gated:
        per_feature += N_GATE_VALUES
    if job.reduces:
        per_feature += 4 * job.reduce.n_chunks
    n_own = n_values = 0
    if job.own_values:
        n_own = (per_feature * (job.tile + job.lead) + 7) // 8 * 8
    else:
        n_values = (per_feature * n + 7) // 8 * 8
    job.scratch_bytes = (
        16 * job.width + 3 * job.buffer_elements + n_own
    ) * sizeof(double)
    if job.has_options:
        job.scratch_bytes += (
            N_OPTION_COLUMNS * job.width + 3 * job.buffer_elements
        ) * sizeof(double)
    memory = <char*> malloc(n_values * sizeof(double) + n_threads * job.scratch_bytes + 64)
    if memory == NULL:
        raise MemoryError("bn_fast: no memory for the scratch of this call")
    try:
        values = <double*> ((<size_t> memory + 63) // 64 * 64)
        lay_out(job, values, n, 0)
        job.scratch = <char*> (values + n_values)
        n_threads = bn_startable(n_threads)
        if n_threads <= 1 and cnp.PyArray_SIZE(x) < HELD_SIZE:
            run_typed(job, single, sweep, 1)
        else:
            with nogil:
                run_typed(job, single, sweep, n_threads)
    finally:
        free(memory)
    return 0


cdef bint is_same_buffer(cnp.ndarray a, cnp.ndarray b) noexcept:
    cdef int d
    if cnp.PyArray_DATA(a) != cnp.PyArray_DATA(b):
        return False
    for d in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_STRIDES(a)[d] != cnp.PyArray_STRIDES(b)[d]:
            return False
    return True


def is_same(cnp.ndarray a not None, cnp.ndarray b not None):
    """Whether two arrays are one buffer, element by element."""
    return is_same_buffer(a, b)


cpdef cnp.ndarray running_average(cnp.ndarray old, cnp.ndarray x, int axis):
    """A new array for an average beside x, with the old values (None: zeros): float32 only where
    both old and the parameters of x are."""
    cdef cnp.npy_intp length = cnp.PyArray_DIMS(x)[axis]
    cdef int kind = parameter_type(x)
    cdef cnp.ndarray new
    if old is None:
        return cnp.PyArray_ZEROS(1, &length, kind, 0)
    if cnp.PyArray_TYPE(old) != cnp.NPY_FLOAT32:
        kind = cnp.NPY_FLOAT64
    new = cnp.PyArray_EMPTY(1, &length, kind, 0)
    cnp.PyArray_CopyInto(new, old)
    return new


cdef void set_statistics(Job* job, cnp.ndarray stats) noexcept:
    """mean, the mean's low part, inv_std and var: float64 (4, n_features), contiguous."""
    cdef Py_ssize_t n = cnp.PyArray_DIMS(stats)[1]
    job.mean = <double*> cnp.PyArray_DATA(stats)
    job.mean_low = job.mean + n
    job.inv_std = job.mean + 2 * n
    job.var = job.mean + 3 * n
    job.multiplier = job.inv_std
    job.mean_kept = NULL


cdef void average_in(
    cnp.ndarray average, const char* batch, Py_ssize_t stride, double old, double new,
) noexcept:
    cdef Py_ssize_t f
    cdef double value
    cdef float* narrow = <float*> cnp.PyArray_DATA(average)
    cdef double* values = <double*> cnp.PyArray_DATA(average)
    for f in range(cnp.PyArray_DIMS(average)[0]):
        value = (<const double*> (batch + f * stride))[0]
        if cnp.PyArray_TYPE(average) == cnp.NPY_FLOAT32:
            narrow[f] = <float> (old * narrow[f] + new * value)
        else:
            values[f] = old * values[f] + new * value


def update_average(
    cnp.ndarray average not None, cnp.ndarray batch not None, double old, double new,
):
    """average = old * average + new * batch, in double; average is contiguous, batch float64."""
    average_in(
        average, <char*> cnp.PyArray_DATA(batch), cnp.PyArray_STRIDES(batch)[0], old, new
    )


def are_finite(cnp.ndarray values not None):
    """Of float64, one dimension."""
    cdef Py_ssize_t f, stride = cnp.PyArray_STRIDES(values)[0]
    cdef const char* data = <const char*> cnp.PyArray_DATA(values)
    for f in range(cnp.PyArray_DIMS(values)[0]):
        if not isfinite((<const double*> (data + f * stride))[0]):
            return False
    return True


cdef cnp.ndarray new_statistics(Py_ssize_t n):
    cdef cnp.npy_intp shape[2]
    shape[0] = 4
    shape[1] = n
    return cnp.PyArray_EMPTY(2, shape, cnp.NPY_FLOAT64, 0)


cpdef cnp.ndarray given_statistics(cnp.ndarray mean, cnp.ndarray var, double eps):
    """stats, as `forward` takes and gives them, of a mean and a variance, float32 or float64."""
    cdef Py_ssize_t f, n = cnp.PyArray_DIMS(mean)[0]
    cdef cnp.ndarray stats = new_statistics(n)
    cdef double* value = <double*> cnp.PyArray_DATA(stats)
    load_parameter(mean, value)
    load_parameter(var, value + 3 * n)
    for f in range(n):
        value[n + f] = 0
        value[2 * n + f] = 1 / sqrt(value[3 * n + f] + eps)
    return stats


cdef bint are_statistics(cnp.ndarray stats, Py_ssize_t n) noexcept:
    """Whether C may read them as `forward` does."""
    return (
        cnp.PyArray_NDIM(stats) == 2 and cnp.PyArray_DIMS(stats)[0] == 4
        and cnp.PyArray_DIMS(stats)[1] == n and cnp.PyArray_TYPE(stats) == cnp.NPY_FLOAT64
        and cnp.PyArray_ISCARRAY_RO(stats)
    )


cdef tuple run_forward(
    cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray beta, int axis, double eps, cnp.ndarray out,
    cnp.ndarray stats, int n_threads, int activation, double negative_slope,
    cnp.ndarray residual, cnp.ndarray weights, double total,
):
    cdef Job job
    cdef Py_ssize_t f, n = cnp.PyArray_DIMS(x)[axis]
    job.kind = FORWARD if stats is None else FORWARD_FROZEN
    job.reduces = job.kind == FORWARD
    if out is None:
        out = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    if stats is None:
        stats = new_statistics(n)
    job.applies = True
    job.activation = <Activation> activation
    job.negative_slope = negative_slope
    job.total = total
    job.eps = eps
    job.exact_mean = True
    set_statistics(&job, stats)
    if job.reduces and cnp.PyArray_SIZE(x) == 0:
        for f in range(4 * n):
            job.mean[f] = NAN
    if cnp.PyArray_SIZE(x) > 0:
        execute(
            &job, x, None, out, axis, n_threads, gamma, beta, residual, None, weights
        )
    return out, stats


def forward(
    cnp.ndarray x not None, cnp.ndarray gamma not None, cnp.ndarray beta not None, int axis,
    double eps, cnp.ndarray out, cnp.ndarray stats, int n_threads, int activation=0,
    double negative_slope=0, cnp.ndarray residual=None, cnp.ndarray weights=None, double total=0,
):
    """Normalize x along every axis but one.

    stats: mean, the mean's low part, inv_std and var, float64 (4, n_features), contiguous; None for
    those of the batch, which alone need eps.  activation: a value of `activations`.  residual and
    weights have the shape and dtype of x, and total is the sum of the weights of a feature.
    Returns out (new if None) and stats.
    """
    if stats is not None and not are_statistics(stats, cnp.PyArray_DIMS(x)[axis]):
        raise ValueError("stats must be float64, contiguous and of shape (4, n_features)")
    return run_forward(
        x, gamma, beta, axis, eps, out, stats, n_threads, activation, negative_slope, residual,
        weights, total,
    )


cdef tuple run_backward(
    cnp.ndarray dout, cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray stats, int axis, double eps,
    cnp.ndarray out, bint frozen, bint exact_mean, int n_threads, int activation,
    double negative_slope, cnp.ndarray beta, cnp.ndarray residual, cnp.ndarray weights,
    double total, bint needs_dx, bint needs_sums, bint needs_dresidual,
):
    cdef Job job
    cdef Py_ssize_t n = cnp.PyArray_DIMS(x)[axis]
    cdef cnp.npy_intp length = n
    cdef cnp.ndarray dgamma, dbeta, dresidual = None
    cdef double* sums
    if needs_dresidual:
        dresidual = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    if out is None and needs_dx:
        out = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    # Whatever may fail for want of memory comes before anything is written to out.
    dgamma = cnp.PyArray_EMPTY(1, &length, parameter_type(x), 0)
    dbeta = cnp.PyArray_EMPTY(1, &length, parameter_type(x), 0)
    sums = <double*> calloc(2 * n + 1, sizeof(double))
    if sums == NULL:
        raise MemoryError("bn_fast: no memory for the sums of this call")
    job.kind = BACKWARD_FROZEN if frozen else BACKWARD
    job.reduces = needs_sums or needs_dresidual or (needs_dx and not frozen)
    job.applies = needs_dx
    job.activation = <Activation> activation
    job.negative_slope = negative_slope
    # With weights dout has no shift, and M = 2 no form of its own.
    job.exact_mean = exact_mean and weights is None
    job.eps = eps if weights is None else -1
    job.total = total
    set_statistics(&job, stats)
    job.dgamma = sums
    job.dbeta = job.dgamma + n
    try:
        if cnp.PyArray_SIZE(x) > 0 and (job.reduces or job.applies):
            execute(
                &job, x, dout, out, axis, n_threads, gamma, beta, residual, dresidual, weights
            )
        store_parameter(job.dgamma, dgamma)
        store_parameter(job.dbeta, dbeta)
    finally:
        free(sums)
    return (out, dgamma, dbeta) if dresidual is None else (out, dgamma, dbeta, dresidual)


def backward(
    cnp.ndarray dout not None, cnp.ndarray x not None, cnp.ndarray gamma not None,
    cnp.ndarray stats not None, int axis, double eps, cnp.ndarray out, bint frozen,
    bint exact_mean, int n_threads, int activation=0, double negative_slope=0,
    cnp.ndarray beta=None, cnp.ndarray residual=None, cnp.ndarray weights=None, double total=0,
    bint needs_dx=True, bint needs_sums=True, bint needs_dresidual=False,
):
    """Gradients dx (in out, new if None), dgamma, dbeta from dout and the forward's x and stats;
    and dresidual where it is needed.

    eps: negative where it is not known.  frozen: the statistics were given, so dx = gamma inv_std
    dout.  exact_mean: they are x's own.  beta and what follows: as in forward; beta and residual
    are read only for an activation.  What is not needed is not computed, dgamma and dbeta then
    mean nothing.
    """
    return run_backward(
        dout, x, gamma, stats, axis, eps, out, frozen, exact_mean, n_threads, activation,
        negative_slope, beta, residual, weights, total, needs_dx, needs_sums, needs_dresidual,
    )


cdef void store_parameter(const double* values, cnp.ndarray target) noexcept:
    cdef Py_ssize_t f
    for f in range(cnp.PyArray_DIMS(target)[0]):
        if cnp.PyArray_TYPE(target) == cnp.NPY_FLOAT32:
            (<float*> cnp.PyArray_DATA(target))[f] = <float> values[f]
        else:
            (<double*> cnp.PyArray_DATA(target))[f] = values[f]


include "pieces.pxi"
include "second.pxi"
include "straight.pxi"
