# Schedule: tuned numbers that cannot change a bit (the kernels' own are STRIP and AHEAD_ALONG), and
# what follows from them: how wide tiles are, which threads do what, what is prefetched, what goes
# past the caches.  Measured on a Zen 4 virtual machine with 32 KiB, 1 MiB and 32 MiB of caches
# (2026-11), in shares of which the numbers are given where that is what they mean; another
# machine's are asked once, at import.

cdef extern from "_native.h" nogil:
    void bn_ask_caches(Py_ssize_t* level)  # bytes of one CPU's L1 and L2 and of L3

cdef Py_ssize_t[3] cache
bn_ask_caches(cache)


def set_caches(Py_ssize_t l1, Py_ssize_t l2, Py_ssize_t l3):
    """For tests: schedule as on a machine with caches of so many bytes.  Returns what there was."""
    old = cache[0], cache[1], cache[2]
    cache[0], cache[1], cache[2] = l1, l2, l3
    return old


cdef inline Py_ssize_t sweep_bytes() noexcept nogil:
    """A tile between its two visits.  Wide tiles beat tiles that fit L2: (1024, 4096) forward, one
    thread: 2.9 ms with 0.5 MiB, 2.4 with 1 MiB, 2.0 with 4 MiB, and 3.4 with 0.5 MiB packed on the
    first visit."""
    return cache[2] // 8


cdef inline Py_ssize_t rows_bytes() noexcept nogil:
    """Rows between their two visits."""
    return cache[1] // 2


cdef inline Py_ssize_t run_sweep_bytes() noexcept nogil:
    return cache[2] // 4


cdef inline Py_ssize_t split_to() noexcept nogil:
    """From SPLIT_FROM to here threads share rows rather than features: (256, 512) forward, two
    threads: 41 us as tiles of 256 features, 25 as chunks of rows."""
    return 2 * cache[2]


cdef inline Py_ssize_t stream_bytes() noexcept nogil:
    """All arrays of a call: what does not fit L3 together goes past it.  (32768, 128) forward, 34
    MB, 1.90 to 0.98 ms, (16, 64, 56, 56) backward, 39 MB, 1.13 to 0.81; but its forward, 26 MB,
    0.47 to 0.50."""
    return cache[2] // 8 * 7


cdef inline Py_ssize_t single_bytes() noexcept nogil:
    """All arrays of a call, from which on rows of whole vectors, or whole and a half, are written
    one by one: (256, 10, 100) backward, two threads, 3 MB, 58.4 us by fours, 52.9 by ones; but
    (1000, 333) 76 and 81; (256, 512) forward, one thread, 1 MB, 28.5 and 30.4."""
    return cache[1] // 2 * 3


cdef inline Py_ssize_t prefetch_bytes(Storage storage) noexcept nogil:
    """All arrays of a call: from L3 the hardware alone is as fast, but where rows are widened.  Two
    threads: (20000, 60) 135 and 219 us, so 125 and 202, (3136, 512) 186 and 350, 168 and 316; but
    (12544, 160) backward, 24 MB, 490 us and 519 without it, (16, 64, 56, 56) forward, 26 MB, 633
    and 691, (5000, 512) in float16, 10 and 15 MB, 490 and 1019, 500 and 1070."""
    return cache[2] // 4 if is_half(storage) else cache[2] // 8 * 5


cdef inline Py_ssize_t prefetch_output_bytes() noexcept nogil:
    """Forward's output begins a run as if it had never been seen: (16, 64, 56, 56) 0.70 to 0.63 ms
    with the next run of it prefetched, (4, 33, 17, 40, 40) 0.85 to 0.75; but (8, 3, 224, 224), 5
    MB, 0.121 to 0.126, and backward, with more to read, gains nothing.  What goes through the
    buffer is asked for before the rows are read: (32, 64, 56, 56) in float16 on one thread 3.4 to
    2.9 ms."""
    return cache[2] // 4


