# The functions that Python calls; each fills a job, gives its arrays their roles, and runs it.

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
            high[k] += max(span, 0)
            low[k] += min(span, 0)
    return low[0] < high[1] and low[1] < high[0]


cdef inline int parameter_type(cnp.ndarray x) noexcept:
    """The type that parameters and their gradients have beside x: its own, or a half's lanes'."""
    return cnp.NPY_FLOAT32 if cnp.PyArray_ITEMSIZE(x) <= 4 else cnp.NPY_FLOAT64


cdef double one = 1, zero = 0


cdef void set_parameter(Parameter* given, cnp.ndarray values, const double* default) noexcept:
    """A float32 or float64 array, contiguous if it has several axes.  None: the default for all
    features; a single value is for all, too."""
    cdef bint one_axis = values is not None and cnp.PyArray_NDIM(values) == 1
    given.data = <const char*> default
    given.stride = 0
    given.period = INTPTR_MAX
    given.single = False
    if values is None:
        return
    given.data = <const char*> cnp.PyArray_DATA(values)
    given.single = cnp.PyArray_TYPE(values) == cnp.NPY_FLOAT32
    if cnp.PyArray_SIZE(values) > 1:
        given.period = cnp.PyArray_SIZE(values)
        given.stride = cnp.PyArray_STRIDES(values)[0] if one_axis else cnp.PyArray_ITEMSIZE(values)


cdef void load_parameter(cnp.ndarray values, double* target) noexcept:
    cdef Parameter given
    set_parameter(&given, values, NULL)
    read_parameter(&given, 0, cnp.PyArray_DIMS(values)[0], target)


# ---------------------------------------------------------------- one way in

cdef inline object array_of(const Job* job, int role):
    return <object> job.array[role] if job.array[role] != NULL else None


cdef void bring(Job* job, int role, cnp.ndarray array) noexcept:
    job.array[role] = NULL if array is None else <void*> array


cdef void set_varying(const Job* job, Plan* plan) noexcept:
    """gamma and beta that vary within a statistic have roles, with strides of 0 along other axes;
    in both visits, so that these have one layout."""
    plan.used[S] = plan.used[B] = job.varying.gamma != NULL
    plan.base[S] = job.varying.gamma
    plan.base[B] = job.varying.beta
    plan.stride[S] = plan.stride[B] = <cnp.npy_intp*> job.varying.stride


cdef void find_features_of(const Job* job, Features* features) noexcept:
    cdef cnp.npy_intp* stride[N_ROLES]
    cdef cnp.ndarray x = array_of(job, X)
    cdef bint merges = True
    cdef int r, axis = 0
    # One axis, which a small call need not look for in all arrays.
    if not job.by_row and job.features & (job.features - 1) == 0:
        while not job.features >> axis & 1:
            axis += 1
        features.n = 1
        features.dim[0] = axis
        features.size[0] = cnp.PyArray_DIMS(x)[axis]
        return
    if job.by_row and job.varying.gamma == NULL:
        # Of columns that are joined the number must not depend on how many samples there are.
        merges = nearest(x, ~job.features) < nearest(x, job.features)
    for r in range(N_ROLES):
        stride[r] = NULL
        if job.array[r] != NULL:
            stride[r] = cnp.PyArray_STRIDES(array_of(job, r))
    if job.varying.gamma != NULL:
        stride[S] = <cnp.npy_intp*> job.varying.stride
    find_features(x, job.features, stride, merges, features)


