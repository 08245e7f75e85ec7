# reduce and apply over tiles, by threads.  What an operation does stands in its row of the table
# (ops.pxi); of a norm they know the cells and the varying parameters of a job.


# ---------------------------------------------------------------- tiles

cdef inline Py_ssize_t visited_together(
    const Job* job, const Plan* plan, bint applies, bint wide, Py_ssize_t first, Py_ssize_t n,
) noexcept nogil:
    """Of n features: where rows are their own and written, those of the same lanes; where runs are
    walked along one, or some that take turns, of which none has a wide gate."""
    cdef const double* in_wide = job.value[WIDE]
    cdef Py_ssize_t alike = 1
    if plan.layout == ROWS and applies:
        while alike < n and in_wide[first + alike] == in_wide[first]:
            alike += 1
        return alike
    if plan.layout == LONG_RUN:
        n = 1 if wide else min(n, turns_of(plan))
        while n > 1 and plan.gate != NONE and fold_run(job.value[GATE_WIDE] + first, n) != 0:
            n //= 2
    return n


cdef void visit_tile(
    Job* job, bint applies, Py_ssize_t chunk, Py_ssize_t first, Py_ssize_t n_features, bint wide,
    Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """One visit to one chunk of a tile."""
    cdef Visit v
    v.job = job
    v.plan = job.apply if applies else job.reduce
    v.s = s
    v.sum[0] = <double*> s.column[SUM_1]
    v.sum[1] = <double*> s.column[SUM_2]
    v.wide = wide
    v.scales = True
    v.singly = v.stream = False
    v.feature = first
    while v.feature < first + n_features:
        v.n_features = visited_together(
            job, v.plan, applies, wide, v.feature, first + n_features - v.feature
        )
        if applies:
            apply_chunk[lane](&v, chunk, lane_tag)
        else:
            reduce_chunk[lane](&v, chunk, lane_tag)
        v.feature += v.n_features


cdef void reduce_tile(
    Job* job, Py_ssize_t start, Py_ssize_t chunk, Py_ssize_t first, Py_ssize_t n, bint wide,
    Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """The sums of one more chunk of a share that began with chunk `start`."""
    cdef Py_ssize_t slot = start + n_nodes(start, chunk)
    s.sums = job.sums + 4 * slot * job.stride
    visit_tile[lane](job, False, chunk, first, n, wide, s, lane_tag)
    while slot >= start + n_nodes(start, chunk + 1):
        join_nodes(job, slot - 1, slot, first, n)
        slot -= 1


cdef void add_up(
    Job* job, double* sums, Py_ssize_t tile, int n_threads, Py_ssize_t first, Py_ssize_t n,
) noexcept nogil:
    """The sums of each statistic, out of those of n threads."""
    join_shares(job, sums, tile, n_threads, first, n)
    if job.cells > 1 and not job.op.takes_dout:
        share_sums(job, first, n)


cdef inline bint comes_in_rows(const Job* job) noexcept nogil:
    """Whether rows of several pieces are summed one by one, in the order of memory.  (4096, 4096)
    layer norm's forward, one thread, 7.3 to 5.2 ms, (32, 64, 56, 56) instance norm 2.9 and 4.7 to
    1.9 and 3.7; but gamma comes in between: layer norm's backward 14.4 to 15.0 (2026-11-26)."""
    cdef const Plan* plan = job.reduce
    return (
        plan.layout == ROWS and job.schedule.prefetch and not (plan.used[G] and plan.used[S])
        and plan.n_chunks * plan.segment[0].n_rows > 1
    )


cdef void sum_tile(
    Job* job, Py_ssize_t first, Py_ssize_t n, bint wide, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """The sums of all chunks, by one thread."""
    cdef Py_ssize_t chunk, f = first, step = 1 if comes_in_rows(job) else n
    while f < first + n:
        for chunk in range(job.reduce.n_chunks):
            reduce_tile[lane](job, 0, chunk, f, step, wide, s, lane_tag)
        f += step
    add_up(job, job.sums, 0, 1, first, n)


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
    if job.cells > 1 and job.op.takes_dout:
        take_shared(job, first, n)
    if job.reduce.gate != NONE:
        set_in_lanes[lane](
            job, <SetConstants> set_gate_constants[lane], GATE_SHIFT, first, n, lane_tag
        )
    job.op.start(job, first, n, lane_tag)


cdef void settle_tile(
    Job* job, Py_ssize_t first, Py_ssize_t n, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """Settle the sums of the tile's features, again in wide lanes where needed."""
    cdef double* retry = job.value[RETRY]
    cdef Py_ssize_t f, end = first + n
    cdef double unsettled = job.op.settle(job, first, n, True)
    cdef int attempt
    for attempt in range(3):
        if unsettled == 0:
            break
        f = next_marked(retry, first, end)
        while f < end:
            job.op.retry(job, f, lane_tag)
            f = next_marked(retry, f + 1, end)
        sum_tile[double](job, first, n, True, s, NULL)
        unsettled = 0
        f = next_marked(retry, first, end)
        while f < end:
            unsettled += job.op.settle(job, f, 1, False)
            f = next_marked(retry, f + 1, end)


cdef void sum_deviations(
    const Job* shared, Py_ssize_t first, Py_ssize_t n, Scratch* s,
) noexcept nogil:
    """The sums of x - mean of the tile's cells, in wide lanes, in place of what has been settled.
    """
    cdef Job job = shared[0]
    cdef Plan alone = job.reduce[0]
    cdef Py_ssize_t f
    alone.used[G] = False
    job.reduce = &alone
    for f in range(first, first + n):
        job.value[SHIFT_X][f] = job.value[MEAN][f]
        if alone.storage == FLOAT64:
            job.value[FACTOR_X][f] = wide_factor(job.value[MEAN][f], job.value[INV_STD][f])
        else:
            job.value[FACTOR_X][f] = 1
    sum_tile[double](&job, first, n, True, s, NULL)


cdef void settle_cells(
    Job* job, Py_ssize_t first, Py_ssize_t n, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """What features that share their statistics have in common."""
    cdef Py_ssize_t start = first, shifted
    if not job.op.takes_dout:
        give_shared(job, first, n)
        return
    while start < first + n:  # run after run of groups
        shifted = 0
        while start + shifted < first + n and are_shifted(job, start + shifted, job.cells):
            shifted += job.cells
        if shifted:
            sum_deviations(job, start, shifted, s)
        start += shifted + job.cells
    read_parameter(&job.gamma_given, first, n, job.value[GAMMA] + first)
    share_gradients[lane](job, first, n, lane_tag)


cdef void finish_tile(
    Job* job, Py_ssize_t first, Py_ssize_t n, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """What comes between the visits to the tile's features: sums are settled, constants are set."""
    if job.reduces:
        settle_tile[lane](job, first, n, s, lane_tag)
        if job.cells > 1:
            settle_cells[lane](job, first, n, s, lane_tag)
        store_gradients(job, first, n)
    if job.applies or job.varying.unit:
        set_in_lanes[lane](job, job.op.set_constants, SHIFT_X, first, n, lane_tag)


# ---------------------------------------------------------------- threads
#
# A tile of features is summed, finished and applied by one thread while it is in cache ("swept").
# Where a tile cannot fit, or tiles are fewer than threads, the rows' chunks are shared out: all
# sums, then the finish, then all output in reverse (the tail is still in cache).  Both ways add the
# same numbers in the same order: a column's rows in blocks, the block's columns folded to features
# by halves, blocks added to their chunk and chunks to the total with the rounding errors kept.  All
# chunks share one shift, so partial sums simply add.

cdef void prefetch_sample(const Job* job, Py_ssize_t tile) noexcept nogil:
    """What the shifts of a tile of rows will come from: three lines of each, out of order."""
    cdef const Plan* plan = job.reduce
    cdef Py_ssize_t first, n, f
    cdef int k, role = G if plan.used[G] else X
    cdef char* start
    tile_range(&job.schedule, job.apply, tile, &first, &n)
    for k in range(3):
        start = value_at(plan, role, first, &plan.sample[k])
        for f in range(n):
            bn_prefetch(start + f * plan.feature_stride[role], 1)


cdef void sweep_tiles(
    Job* job, Py_ssize_t tile, Py_ssize_t end, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """Tiles tile .. end - 1 from their first visit to their last."""
    cdef Job own
    cdef Py_ssize_t first, n, chunk
    if job.own_features:
        own = job[0]
        job = &own
    for tile in range(tile, end):
        tile_range(&job.schedule, job.apply, tile, &first, &n)
        if job.own_features:
            lay_out(job, s.values, job.own_features, first)
        if job.varying.unit:
            enter_fold(job, first, s)
        if job.reduces or job.reduce.gate != NONE:
            start_tile[lane](job, first, n, lane_tag)
        if job.reduces:
            sum_tile[lane](job, first, n, False, s, lane_tag)
        finish_tile[lane](job, first, n, s, lane_tag)
        if job.varying.unit:
            sum_parameters[lane](job, first, n, s, lane_tag)
        # (65536, 128), one thread: forward 6.4 to 5.8 ms, backward 8.9 to 8.2.
        if job.schedule.prefetch and job.reduce.layout == ROWS and tile + 1 < end:
            prefetch_sample(job, tile + 1)
        if job.applies:
            for chunk in range(job.apply.n_chunks - 1, -1, -1):
                apply_tile[lane](job, chunk, first, n, s, lane_tag)
        if job.varying.unit:
            leave_fold(job, first, n, s)


cdef void visit_chunks(
    Job* job, bint applies, int thread, int n_threads, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """One visit to a thread's share of the chunks of tiles; the tiles of a row follow one another.
    The second visit is in reverse, as the tail of what a thread summed is still in its cache."""
    cdef Py_ssize_t n_tiles = job.schedule.n_tiles, first, n, index, turn
    cdef Py_ssize_t n_tasks = n_tiles * (job.apply.n_chunks if applies else job.reduce.n_chunks)
    cdef Py_ssize_t start = thread * n_tasks // n_threads
    cdef Py_ssize_t end = (thread + 1) * n_tasks // n_threads, tile
    for turn in range(end - start):
        index = end - 1 - turn if applies else start + turn
        tile = index % n_tiles
        tile_range(&job.schedule, job.apply, tile, &first, &n)
        if applies:
            apply_tile[lane](job, index // n_tiles, first, n, s, lane_tag)
        else:
            reduce_tile[lane](
                job, share_start(n_tasks, thread, n_threads, tile, n_tiles), index // n_tiles,
                first, n, False, s, lane_tag,
            )


cdef void visit_features(
    Job* job, double* sums, int n_summing, int thread, int n_threads, Scratch* s,
    const lane* lane_tag,
) noexcept nogil:
    """What comes before the first visit, or after it, when n threads have summed, feature by
    feature: a thread's share of each tile."""
    cdef Py_ssize_t tile, first, n, share, start, turn = 0
    for tile in range(job.schedule.n_tiles):
        tile_range(&job.schedule, job.apply, tile, &first, &n)
        share = max(<Py_ssize_t> SHARE_FEATURES, (n + n_threads - 1) // n_threads)
        share = (share + job.cells - 1) // job.cells * job.cells
        start = (thread + turn) % n_threads * share
        turn += n_threads - (n + share - 1) // share  # the next tile's begin where these end
        if start >= n:
            continue
        share = min(share, n - start)
        if n_summing and job.reduces:
            add_up(job, sums, tile, n_summing, first + start, share)
        if n_summing:
            finish_tile[lane](job, first + start, share, s, lane_tag)
        else:
            start_tile[lane](job, first + start, share, lane_tag)


cdef void lay_out_apart(Job* job, double* values, bint first) noexcept nogil:
    """Arrays per feature of one thread's own; the first one's results are the call's."""
    cdef int i, result
    for i in range(job.op.n_results):
        result = job.op.results[i]
        if job.given[result] and job.reduces and not first:
            job.value[result] = values
            values += job.own_features
    if not first:
        job.rounded[0] = job.rounded[1] = NULL
    if not (first or job.op.takes_dout):
        job.shared = NULL
    lay_out(job, values, job.own_features, 0)


cdef long long share_rows(
    Job* job, int thread, int n_threads, long long since, Scratch* s, const lane* lane_tag,
) noexcept nogil:
    """Rows are shared out, and so is what is done once a feature, with a barrier after each step;
    or every thread does that for itself, but for its chunks' sums ("apart"): one barrier.  Returns
    when the work after the last one began."""
    cdef Job own
    cdef double* sums = job.sums
    cdef double* own_sums
    cdef bint apart = job.schedule.apart
    cdef int who = 0 if apart else thread, n_sharing = 1 if apart else n_threads
    if apart:
        own = job[0]
        job = &own
        lay_out_apart(job, s.values, thread == 0)
        own_sums = job.sums
        job.sums = sums
    if job.reduces or job.reduce.gate != NONE:
        visit_features[lane](job, NULL, 0, who, n_sharing, s, lane_tag)
        bn_barrier(n_sharing, &since)
    if job.reduces:
        visit_chunks[lane](job, False, thread, n_threads, s, lane_tag)
        bn_barrier(n_threads, &since)
    if job.reduces and apart:
        job.sums = own_sums
    if apart and thread and not job.applies:  # one writes what the call has brought for the means
        return since
    visit_features[lane](job, sums, n_threads, who, n_sharing, s, lane_tag)
    if job.applies:
        bn_barrier(n_sharing, &since)
        visit_chunks[lane](job, True, thread, n_threads, s, lane_tag)
    return since


cdef void run_share(Job* job, int thread, int n_threads, const lane* lane_tag) noexcept nogil:
    """What one of n threads does of a call."""
    cdef Scratch s
    cdef long long since = bn_now() if n_threads > 1 else 0
    cdef Py_ssize_t tiles = job.schedule.n_tiles, together = job.schedule.together
    cdef Py_ssize_t shares = (tiles + together - 1) // together
    share_scratch(job, job.scratch + thread * job.scratch_bytes, &s)
    if job.schedule.sweep:
        sweep_tiles[lane](
            job, thread * shares // n_threads * together,
            min(tiles, (thread + 1) * shares // n_threads * together), &s, lane_tag,
        )
    else:
        since = share_rows[lane](job, thread, n_threads, since, &s, lane_tag)
    if job.schedule.stream or job.schedule.stream_gradient:
        bn_stream_end()
    if thread == 0 and n_threads > 1:
        job.done_at = bn_now()
        job.worked = job.done_at - since


cdef void run_job(Job* job, const lane* lane_tag) noexcept nogil:
    """One parallel region a call, its phases apart by barriers: with a region for each (256, 512)
    took 21.9 and 33.6 us on two threads, so 20.2 and 30.8."""
    if job.schedule.n_threads <= 1:
        run_share[lane](job, 0, 1, lane_tag)
        return
    with parallel(num_threads=job.schedule.n_threads):
        run_share[lane](job, threadid(), bn_team(), lane_tag)
    bn_note_wait(job.worked, bn_now() - job.done_at)


cdef void run_natively(Job* job) noexcept nogil:
    if job.reduce.storage == FLOAT64:
        run_job[double](job, NULL)
    else:
        run_job[float](job, NULL)