cdef enum:
    GATHER_ELEMENTS = 2048    # a gathered group of rows stays in L1,
    GATHER_COLUMNS = 256      # not wide: its sums are taken up and laid down each time, see below
    MAX_TURNS = 64            # features whose long runs are taken in turn, see are_runs_short,
    AHEAD_BYTES = 16384       # how far ahead rows are prefetched,
    AHEAD_ROWS = 64           # but no more than these and no less than a tree;
    AHEAD_HALVES = 24         # a half type's rows,
    AHEAD_RUNS = 2            # a half type's pieces of runs, and a residual's, see below
    STREAM_ROW = 1024         # bytes of a row that goes past the caches, broken lines or not, and
    STRETCH = 256             # columns of x, dout and gamma so at a time, see rows_stream
    TILE_BYTES = 512          # a row of a tile: narrower ones come in too slowly, see below
    SPLIT_FROM = 256 * 1024
    SHARE_FEATURES = 64       # fewer are not worth another thread between the visits,
    APART_SUMS = 1 << 14      # and so few sums (features times chunks) not worth two more barriers
    HELD_SIZE = 1 << 14       # elements below which the GIL is not worth handing on

# Of 128 columns, the ends of rows tell: float16 (1000, 256) on two threads 88 and 147 us, of 256
# 79 and 122; every other column of float32 73 and 135, 68 and 127 (AMD EPYC, Zen 4, 2026-11-26).
#
# A narrow tile is worse than reading x twice: (16384, 1024) backward, two threads: 22 ms with tiles
# of 128 bytes, 16 as chunks of rows; and these are best as whole rows, up to MAX_COLUMNS where no
# buffer has to hold them: (50000, 600), two threads, 0.41 to 0.35 and 0.70 to 0.60 ns an element.
# So it is for runs of which a thread has less than PAGE_BYTES side by side: (256, 10, 100) forward
# 72 us as tiles, 36 as chunks.
#
# A residual is met in the second visit, which the hardware's prefetchers do not follow, and runs of
# 16 bits are too short for them: (32, 64, 56, 56) with a residual, forward, 3.0 to 2.8 ms, in
# bfloat16 2.0 to 1.65, backward 3.4 to 2.45.  (float32's in both visits: backward 10 % lost.)

cdef struct Schedule:
    bint sweep                # tiles go from their first visit to their last, one by one
    Py_ssize_t tile           # features a tile; the first has `lead` more
    Py_ssize_t lead
    Py_ssize_t n_tiles
    Py_ssize_t together       # tiles that one thread takes
    int n_threads
    bint stream               # the output goes past the caches
    bint stream_gradient      # so does that of the residual
    bint prefetch             # on the first visit
    bint prefetch_again       # and on the second, as the tile is not in cache
    bint singly               # the output is written row by row
    bint apart                # threads settle all features for themselves, see share_rows
    bint prefetch_output      # on the second, of runs and where rows come through the buffer

cdef struct Work:             # what a schedule is made for
    Plan* reduce
    Plan* apply
    Py_ssize_t n_features
    Py_ssize_t feature_bytes  # of one array
    int n_inputs              # of the first visit
    Py_ssize_t unit           # features that one thread takes, 0: any
    Py_ssize_t cells          # of which a tile has all that share a statistic
    bint untouched            # an output's pages are yet to be made