cdef void pass_as_stored(Plan* plan, Kernel kernel) noexcept:
    """Rows of a half type, where there is a kernel that takes all of a visit as they are."""
    cdef int r
    plan.as_stored = (
        BN_HALVES and is_half(plan.storage) and kernel != NULL and plan.gate != BEFORE
        and not plan.by_row
    )
    for r in range(N_ROLES):
        if plan.used[r]:
            plan.as_stored = plan.as_stored and plan.access[r] == COPIED and (
                r == X or r == G or r == Y
            )
    for r in range(N_ROLES):
        if plan.used[r] and plan.as_stored:
            plan.access[r] = DIRECT
    if is_half(plan.storage) and not plan.as_stored and (
        plan.layout == FEATURES or plan.layout == RUNS
    ):  # a buffer has to hold the rows
        plan.max_tile = max(1, min(plan.max_tile, TILE_COLUMNS // plan.segment[0].n_run))


cdef void plan_visits(Job* job) noexcept:
    """Give the arrays their roles in both visits.  In second order R and D are ddx and ddout,
    an input and an output of the second visit alone."""
    cdef Plan* reduce = job.reduce
    cdef Plan* apply = job.apply
    cdef const Operation* op = job.op
    cdef cnp.ndarray x = array_of(job, X), g = array_of(job, G), residual = array_of(job, R)
    cdef cnp.ndarray out = array_of(job, Y), second = array_of(job, D), weights = array_of(job, W)
    cdef bint mixed = op.formula == MIXED
    cdef bint gated = op.takes_dout and job.activation != IDENTITY
    # What came through the gate is read again from dresidual; but not where 16 bits rounded it.
    cdef bint rounded = is_half(storage_of(x)) and kernels[job.activation][0].scales
    cdef bint opened = second is not None and not (rounded or mixed)
    cdef bint apply_gated = gated and not opened
    # Frozen statistics leave the output to dout alone, but for the gate.
    cdef bint alone = op.input == G and not apply_gated, overwritten = False
    cdef Features features
    cdef int r
    set_role(reduce, X, x)
    set_role(reduce, G, g)
    set_role(reduce, R, residual if gated else None)
    set_role(reduce, Y, None)
    set_role(reduce, D, None if mixed else second)
    set_role(reduce, W, weights)
    g = second if opened else g
    set_role(apply, X, g if alone else x)
    set_role(apply, G, None if alone else g)
    set_role(apply, R, residual if apply_gated or not op.takes_dout or mixed else None)
    set_role(apply, Y, out)
    set_role(apply, D, second if mixed else None)
    set_role(apply, W, weights if op.weighs else None)
    reduce.gate = apply.gate = NONE
    if gated:
        reduce.gate = BEFORE if reduce.used[R] or reduce.used[W] else INSIDE
    if apply_gated:
        apply.gate = BEFORE if apply.used[R] or apply.used[W] or op.input == G else INSIDE
    set_varying(job, reduce)
    set_varying(job, apply)
    find_features_of(job, &features)
    reduce.by_row = apply.by_row = job.by_row
    reduce.along_from = apply.along_from = ALONG_RUN if weights is None else ALONG_WEIGHED
    make_plan(reduce, x, job.features, &features)
    make_plan(apply, x, job.features, &features)
    if job.varying.unit:
        job.varying.unit = unit_features(apply, job.n_features)
        if not folds_again(job):
            job.varying.lows = NULL
    # An array that is overwritten is read through the buffer, so that kernels may assume that
    # nothing they read is what they write.
    for r in range(Y):
        array = residual if r == R else g if r == G or alone else x
        if out is not None and apply.used[r] and apply.access[r] != GATHERED:
            if overlap(array, out):
                apply.access[r] = COPIED
                overwritten = True
    pass_as_stored(reduce, kernels[job.activation if gated else IDENTITY][HALVES].sum_products)
    gated = apply.gate != NONE or not op.takes_dout
    pass_as_stored(
        apply,
        NULL if overwritten
        else kernels[job.activation if gated else IDENTITY][HALVES].apply[op.formula],
    )


cdef bint overwrites_inputs(const Job* job) noexcept:
    """What a thread that settles features by themselves may still want to read."""
    cdef int r, w
    for w in range(Y, W):
        for r in range(Y):
            if job.array[w] != NULL and job.array[r] != NULL and overlap(
                array_of(job, w), array_of(job, r)
            ):
                return True
    return False


cdef void make_schedule(Job* job, int n_threads) noexcept:
    cdef Work work
    work.reduce = job.reduce
    work.apply = job.apply
    work.n_features = job.n_features
    work.feature_bytes = cnp.PyArray_NBYTES(array_of(job, X)) // job.n_features
    work.n_inputs = 2 if job.op.takes_dout else 1
    work.unit = job.varying.unit
    work.cells = job.cells
    work.untouched = is_untouched(array_of(job, Y)) or is_untouched(array_of(job, D))
    job.schedule.n_threads = bn_coming(n_threads)
    choose_tile(&job.schedule, &work)
    job.schedule.apart = settles_apart(&job.schedule, &work) and not overwrites_inputs(job)
    choose_detours(&job.schedule, &work)


cdef Py_ssize_t widest_row(const Plan* plan, Py_ssize_t tile) noexcept:
    """Columns of a tile's rows; or constants, where each row has its own, or some in turn."""
    cdef Py_ssize_t width = plan.segment[0].n_joined * plan.segment[0].n_run
    if plan.layout == ROWS:
        return max(width, tile)
    return max(width, <Py_ssize_t> (MAX_TURNS * LANES)) if plan.layout == LONG_RUN else width * tile


cdef void size_scratch(Job* job) noexcept:
    cdef Py_ssize_t tile = job.schedule.tile + job.schedule.lead
    cdef Scratch s
    job.width = (max(widest_row(job.reduce, tile), widest_row(job.apply, tile)) + 7) // 8 * 8
    job.own_features = 0
    if job.schedule.apart:
        job.own_features = pitch(job.n_features)
    elif job.schedule.sweep and job.schedule.n_tiles > 1:
        job.own_features = pitch(tile)
    job.scratch_bytes = share_scratch(job, <char*> 64, &s)


cdef void* allocate(size_t n_bytes) except NULL:
    cdef void* memory = malloc(n_bytes)
    if memory == NULL:
        raise MemoryError("bn_fast: no memory for the sums and constants of this call")
    return memory


cdef int execute(Job* job, int n_threads) except -1:
    """Plan, allocate, run, on so many threads at most; where x has no elements there is nothing to
    do."""
    cdef cnp.ndarray x = array_of(job, X)
    cdef Py_ssize_t size = cnp.PyArray_SIZE(x), n = job.n_features, n_values = 0
    cdef Plan[2] plans
    cdef double count
    cdef char* memory
    cdef bint samples
    cdef int v
    if size == 0 or not (job.reduces or job.applies):
        return 0
    count = <double> (size // n)
    for v in range(N_VALUES):
        job.given[v] = job.value[v] != NULL
    job.reduce = &plans[0]
    job.apply = &plans[1]
    if job.value[TOTAL] != NULL:
        job.total = count
    elif job.reduces and job.array[W] == NULL:
        job.total = count * (1 if job.op.takes_dout else job.cells)
    plan_visits(job)
    # Half of the mean weight: values that have less make up less than half of the whole, and may
    # hold anything, as under a mask the padding's filler.
    samples = job.reduces and not job.op.takes_dout and job.value[TOTAL] == NULL
    choose_sample(job.reduce, 0, job.total / count / 2 if samples else 0, job.reduce.sample)
    make_schedule(job, n_threads)
    size_scratch(job)
    if not job.own_features or job.schedule.apart:
        n_values = 4 * job.reduce.n_chunks * pitch(n) if job.reduces else 0
        if not job.own_features:
            n_values += n_own_values(job) * pitch(n)
        n_values = (n_values + 7) // 8 * 8
    memory = <char*> allocate(
        n_values * sizeof(double) + job.schedule.n_threads * job.scratch_bytes + 64
    )
    try:
        job.scratch = <char*> ((<size_t> memory + 63) // 64 * 64)
        job.stride = pitch(n)
        job.sums = <double*> job.scratch
        if not job.own_features:
            lay_out(job, job.sums, pitch(n), 0)
        job.scratch += n_values * sizeof(double)
        job.schedule.n_threads = bn_startable(job.schedule.n_threads)
        if job.schedule.n_threads <= 1 and size < HELD_SIZE:
            run_natively(job)
        else:
            with nogil:
                run_natively(job)
    finally:
        free(memory)
    return 0


cdef bint has_strides_of(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Of two arrays of one shape.  Strides of axes of length 1 lead nowhere, and differ freely."""
    cdef int d
    for d in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIMS(a)[d] != 1 and (
            cnp.PyArray_STRIDES(a)[d] != cnp.PyArray_STRIDES(b)[d]
        ):
            return False
    return True


cdef inline bint is_same_buffer(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether two arrays of one shape are one buffer, element by element, and not empty."""
    return cnp.PyArray_DATA(a) == cnp.PyArray_DATA(b) and has_strides_of(a, b) and (
        cnp.PyArray_SIZE(a) > 0
    )


def note_wait(long long worked, long long waited):
    """For tests: as if a thread had waited, nanoseconds both, for the others of its call."""
    bn_note_wait(worked, waited)


def be_patient(bint patient):
    """For tests: use all threads of a call, however long they have waited for one another."""
    global bn_patient
    bn_patient = patient


def coming(int n_threads):
    """How many of so many threads a call would use now."""
    return bn_coming(n_threads)


def is_same(cnp.ndarray a not None, cnp.ndarray b not None):
    return is_same_buffer(a, b)


cdef unsigned long long mask_of(axes) except? 0:
    """Of an axis, or of a tuple of them."""
    cdef unsigned long long mask = 0
    if type(axes) is int:
        return <unsigned long long> 1 << <int> axes
    for axis in <tuple> axes:
        mask |= <unsigned long long> 1 << <int> axis
    return mask


cdef inline int n_threads_of(cnp.ndarray x, n_threads, Py_ssize_t small) except -1:
    """Of a call on x: n_threads; on the straight road, with `small` not negative, what that
    function says, and one where x is smaller."""
    if small < 0:
        return n_threads
    return 1 if cnp.PyArray_SIZE(x) < small else n_threads()


cdef inline Py_ssize_t n_along(cnp.ndarray x, unsigned long long axes) noexcept:
    """How many elements x has along the axes of a mask, together."""
    cdef Py_ssize_t n = 1
    cdef int d
    for d in range(cnp.PyArray_NDIM(x)):
        if axes >> d & 1:
            n *= cnp.PyArray_DIMS(x)[d]
    return n


cdef cnp.ndarray running_average(cnp.ndarray old, cnp.ndarray x, cnp.npy_intp length):
    """A new array for an average beside x, with the old values (None: zeros): float32 only where
    both old and the parameters of x are."""
    cdef int kind = parameter_type(x)
    cdef cnp.ndarray new
    if old is None:
        return cnp.PyArray_ZEROS(1, &length, kind, 0)
    if cnp.PyArray_TYPE(old) != cnp.NPY_FLOAT32:
        kind = cnp.NPY_FLOAT64
    new = cnp.PyArray_EMPTY(1, &length, kind, 0)
    if cnp.PyArray_TYPE(old) == kind and cnp.PyArray_ISCARRAY_RO(old):  # 0.1 us less
        memcpy(cnp.PyArray_DATA(new), cnp.PyArray_DATA(old), cnp.PyArray_NBYTES(new))
    else:
        cnp.PyArray_CopyInto(new, old)
    return new


cdef void new_job(
    Job* job, int operation, cnp.ndarray x, cnp.ndarray stats, unsigned long long features,
) noexcept:
    """features: the mask of their axes.  stats: mean, the mean's low part, inv_std and var: float64
    (4, n_features), contiguous."""
    cdef Py_ssize_t n = cnp.PyArray_DIMS(stats)[1]
    cdef int k
    memset(job, 0, sizeof(Job))
    job.op = &operations[1 if storage_of(x) == FLOAT64 else 0][operation]
    job.features = features
    job.n_features = n
    job.cells = 1
    job.eps = -1
    bring(job, X, x)
    for k in range(4):
        job.value[MEAN + k] = <double*> cnp.PyArray_DATA(stats) + k * n
    job.value[MULTIPLIER] = job.value[INV_STD]


cdef void average_in(
    cnp.ndarray average, const double* batch, double old, double new,
) noexcept:
    cdef Py_ssize_t f, n = cnp.PyArray_DIMS(average)[0]
    cdef float* narrow = <float*> cnp.PyArray_DATA(average)
    cdef double* values = <double*> cnp.PyArray_DATA(average)
    if cnp.PyArray_TYPE(average) == cnp.NPY_FLOAT32:
        for f in range(n):
            narrow[f] = <float> (old * narrow[f] + new * batch[f])
    else:
        for f in range(n):
            values[f] = old * values[f] + new * batch[f]


def averaged(
    cnp.ndarray average not None, cnp.ndarray batch not None, double old, double new,
):
    """old * average + new * batch, in double, as a new array; batch is float64."""
    cdef cnp.ndarray result = cnp.PyArray_NewCopy(average, cnp.NPY_CORDER)
    batch = cnp.PyArray_GETCONTIGUOUS(batch)
    average_in(result, <const double*> cnp.PyArray_DATA(batch), old, new)
    return result


def is_finite(cnp.ndarray values not None):
    """Of float64, one dimension."""
    cdef Py_ssize_t f, stride = cnp.PyArray_STRIDES(values)[0]
    cdef const char* data = <const char*> cnp.PyArray_DATA(values)
    for f in range(cnp.PyArray_DIMS(values)[0]):
        if not isfinite((<const double*> (data + f * stride))[0]):
            return False
    return True


cdef cnp.ndarray new_statistics(Py_ssize_t n):
    cdef cnp.npy_intp[2] shape = [4, n]
    return cnp.PyArray_EMPTY(2, shape, cnp.NPY_FLOAT64, 0)


cdef cnp.ndarray filled(int kind, Py_ssize_t n_rows, Py_ssize_t n, double value):
    cdef cnp.npy_intp[2] shape = [n_rows, n]
    cdef cnp.ndarray values = cnp.PyArray_ZEROS(2, shape, kind, 0)
    if value != 0:
        values.fill(value)
    return values


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


cdef int take_total(Job* job, total) except -1:
    """A number, or float64 for each feature, contiguous, which the caller keeps."""
    if cnp.PyArray_Check(total):
        job.value[TOTAL] = <double*> cnp.PyArray_DATA(<cnp.ndarray> total)
    else:
        job.total = total
    return 0


cdef int bring_options(Job* job, options, cnp.ndarray beta) except -1:
    """What the call was asked for besides: Options (_cache.py) or such a tuple, or None; an
    activation's gate depends on beta."""
    if options is None:
        return 0
    activation, negative_slope, residual, weights, total, _, _ = <tuple> options
    job.activation = IDENTITY if activation is None else activations[activation]
    job.negative_slope = negative_slope
    take_total(job, total)
    set_parameter(&job.beta_given, beta, &zero)
    bring(job, R, residual)
    bring(job, W, weights)
    return 0


cdef cnp.ndarray run_forward(
    Job* job, cnp.ndarray gamma, cnp.ndarray beta, cnp.ndarray out, int n_threads,
):
    """Apply what the job says of statistics; returns out (new if None)."""
    if out is None:
        out = new_result(array_of(job, X))
    bring(job, Y, out)
    set_parameter(&job.gamma_given, gamma, &one)
    set_parameter(&job.beta_given, beta, &zero)
    job.applies = True
    execute(job, n_threads)
    return out


cdef int run_backward(
    Job* job, cnp.ndarray dout, cnp.ndarray gamma, cnp.ndarray dx, double* sums, int n_threads,
) except -1:
    """The sums of dout and the job's x, dgamma and dbeta, each of n_features values, if they are
    asked for; and dx, if it is not None."""
    bring(job, G, dout)
    bring(job, Y, dx)
    set_parameter(&job.gamma_given, gamma, &one)
    job.applies = dx is not None
    job.value[DGAMMA] = sums
    job.value[DBETA] = sums + job.n_features
    return execute(job, n_threads)


cdef inline void take_statistics(Job* job, double eps) noexcept:
    """Of x itself."""
    job.reduces = True
    job.eps = eps


cdef cnp.ndarray statistics_of(
    cnp.ndarray x, unsigned long long features, bint by_row, cnp.ndarray weights, total,
    int n_threads,
):
    cdef Job job
    cdef cnp.ndarray stats = new_statistics(n_along(x, features))
    new_job(&job, FORWARD, x, stats, features)
    job.by_row = by_row
    bring(&job, W, weights)
    take_statistics(&job, 0)
    take_total(&job, total)
    execute(&job, n_threads)
    return stats


def normalize(
    cnp.ndarray x not None, cnp.ndarray gamma, cnp.ndarray beta, axis, cnp.ndarray stats,
    cnp.ndarray out, int n_threads,
):
    """Normalize x with statistics that are given, as forward returns them; returns out."""
    cdef Job job
    cdef unsigned long long features = mask_of(axis)
    if not are_statistics(stats, n_along(x, features)):
        raise ValueError("stats must be float64, contiguous and of shape (4, n_features)")
    new_job(&job, FROZEN, x, stats, features)
    return run_forward(&job, gamma, beta, out, n_threads)


cdef inline char* data_of(cnp.ndarray array) noexcept:
    return NULL if array is None else <char*> cnp.PyArray_DATA(array)


cdef void store_parameter(const double* values, cnp.ndarray target) noexcept:
    """Into a contiguous array; None: nowhere."""
    if target is not None:
        store_values(
            values, cnp.PyArray_SIZE(target), storage_of(target),
            <char*> cnp.PyArray_DATA(target),
        )


cdef void differentiate_statistics(
    Job* job, double* scale, cnp.ndarray dmean, cnp.ndarray dvar,
) noexcept:
    """dmean and dvar where mean and var were given, over the job's sums; scale: room for n values.
    """
    cdef double* dgamma = job.value[DGAMMA]
    cdef double* dbeta = job.value[DBETA]
    cdef const double* inv_std = job.value[INV_STD]
    cdef Py_ssize_t f
    read_parameter(&job.gamma_given, 0, job.n_features, scale)
    for f in range(job.n_features):
        scale[f] *= -inv_std[f]
        dgamma[f] = scale[f] * dgamma[f] * (inv_std[f] / 2)
        dbeta[f] *= scale[f]
    store_parameter(dbeta, dmean)
    store_parameter(dgamma, dvar)


cdef inline bint wants(object needs, str name) except -1:
    """Whether a gradient is among those that are wanted (None: all)."""
    return needs is None or name in needs


cdef inline cnp.ndarray new_parameter(cnp.ndarray x, Py_ssize_t n):
    """n values of a parameter beside x."""
    cdef cnp.npy_intp length = n
    return cnp.PyArray_EMPTY(1, &length, parameter_type(x), 0)


def backward(dout, cache, out, needs, n_threads, Py_ssize_t small=-1):
    """Gradients dx (in out, new if None), dgamma, dbeta, and dresidual where there was a residual:
    what `needs` names (None: all of these), and None for the others and where gamma or beta was
    None.  Where it names one of dmean and dvar, both follow.

    cache: a Cache (_cache.py), told if its x is overwritten.  small: of the straight road, where
    n_threads is a function, see n_threads_of; negative where all has been checked.
    """
    cdef Job job
    cdef Py_ssize_t n
    cdef cnp.ndarray dgamma = None, dbeta = None, dresidual = None, dmean = None, dvar = None
    cdef double* sums
    cdef bint frozen = cache.frozen
    x, gamma, beta, stats = cache.x, cache.gamma, cache.beta, cache.stats
    axis, eps, options = cache.axis, cache.eps, cache.options
    if small >= 0 and not (
        is_plain_cache(x, gamma, beta, stats, axis, eps) and is_plain_gradient(dout, x, gamma, out)
        and are_plain_options(options, x, beta, out)
    ):
        return None
    residual = None if options is None else (<tuple> options)[2]
    n = cnp.PyArray_DIMS(stats)[1]
    # Whatever may fail for want of memory comes before anything is written to out.
    if gamma is not None and wants(needs, "dgamma"):
        dgamma = new_parameter(x, n)
    if beta is not None and wants(needs, "dbeta"):
        dbeta = new_parameter(x, n)
    if needs is not None and ("dmean" in needs or "dvar" in needs):
        dmean = new_parameter(x, n)
        dvar = new_parameter(x, n)
    if residual is not None and wants(needs, "dresidual"):
        dresidual = new_result(x)
    if out is None and wants(needs, "dx"):
        out = new_result(x)
    sums = <double*> allocate((3 * n + 1) * sizeof(double))
    try:
        new_job(&job, FROZEN_BACKWARD if frozen else BACKWARD, x, stats, mask_of(axis))
        bring_options(&job, options, beta)
        bring(&job, D, dresidual)
        job.reduces = (
            dgamma is not None or dbeta is not None or dmean is not None or dresidual is not None
            or (out is not None and not frozen)
        )
        # With weights dout has no shift, and M = 2 no form of its own.
        job.eps = eps if job.array[W] == NULL else -1
        job.exact_mean = job.eps >= 0
        job.rounded[0] = data_of(dgamma)
        job.rounded[1] = data_of(dbeta)
        if cnp.PyArray_SIZE(x) == 0:  # what they are of no elements
            memset(sums, 0, 2 * n * sizeof(double))
            store_parameter(sums, dgamma)
            store_parameter(sums + n, dbeta)
        run_backward(&job, dout, gamma, out, sums, n_threads_of(x, n_threads, small))
        if dmean is not None:
            differentiate_statistics(&job, sums + 2 * n, dmean, dvar)
    finally:
        free(sums)
    if out is not None and is_same_buffer(out, x):
        cache.overwritten = "batchnorm_backward"
    found = (out, dgamma, dbeta) if residual is None else (out, dgamma, dbeta, dresidual)
    if dmean is not None:
        found += (dmean if "dmean" in needs else None, dvar if "dvar" in needs else None)
    return found


# ---------------------------------------------------------------- one visit alone
#
# The pieces from which statistics and gradients over several arrays are put together.

def moments(
    cnp.ndarray x not None, axis, int n_threads, cnp.ndarray weights=None, total=0,
):
    """stats of x, as forward has them with eps = 0; x has at least one element.  weights and total
    are forward's too."""
    return statistics_of(x, mask_of(axis), False, weights, total, n_threads)


def backward_sums(
    cnp.ndarray dout not None, cnp.ndarray x not None, cnp.ndarray stats not None, axis,
    int n_threads, bint normalized=False,
):
    """sum dout (x - mean), times inv_std if `normalized`, and sum dout as float64 (2, n_features),
    whatever x has to do with stats."""
    cdef Job job
    cdef Py_ssize_t n = cnp.PyArray_DIMS(stats)[1]
    cdef cnp.ndarray sums = filled(cnp.NPY_FLOAT64, 2, n, 0)
    cdef cnp.ndarray ones = filled(cnp.NPY_FLOAT64, 1, n, 1)
    new_job(&job, BACKWARD, x, stats, mask_of(axis))
    job.reduces = True
    if not normalized:
        job.value[MULTIPLIER] = <double*> cnp.PyArray_DATA(ones)
    run_backward(&job, dout, None, None, <double*> cnp.PyArray_DATA(sums), n_threads)
    return sums


def backward_dx(
    cnp.ndarray dout not None, cache, cnp.ndarray sums not None, total, cnp.ndarray out,
    int n_threads,
):
    """dx (in out, new if None) = gamma inv_std (dout - dbeta / total - x_hat dgamma / total), where
    sums, float64 (2, n_features), are dgamma and dbeta over all parts, and total counts them; the
    rest is a Cache's."""
    cdef Job job
    cdef cnp.ndarray x = cache.x, stats = cache.stats
    if out is None:
        out = new_result(x)
    new_job(&job, BACKWARD, x, stats, mask_of(cache.axis))
    take_total(&job, total)
    run_backward(&job, dout, cache.gamma, out, <double*> cnp.PyArray_DATA(sums), n_threads)
    return out


# ---------------------------------------------------------------- second order
#
# backward maps (dout, x, gamma) to (dx, dgamma, dbeta); this is the way of gradients ddx, ddgamma,
# ddbeta back through it.  Five sums of each feature are needed, over pairs of the arrays x, dout,
# ddx: backward's kernel gives them, pair by pair.  Then one visit applies
#
#     dx    = (dout - mean) mix_g + (ddx - mean) mix_r + (x - mean) mix_x + bias
#     ddout = (ddx - mean) coef + (x - mean) coef + bias
#
# The formulas behind the constants: functional.py.

cdef int sum_pair(
    Job job, cnp.ndarray other, double* mean, double* along, double* sums, int n_threads,
) except -1:
    """Backward's sums of the job's array, which has its statistics, and another: its mean (two
    rows) and that of its product with x_hat, also where the sum leaves the range."""
    cdef Py_ssize_t f, n = job.n_features
    cdef double m = <double> (cnp.PyArray_SIZE(other) // n)
    job.reduces = True
    job.value[MEAN_GX] = along
    if mean != NULL:
        job.value[MEAN_G] = mean
        job.value[MEAN_G_LOW] = mean + n
    run_backward(&job, other, None, None, sums, n_threads)
    for f in range(n):
        along[f] = sums[f] / m if isfinite(sums[f]) else along[f]
    return 0


cdef int sum_pairs(
    double* v, cnp.ndarray ddx, cnp.ndarray dout, cache, int n_threads,
) except -1:
    """The five sums, into rows of n values from v on: the means of ddx and dout, two rows each,
    their mean product times inv_std, and those of ddx and dout with x_hat; then dgamma and another
    row."""
    cdef Job job
    cdef cnp.ndarray x = cache.x, stats = cache.stats
    cdef unsigned long long features = mask_of(cache.axis)
    cdef bint frozen = cache.frozen, exact_mean = <double> cache.eps >= 0
    cdef Py_ssize_t f, n = cnp.PyArray_DIMS(stats)[1]
    cdef double m = <double> (cnp.PyArray_SIZE(x) // n)
    cdef double* inv_std = <double*> cnp.PyArray_DATA(stats) + 2 * n
    cdef double* dgamma = v + 7 * n
    cdef cnp.ndarray plain = new_statistics(n)  # of dout: its mean, and the factor
    cdef double* value = <double*> cnp.PyArray_DATA(plain)
    if not frozen:
        new_job(&job, BACKWARD, x, stats, features)
        job.exact_mean = exact_mean
        sum_pair(job, dout, v + 2 * n, v + 6 * n, dgamma, n_threads)
        sum_pair(job, ddx, v, v + 5 * n, dgamma, n_threads)
    memcpy(value, v + 2 * n, 2 * n * sizeof(double))
    memcpy(value + 2 * n, inv_std, n * sizeof(double))  # a product alone may leave the range
    memset(value + 3 * n, 0, n * sizeof(double))
    new_job(&job, FROZEN_BACKWARD if frozen else PRODUCT, dout, plain, features)
    job.exact_mean = exact_mean
    sum_pair(job, ddx, NULL, v + 4 * n, dgamma, n_threads)
    if not frozen:
        for f in range(n):
            dgamma[f] -= inv_std[f] * m * v[5 * n + f] * v[6 * n + f]
    return 0


def double_backward(
    cnp.ndarray ddx, cnp.ndarray ddgamma not None, cnp.ndarray ddbeta not None,
    cnp.ndarray dout not None, cache, int n_threads,
):
    """Gradients dx, dgamma, ddout of backward, from those of its three results.

    ddx, dout: of the dtype and shape of the cache's x; ddx None: zeros.  ddgamma and ddbeta:
    float64, contiguous.
    """
    cdef Job job
    cdef cnp.ndarray x = cache.x, gamma = cache.gamma, stats = cache.stats
    cdef unsigned long long features = mask_of(cache.axis)
    cdef bint frozen = cache.frozen
    cdef cnp.npy_intp n = cnp.PyArray_DIMS(stats)[1]
    cdef cnp.ndarray values = filled(cnp.NPY_FLOAT64, 9, n, 0)
    cdef cnp.ndarray dx = new_result(x), ddout = new_result(x)
    cdef cnp.ndarray dgamma = cnp.PyArray_ZEROS(1, &n, parameter_type(x), 0)
    cdef double* v = <double*> cnp.PyArray_DATA(values)
    cdef int* names = [MEAN_R, MEAN_R_LOW, MEAN_G, MEAN_G_LOW, PRODUCT_GR, ALONG_R, ALONG_G]
    cdef int k
    if cnp.PyArray_SIZE(x) == 0:
        return dx, dgamma, ddout
    if ddx is None or frozen:
        # dx is that of backward, with ddgamma for gamma.
        new_job(&job, FROZEN_BACKWARD if frozen else BACKWARD, x, stats, features)
        job.reduces = not frozen
        job.eps = cache.eps
        job.exact_mean = job.eps >= 0
        run_backward(&job, dout, ddgamma, dx, v + 7 * n, n_threads)
    if ddx is None:  # ddout is forward's output, with ddgamma and ddbeta for gamma and beta
        new_job(&job, FROZEN, x, stats, features)
        run_forward(&job, ddgamma, ddbeta, ddout, n_threads)
        return dx, dgamma, ddout
    sum_pairs(v, ddx, dout, cache, n_threads)
    store_parameter(v + 7 * n, dgamma)
    new_job(&job, SECOND, x, stats, features)
    bring(&job, R, ddx)
    bring(&job, D, ddout)
    if not frozen:
        bring(&job, G, dout)
        bring(&job, Y, dx)
    set_parameter(&job.gamma_given, gamma, &one)
    job.applies = True
    for k in range(7):
        job.value[names[k]] = v + k * n
    job.value[DDGAMMA] = <double*> cnp.PyArray_DATA(ddgamma)
    job.value[DDBETA] = <double*> cnp.PyArray_DATA(ddbeta)
    execute(&job, n_threads)
    return dx, dgamma, ddout


# ---------------------------------------------------------------- the straight road
#
# Whether arguments need no conversion and no check, and the calls for which that is all, in one
# piece.  Checked one by one in Python they cost more than the engine's work: (32, 64) with a
# bn_param 6.3 us, of which the engine 2; and (256, 512) backward on two threads 41 us, of which 8.

cdef inline bint is_plain_array(object array) noexcept:
    """An ndarray proper, of a dtype that is computed as such, aligned and native."""
    cdef int kind
    if not cnp.PyArray_CheckExact(array):
        return False
    kind = cnp.PyArray_TYPE(array)
    return (
        kind == cnp.NPY_FLOAT32 or kind == cnp.NPY_FLOAT64 or kind == cnp.NPY_FLOAT16
        or (cnp.PyArray_ITEMSIZE(array) == 2 and bn_is_bfloat16(cnp.PyArray_DESCR(array)))
    ) and cnp.PyArray_ISBEHAVED_RO(array)


cdef bint is_plain_twin(object array, cnp.ndarray like, int kind=-1) noexcept:
    """A plain array with the type (or this one) and shape of another."""
    cdef int d
    if (
        not is_plain_array(array)
        or cnp.PyArray_TYPE(array) != (cnp.PyArray_TYPE(like) if kind < 0 else kind)
        or cnp.PyArray_NDIM(array) != cnp.PyArray_NDIM(like)
    ):
        return False
    for d in range(cnp.PyArray_NDIM(like)):
        if cnp.PyArray_DIMS(array)[d] != cnp.PyArray_DIMS(like)[d]:
            return False
    return True


cdef inline bint are_apart(object out, object array) noexcept:
    """Whether nothing of the array is written to; either may be None."""
    return out is None or array is None or not overlap(out, array)


cdef bint is_plain_output(object out, cnp.ndarray like) noexcept:
    """None, or a contiguous array to write to, away from the first input or exactly it."""
    return out is None or (
        is_plain_twin(out, like)
        and cnp.PyArray_ISWRITEABLE(out)
        and (cnp.PyArray_IS_C_CONTIGUOUS(out) or cnp.PyArray_IS_F_CONTIGUOUS(out))
        and (are_apart(out, like) or is_same_buffer(out, like))
    )


cdef bint is_plain_parameter(object values, Py_ssize_t n, bint of_any_shape=False) noexcept:
    """n numbers in a line, or what can be read as such, or None."""
    return values is None or (
        is_plain_array(values) and not is_half(storage_of(values))
        and cnp.PyArray_SIZE(values) == n
        and (cnp.PyArray_NDIM(values) == 1 or (of_any_shape and cnp.PyArray_ISCARRAY_RO(values)))
    )


cdef inline bint is_plain_input(object x, object axis) noexcept:
    return (
        is_plain_array(x) and cnp.PyArray_NDIM(x) >= 2
        and type(axis) is int and 0 <= axis < cnp.PyArray_NDIM(x)
    )


cdef bint is_plain_rest(x, gamma, beta, Py_ssize_t n, out) noexcept:
    """Whether n parameters and out need no conversion and no check beside such an x."""
    return (
        is_plain_parameter(gamma, n) and is_plain_parameter(beta, n) and is_plain_output(out, x)
        and are_apart(out, gamma) and are_apart(out, beta)
    )


cpdef bint is_plain(x, gamma, beta, axis, out) noexcept:
    """Whether a forward call's arguments need no conversion and no check."""
    return is_plain_input(x, axis) and is_plain_rest(
        x, gamma, beta, cnp.PyArray_DIMS(x)[<int> axis], out
    )


cpdef bint is_plain_gradient(dout, cnp.ndarray x, cnp.ndarray gamma, out) noexcept:
    """The same for a backward call, whose x and gamma have been checked before."""
    return (
        is_plain_twin(dout, x) and is_plain_output(out, dout)
        and are_apart(out, x) and are_apart(out, gamma)
    )


cdef bint has_negative(cnp.ndarray values) noexcept:
    """Of float32 or float64, one dimension."""
    cdef Py_ssize_t f, stride = cnp.PyArray_STRIDES(values)[0]
    cdef const char* data = <const char*> cnp.PyArray_DATA(values)
    cdef bint negative = False
    if cnp.PyArray_TYPE(values) == cnp.NPY_FLOAT32:
        for f in range(cnp.PyArray_DIMS(values)[0]):
            negative |= (<const float*> (data + f * stride))[0] < 0
    else:
        for f in range(cnp.PyArray_DIMS(values)[0]):
            negative |= (<const double*> (data + f * stride))[0] < 0
    return negative


cpdef bint are_plain_statistics(mean, var, Py_ssize_t n_features) noexcept:
    """Whether running averages, None for the defaults, need no conversion and no check; no variance
    is negative."""
    return (
        is_plain_parameter(mean, n_features) and is_plain_parameter(var, n_features)
        and (var is None or not has_negative(var))
    )


cdef bint is_plain_number(object value, double lowest, double* number) noexcept:
    """Whether it is a finite float, above `lowest` or equal to it."""
    if type(value) is not float:
        return False
    number[0] = value
    return lowest <= number[0] and fabs(number[0]) < INFINITY


cdef bint is_plain_activation(object name) noexcept:
    return name is None or (type(name) is str and name in activations)


cdef bint is_plain_residual(object residual, cnp.ndarray x, object out) noexcept:
    return residual is None or (
        is_plain_twin(residual, x)
        and (are_apart(out, residual) or is_same_buffer(out, residual))
    )


cdef object default_eps = 1e-5
cdef object default_momentum = 0.9


cpdef tuple settings_of(bn_param, cnp.ndarray x, Py_ssize_t n_features, double correction=0):
    """What bn_param says: whether to train, eps, momentum, the running averages, in new arrays that
    the call may write to, and what multiplies the variance that the average takes in: `correction`
    where all has been checked.  None where a key or a value needs a closer look."""
    cdef double number
    if type(bn_param) is not dict:
        return None
    mode = (<dict> bn_param).get("mode")
    eps = (<dict> bn_param).get("eps", default_eps)
    momentum = (<dict> bn_param).get("momentum", default_momentum)
    mean = (<dict> bn_param).get("running_mean")
    var = (<dict> bn_param).get("running_var")
    n_known = (
        1 + (eps is not default_eps) + (momentum is not default_momentum)
        + (mean is not None) + (var is not None)
    )
    if not correction and not (
        n_known == len(<dict> bn_param)  # no key is unknown, nor stands for a default
        and type(mode) is str and (mode == "train" or mode == "test")
        and is_plain_number(eps, 0, &number) and is_plain_number(momentum, -INFINITY, &number)
        and are_plain_statistics(mean, var, n_features)
    ):
        return None
    return (
        mode == "train", eps, momentum, running_average(mean, x, n_features),
        running_average(var, x, n_features), correction or 1.0,
    )


cpdef tuple forward(
    cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray beta, axis, cnp.ndarray out, tuple settings,
    options, int n_threads,
):
    """Normalize x along every axis but that of the features, or those (a tuple), as settings (see
    settings_of; None: the defaults) and options say; the averages, if there are any, take in the
    batch.  Returns out, stats, eps, and whether stats are not x's own."""
    cdef Job job
    cdef cnp.ndarray stats, mean = None, var = None
    cdef bint train = True
    cdef double old, correction = 1
    cdef unsigned long long features = mask_of(axis)
    cdef Py_ssize_t n = n_along(x, features)
    eps = default_eps
    if settings is not None:
        train, eps, momentum, mean, var, correction = settings
    if not train:
        stats = given_statistics(mean, var, eps)
    elif options is not None and (<tuple> options)[3] is not None and (
        type((<tuple> options)[4]) is float and (<tuple> options)[4] == 0
    ):
        stats = filled(cnp.NPY_FLOAT64, 4, n, 0)  # inv_std is 0, and so is x_hat
        stats[3] = NAN
        train = False
    else:
        stats = new_statistics(n)
    new_job(&job, FORWARD if train else FROZEN, x, stats, features)
    if train:
        take_statistics(&job, eps)
        if cnp.PyArray_SIZE(x) == 0:
            stats.fill(NAN)
    bring_options(&job, options, beta)
    out = run_forward(&job, gamma, beta, out, n_threads)
    if train and mean is not None and cnp.PyArray_SIZE(x):
        old = momentum
        average_in(mean, job.value[MEAN], old, 1 - old)
        average_in(var, job.value[VAR], old, (1 - old) * correction)
    return out, stats, eps, not train


def plain_forward(
    x, gamma, beta, bn_param, axis, out, activation, negative_slope, residual, weights,
    weights_of, n_threads, Py_ssize_t small,
):
    """A call of batchnorm_forward that takes the straight road; n_threads says on how many threads.
    weights_of (weights, x, axis): of _checks.py.

    Returns x, gamma, beta, options (a tuple or None) and what forward returns; or None, and nothing
    is done, where an argument needs a closer look.
    """
    cdef double slope
    cdef tuple settings = None, options = None
    total, given = 0.0, None
    if not (
        is_plain(x, gamma, beta, axis, out) and cnp.PyArray_SIZE(x)
        and is_plain_activation(activation) and is_plain_number(negative_slope, -INFINITY, &slope)
        and is_plain_residual(residual, x, out)
    ):
        return None
    if weights is not None:
        if bn_param is not None:  # a feature without weight leaves its averages alone
            return None
        weights, total, given = weights_of(weights, x, axis)
    if bn_param is not None:
        settings = settings_of(bn_param, x, cnp.PyArray_DIMS(x)[<int> axis])
        if settings is None:
            return None
    if activation is not None or residual is not None or given is not None:
        spoilt = activation is not None and out is not None and residual is not None and (
            is_same_buffer(out, residual)
        )
        options = activation, negative_slope, residual, weights, total, spoilt, given
    found = forward(
        x, gamma, beta, axis, out, settings, options, n_threads_of(x, n_threads, small)
    )
    if settings is not None:
        bn_param["running_mean"], bn_param["running_var"] = settings[3], settings[4]
    return x, gamma, beta, options, found


cdef bint is_plain_cache(
    object x, object gamma, object beta, object stats, object axis, object eps,
) noexcept:
    """Whether what a forward call left is what backward reads: it can be changed by hand."""
    cdef Py_ssize_t n
    cdef double number
    if not is_plain_input(x, axis) or not is_plain_number(eps, -INFINITY, &number):
        return False
    n = cnp.PyArray_DIMS(x)[<int> axis]
    return (
        is_plain_parameter(gamma, n) and is_plain_parameter(beta, n)
        and cnp.PyArray_CheckExact(stats) and are_statistics(stats, n)
    )


cdef bint are_plain_options(object options, cnp.ndarray x, object beta, object out) noexcept:
    """The same of what it was asked for, and whether out is apart from what that depends on."""
    if options is None:
        return True
    if not isinstance(options, tuple) or len(options) != 7:
        return False
    activation, negative_slope, residual, weights, total, spoilt, _ = <tuple> options
    return (
        is_plain_activation(activation) and type(negative_slope) is float
        and is_plain_residual(residual, x, None) and spoilt is False
        and (weights is None or is_plain_twin(weights, x, parameter_type(x)))
        and type(total) is float and are_apart(out, residual) and are_apart(out, beta)
    )