cdef inline Py_ssize_t turns_of(const Plan* plan) noexcept nogil:
    """How many features' long runs are taken in turn, in the order of memory; of those that come
    through a buffer no more than it holds."""
    cdef bint direct = (not is_half(plan.storage) or plan.as_stored) and plan.gate != BEFORE
    cdef int r
    if plan.layout != LONG_RUN or plan.used[W]:
        return 1
    for r in range(W):
        direct = direct and (
            not plan.used[r] or plan.access[r] == DIRECT or plan.access[r] == STREAMED
        )
    if direct:
        return MAX_TURNS
    return max(1, min(<Py_ssize_t> MAX_TURNS, GATHER_ELEMENTS // plan.segment[0].n_run))


cdef inline bint are_runs_short(const Plan* plan) noexcept nogil:
    """Whether runs come in as one stream, which is worth more than a tile in L2: of less than a
    page, where features can take turns.  (64, 128, 28, 28), two threads, 1.81 and 2.62 ms, so 1.49
    and 2.56; but (32, 64, 56, 56), of which one feature fills L2, 2.42 to 2.67 ms backward.  Within
    L3 the more the better: (32, 256, 14, 14) backward's sums in C, one thread, 320 us by 8 features
    in turn, 300 by 16, 260 by 32, 230 by 64; (32, 64, 28, 28) 319 and 645 us by 15, 273 and 516.
    """
    cdef Py_ssize_t run_bytes = plan.segment[0].n_run * size_of(plan.storage)
    return plan.layout != LONG_RUN or (turns_of(plan) > 1 and run_bytes < PAGE_BYTES)


cdef inline Py_ssize_t along_sweep_bytes(const Plan* plan, bint far) noexcept nogil:
    """Long runs: small features share what a tile costs."""
    if not are_runs_short(plan) or (far and turns_of(plan) < MAX_TURNS):
        return cache[1] // 4
    return cache[1] // 2 * 3 if far else cache[2] // 4


cdef Py_ssize_t columns_to_line(const Plan* plan) noexcept:
    """Columns before the output's first cache line, if every row has them.

    Tiles begin there.  Two threads that write to one line, once a row, cost (128, 256) on two
    threads 20 us of 29.
    """
    cdef const Segment* main = &plan.segment[0]
    cdef Py_ssize_t size = size_of(plan.storage)
    cdef int d
    for d in range(main.n_dims):
        if main.stride[d][Y] % 64:
            return 0
    if not plan.used[Y] or plan.access[Y] == GATHERED or (<size_t> plan.base[Y]) % size:
        return 0
    return (64 - (<size_t> plan.base[Y]) % 64) % 64 // size


cdef inline Py_ssize_t even_part(Py_ssize_t n, Py_ssize_t limit, Py_ssize_t step) noexcept:
    """n in as few equal parts, multiples of `step`, as `limit` allows; 0 if it allows none."""
    cdef Py_ssize_t parts
    limit = limit // step * step
    if limit == 0:
        return 0
    parts = (n + limit - 1) // limit
    return ((n + parts - 1) // parts + step - 1) // step * step


cdef Py_ssize_t run_tile(const Plan* plan, Py_ssize_t n, Py_ssize_t limit) noexcept:
    """Tiles of equal size; where there are many, of whole vectors, as what is left of a row costs
    as much as some of these: (16, 512, 7, 7) forward 115 us in tiles of 21 features, 99 of 16; and
    two threads would write to lines that they have in common."""
    cdef Py_ssize_t whole = LANES // gcd(plan.segment[0].n_run, LANES)
    if are_runs_short(plan) and whole <= limit and n >= 4 * whole:
        return even_part(n - whole // 2, limit, whole)
    return even_part(n, limit, 1)


cdef inline Py_ssize_t shared_tile(
    const Schedule* schedule, const Work* work, Py_ssize_t n_run,
) noexcept:
    """Features a tile at most, so that threads that share rows all have some, be chunks fewer than
    they: (1000, 333) on eight threads 75 and 92 us, so 57 and 60 (Intel with 2 MiB of L2, 16 cores,
    2026-11-26)."""
    cdef Py_ssize_t chunks = work.reduce.n_chunks, n_threads = schedule.n_threads
    cdef Py_ssize_t parts = (n_threads + chunks - 1) // chunks
    cdef Py_ssize_t narrowest = TILE_BYTES // (n_run * size_of(work.apply.storage))
    return max(narrowest, (work.n_features + parts - 1) // parts, <Py_ssize_t> 1)


cdef void choose_run_tile(
    Schedule* schedule, const Work* work, Py_ssize_t limit, Py_ssize_t share,
) noexcept:
    """Tiles of features whose runs lie side by side, or of some features with long runs."""
    cdef const Plan* apply = work.apply
    cdef Py_ssize_t bytes = work.feature_bytes * work.n_inputs
    cdef int n_threads = schedule.n_threads
    cdef Py_ssize_t sweep = run_sweep_bytes()
    if apply.layout == LONG_RUN:
        sweep = max(bytes, along_sweep_bytes(apply, schedule.prefetch))
    schedule.tile = run_tile(apply, share, min(limit, sweep // bytes))
    # Else, as with three features for two threads, one of them would wait too long; or all of
    # them would have pages in common, every few of one's runs beside those of another.
    schedule.sweep = schedule.tile > 0 and 5 * work.n_features >= 4 * share * n_threads and (
        n_threads <= 1 or work.reduce.n_chunks < n_threads
        or share * apply.segment[0].n_run * size_of(apply.storage) >= PAGE_BYTES
    )
    if not schedule.sweep:
        limit = limit if are_runs_short(apply) else 1
        if apply.layout == RUNS:
            limit = min(limit, shared_tile(schedule, work, apply.segment[0].n_run))
        schedule.tile = run_tile(apply, work.n_features, limit)


cdef void choose_column_tile(
    Schedule* schedule, const Work* work, Py_ssize_t limit, Py_ssize_t share,
) noexcept:
    """Several tiles, from one cache line of the output to another; or all features as one."""
    cdef const Plan* reduce = work.reduce
    cdef const Plan* apply = work.apply
    cdef Py_ssize_t size = size_of(apply.storage), line = 64 // size
    cdef Py_ssize_t bytes = work.feature_bytes * work.n_inputs
    cdef Py_ssize_t narrow = min(limit, <Py_ssize_t> TILE_COLUMNS)
    cdef int n_threads = schedule.n_threads
    cdef Py_ssize_t lead = columns_to_line(apply), shared = shared_tile(schedule, work, 1)
    schedule.lead = lead
    if reduce.used[W] or apply.used[W] or reduce.gate != NONE:
        limit = narrow
    schedule.tile = even_part(share, min(narrow - line, sweep_bytes() // bytes), line)
    schedule.sweep = schedule.tile > 0 and work.n_features > schedule.tile * (n_threads - 1) and (
        bytes * work.n_features < SPLIT_FROM
        or (
            schedule.tile * size >= TILE_BYTES
            and (
                n_threads <= 1 or reduce.n_chunks < n_threads
                or bytes * work.n_features > split_to()
            )
        )
    )
    if work.n_features <= (limit if not schedule.sweep else narrow if n_threads <= 1 else 0):
        schedule.lead = 0
        schedule.tile = work.n_features
        schedule.sweep = n_threads <= 1 and bytes * schedule.tile <= sweep_bytes()
    elif not schedule.sweep:
        schedule.tile = limit - line
    if not schedule.sweep and shared < schedule.tile:
        schedule.tile = even_part(work.n_features, shared, line)
        schedule.lead = lead


cdef void choose_norm_tile(
    Schedule* schedule, const Work* work, Py_ssize_t limit,
) noexcept:
    """Rows that stay near, or columns, within each turn of the axes around them; powers of two,
    which divide a unit."""
    cdef const Plan* plan = work.apply
    cdef Py_ssize_t bytes = work.feature_bytes * work.n_inputs
    cdef Py_ssize_t tile = 4 if plan.layout == ROWS else TREE_COLUMNS
    cdef Py_ssize_t largest = FOLD_ROWS if plan.layout == ROWS else FOLD_COLUMNS
    cdef Py_ssize_t near = rows_bytes() if plan.layout == ROWS else sweep_bytes()
    if plan.layout == ROWS and not work.unit:  # nothing is folded: (16, 512, 7, 7) instance norm,
        largest = BLOCK_ROWS  # one thread, 217 and 303 us by FOLD_ROWS, 204 and 281 (2026-11-26)
    if plan.layout != ROWS and plan.access[X] == GATHERED:
        # All values of a feature in one group, which are taken apart and joined as one: (65536, 8)
        # forward, one thread, 945 to 706 us.
        largest = min(largest, GATHER_ELEMENTS // plan.segment[0].n_rows)
    while 2 * tile <= largest and 2 * tile * bytes <= near:
        tile *= 2
    schedule.tile = min(min(tile, limit), plan.n_features)
    schedule.tile = max(work.cells, schedule.tile // work.cells * work.cells)
    schedule.sweep = True
    if not plan.used[S] and plan.layout != ROWS and schedule.n_threads > 1:
        schedule.sweep = work.n_features // schedule.tile >= 2 * schedule.n_threads


cdef inline Py_ssize_t bytes_of_call(const Work* work) noexcept:
    cdef Py_ssize_t n_arrays = 0
    cdef int r
    for r in range(W):
        n_arrays += work.reduce.used[r] or work.apply.used[r]
    return n_arrays * work.feature_bytes * work.n_features


cdef void choose_tile(Schedule* schedule, const Work* work) noexcept:
    cdef Py_ssize_t turns = work.n_features // work.apply.n_features
    cdef Py_ssize_t limit = min(work.reduce.max_tile, work.apply.max_tile)
    cdef int n_threads = schedule.n_threads
    cdef Py_ssize_t share = (work.n_features + n_threads - 1) // n_threads  # of a thread
    schedule.prefetch = bytes_of_call(work) >= prefetch_bytes(work.apply.storage)
    schedule.lead = 0
    if work.reduce.layout == JOINED or work.apply.layout == JOINED:
        schedule.tile = work.apply.n_features
        schedule.sweep = n_threads <= turns and (
            work.feature_bytes * work.n_inputs * schedule.tile <= sweep_bytes()
        )
    elif work.apply.by_row or (turns > 1 and work.apply.layout == FEATURES):
        choose_norm_tile(schedule, work, limit)
    elif work.apply.layout == FEATURES:
        choose_column_tile(schedule, work, limit, share)
    else:
        choose_run_tile(schedule, work, limit, share)
    schedule.n_tiles = turns * max(
        <Py_ssize_t> 1,
        (work.apply.n_features - schedule.lead + schedule.tile - 1) // schedule.tile,
    )
    schedule.together = 1
    if work.unit:
        schedule.together = work.unit // (
            schedule.tile if turns == 1 else work.apply.n_features
        ) * (1 if turns == 1 else schedule.n_tiles // turns)
    schedule.n_threads = <int> min(
        <Py_ssize_t> n_threads,
        (schedule.n_tiles + schedule.together - 1) // schedule.together * (
            1 if schedule.sweep else max(work.reduce.n_chunks, work.apply.n_chunks)
        ),
    )


cdef inline bint settles_apart(const Schedule* schedule, const Work* work) noexcept:
    """Whether every thread does what is done once a feature, of all features, with one barrier:
    (256, 512) on two threads 55 and 84 us with three barriers, 45 and 66 with one, where they
    were slow (AMD EPYC, 2026-11-26); (4096, 33) 23.4 and 35.3, 22.2 and 32.7."""
    cdef Py_ssize_t chunks = work.reduce.n_chunks
    return (
        not schedule.sweep and schedule.n_threads > 1
        and work.n_features * (chunks + 8) <= APART_SUMS
    )


cdef void choose_detours(Schedule* schedule, const Work* work) noexcept:
    """Detours around the caches that pay for large arrays."""
    cdef Py_ssize_t bytes = bytes_of_call(work)
    cdef Plan* apply = work.apply
    cdef int r
    # A page is cleared when it is first written to, and then is in the caches: (65536, 128) forward
    # into new pages, one thread, 6.5 to 5.1 ms of its time (Intel with 2 MiB of L2).
    schedule.stream = BN_STREAMS and not work.untouched and bytes >= stream_bytes()
    schedule.stream_gradient = schedule.stream and work.reduce.used[D] and not schedule.sweep
    schedule.prefetch_again = schedule.prefetch and not schedule.sweep
    schedule.singly = bytes > single_bytes()
    schedule.prefetch_output = (
        work.feature_bytes * work.n_features >= prefetch_output_bytes()
    )
    for r in range(Y, W):
        if schedule.stream and apply.used[r] and apply.access[r] != GATHERED:
            apply.access[r] = STREAMED


cdef inline void tile_range(
    const Schedule* schedule, const Plan* plan, Py_ssize_t tile, Py_ssize_t* first,
    Py_ssize_t* n_features,
) noexcept nogil:
    """Tiles end where a turn of the axes around the plan's features does."""
    cdef Py_ssize_t total = plan.n_features, turn = 0, tiles
    if plan.n_outer:
        tiles = (total + schedule.tile - 1) // schedule.tile
        turn = tile // tiles * total
        tile = tile % tiles
    first[0] = tile * schedule.tile + (schedule.lead if tile else 0)
    n_features[0] = min(schedule.tile + (0 if tile else schedule.lead), total - first[0])
    first[0] += turn


cdef inline Py_ssize_t rows_ahead(Py_ssize_t row_bytes, Py_ssize_t tree) noexcept nogil:
    """At least those of the next tree."""
    return max(
        tree, min(<Py_ssize_t> AHEAD_ROWS, AHEAD_BYTES // row_bytes // TREE_ROWS * TREE_ROWS),
    )


cdef inline bint reads_ahead_along(
    const Schedule* schedule, const Plan* plan, Py_ssize_t width,
) noexcept nogil:
    """Whether sums along runs prefetch what comes next of them; of rows only along long ones of x,
    dout and gamma: (4096, 4096) layer norm's backward, one thread, 16.5 to 13.8 ms, but (8192,
    1024) 5.8 to 7.2."""
    cdef bint long_row = (
        plan.layout == ROWS and plan.used[S] and plan.used[G]
        and width * size_of(plan.storage) >= 2 * PAGE_BYTES
    )
    return schedule.prefetch and (plan.layout == LONG_RUN or long_row)


cdef inline bint weighs_in_kernel(const Plan* plan) noexcept nogil:
    """Whether sums of x alone multiply each row by its one weight, not on the way to the kernel:
    (256, 512) forward with weights, two threads, 50 to 41 us."""
    return (
        plan.used[W] and not (plan.used[G] or plan.used[Y]) and plan.layout != JOINED
        and plan.feature_stride[W] == 0 and plan.segment[0].run_stride[W] == 0
    )


cdef bint rows_stream(const Plan* plan) noexcept nogil:
    """Whether rows of their own go past the caches one by one, as they are made: (8192, 1024) layer
    norm's forward, one thread, 2.8 to 2.5 ms, (32, 64, 56, 56) instance norm's backward 4.3 to 3.1.
    Whole lines do, and rows long enough; but of x, dout and gamma rows of 6000 bytes, which break
    lines, 8.0 to 9.1 ms; and a stretch of columns at a time, (8192, 1024) layer norm's backward,
    one thread, 5.4 to 5.0 ms (AMD EPYC, Zen 4, 2026-11-26)."""
    cdef const Segment* main = &plan.segment[0]
    cdef Py_ssize_t row_bytes = main.n_run * size_of(plan.storage)
    cdef Py_ssize_t steps = plan.feature_stride[Y] | row_bytes
    cdef int d
    for d in range(main.n_dims):
        steps |= main.stride[d][Y]
    for d in range(plan.n_outer):
        steps |= plan.outer_stride[d][Y]
    if steps % LINE_BYTES:
        return row_bytes >= STREAM_ROW and not (plan.used[G] and plan.used[S])
    return row_bytes >= STREAM_ROW or <Py_ssize_t> plan.base[Y] % LINE_BYTES == 0


cdef inline bint streams_rows(const Plan* plan, const Access* access) noexcept nogil:
    """Whether the kernels themselves write the output past the caches."""
    return (
        access[Y] == STREAMED and (not is_half(plan.storage) or plan.as_stored)
        and not plan.used[D]
        and (plan.layout != ROWS or rows_stream(plan))
    )


cdef Py_ssize_t group_rows(
    const Plan* plan, const Access* access, Py_ssize_t width, Py_ssize_t step, bint gate_before,
) noexcept nogil:
    """Rows taken at a time: a whole block, or what fits the buffers in multiples of `step`."""
    cdef bint direct = not (
        gate_before or (plan.used[W] and not weighs_in_kernel(plan))
        or (plan.used[S] and plan.used[G] and plan.layout != ROWS)
    )
    cdef int r
    for r in range(W):
        direct = direct and (
            access[r] == DIRECT or (r == Y and streams_rows(plan, access))
        )
    if direct:
        return BLOCK_ROWS if plan.layout == ROWS else min(plan.block_rows, <Py_ssize_t> BLOCK_ROWS)
    if plan.layout == LONG_RUN or plan.layout == ROWS:
        step = 1
    return max(step, min(<Py_ssize_t> BLOCK_ROWS, GATHER_ELEMENTS // width // step * step))


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
    "CHUNK_ELEMENTS": CHUNK_ELEMENTS,
    "FAR_BYTES": FAR_BYTES,
    "APART_SUMS": APART_SUMS,
    "JOIN_COLUMNS": JOIN_COLUMNS,
    "SHORT_COLUMNS": SHORT_COLUMNS,
    "JOIN_ROWS": JOIN_ROWS,
    "NARROW": NARROW,
    "ALONG_RUN": ALONG_RUN,
    "ALONG_WEIGHED": ALONG_WEIGHED,
    "SHORT_RUN": SHORT_RUN,
    "SHORT_ROWS": SHORT_ROWS,
    "PIECE": PIECE,
    "BLOCK_ELEMENTS": BLOCK_ELEMENTS,
    "BLOCK_SHARE": BLOCK_SHARE,
    "GATHER_ELEMENTS": GATHER_ELEMENTS,
    "GATHER_COLUMNS": GATHER_COLUMNS,
    "AHEAD_ROWS": AHEAD_ROWS,
    "SWEEP_BYTES": sweep_bytes(),
    "TILE_COLUMNS": TILE_COLUMNS,
    "TILE_BYTES": TILE_BYTES,
    "SPLIT_FROM": SPLIT_FROM,
    "SPLIT_TO": split_to(),
    "MAX_TURNS": MAX_TURNS,
    "RUN_SWEEP_BYTES": run_sweep_bytes(),
    "PAGE_BYTES": PAGE_BYTES,
    "STREAM_BYTES": stream_bytes(),
    "SINGLE_BYTES": single_bytes(),
    "PREFETCH_BYTES": prefetch_bytes(FLOAT32),
    "PREFETCH_OUTPUT_BYTES": prefetch_output_bytes(),
    "STREAM_ROW": STREAM_ROW,
    "STRETCH": STRETCH,
    "SHARE_FEATURES": SHARE_FEATURES,
    "HELD_SIZE": HELD_SIZE,
    "ROW_LENGTH": ROW_LENGTH,
    "ROW_PIECE": ROW_PIECE,
    "FOLD_ROWS": FOLD_ROWS,
    "FOLD_COLUMNS": FOLD_COLUMNS,
    "TREE_COLUMNS": TREE_COLUMNS,
    "MAX_UNITS": MAX_UNITS,
}
