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
        given.period = max(<Py_ssize_t> 1, cnp.PyArray_DIMS(values)[0])
        given.single = cnp.PyArray_TYPE(values) == cnp.NPY_FLOAT32


cdef void load_parameter(cnp.ndarray values, double* target) noexcept:
    cdef Parameter given
    set_parameter(&given, values)
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
    # Of columns that are joined the number must not depend on how many samples there are.
    cdef bint merges = job.varying.gamma != NULL or (
        nearest(x, ~job.features) < nearest(x, job.features)
    )
    cdef int r
    for r in range(N_ROLES):
        stride[r] = NULL
        if job.array[r] != NULL:
            stride[r] = cnp.PyArray_STRIDES(array_of(job, r))
    if job.varying.gamma != NULL:
        stride[S] = <cnp.npy_intp*> job.varying.stride
    find_features(x, job.features, stride, merges, features)


cdef void plan_visits(Job* job) noexcept:
    """Give the arrays their roles in both visits.  In second order R and D are ddx and ddout,
    an input and an output of the second visit alone."""
    cdef Plan* reduce = &job.reduce
    cdef Plan* apply = &job.apply
    cdef const Operation* op = job.op
    cdef cnp.ndarray x = array_of(job, X), g = array_of(job, G), residual = array_of(job, R)
    cdef cnp.ndarray out = array_of(job, Y), second = array_of(job, D), weights = array_of(job, W)
    cdef bint mixed = op.formula == MIXED
    cdef bint gated = op.takes_dout and job.activation != IDENTITY
    # What came through the gate is read again from dresidual; but not where 16 bits rounded it.
    cdef bint rounded = is_half(storage_of(x)) and job.activation != RELU
    cdef bint opened = second is not None and not (rounded or mixed)
    cdef bint apply_gated = gated and not opened
    # Frozen statistics leave the output to dout alone, but for the gate.
    cdef bint alone = op.input == G and not apply_gated
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
    make_plan(reduce, x, job.features, &features)
    make_plan(apply, x, job.features, &features)
    if job.varying.unit:
        job.varying.unit = unit_features(apply, job.n_features)
    # An array that is overwritten is read through the buffer, so that kernels may assume that
    # nothing they read is what they write.
    for r in range(Y):
        array = residual if r == R else g if r == G or alone else x
        if out is not None and apply.used[r] and apply.access[r] == DIRECT and overlap(array, out):
            apply.access[r] = COPIED


cdef void make_schedule(Job* job) noexcept:
    cdef Work work
    work.reduce = &job.reduce
    work.apply = &job.apply
    work.n_features = job.n_features
    work.feature_bytes = cnp.PyArray_NBYTES(array_of(job, X)) // job.n_features
    work.n_inputs = 2 if job.op.takes_dout else 1
    work.unit = job.varying.unit
    job.schedule.n_threads = job.n_threads
    choose_tile(&job.schedule, &work)
    choose_detours(&job.schedule, &work)


cdef void size_scratch(Job* job) noexcept:
    cdef Py_ssize_t tile = job.schedule.tile + job.schedule.lead
    cdef const Plan* plan
    cdef Scratch s
    cdef int k
    job.width = 0
    for k in range(2):
        plan = &job.apply if k else &job.reduce
        job.width = max(
            job.width,
            plan.segment[0].n_joined * plan.segment[0].n_run
            * (1 if plan.layout == LONG_RUN or plan.layout == ROWS else tile),
        )
        if plan.layout == ROWS:
            job.width = max(job.width, tile)
    job.width = (job.width + 7) // 8 * 8
    job.buffer_elements = max(
        <Py_ssize_t> GATHER_ELEMENTS,
        job.width * (
            1 if job.reduce.layout == LONG_RUN else 4 if job.reduce.layout == ROWS else TREE_ROWS
        ),
    )
    job.own_values = job.schedule.sweep and job.schedule.n_tiles > 1
    job.scratch_bytes = share_scratch(job, <char*> 64, &s)


cdef int execute(Job* job) except -1:
    """Plan, allocate, run; where x has no elements there is nothing to do."""
    cdef cnp.ndarray x = array_of(job, X)
    cdef Py_ssize_t size = cnp.PyArray_SIZE(x), n = job.n_features, n_values = 0
    cdef double count
    cdef char* memory
    cdef int v
    if size == 0 or not (job.reduces or job.applies):
        return 0
    count = <double> (size // n)
    for v in range(N_VALUES):
        job.given[v] = job.value[v] != NULL
    job.low = low_limit(storage_of(x))
    if job.reduces and job.array[W] == NULL:
        job.total = count
    plan_visits(job)
    # Half of the mean weight: values that have less make up less than half of the whole, and may
    # hold anything, as under a mask the padding's filler.
    choose_sample(
        &job.reduce, job.total / count / 2 if job.reduces and not job.op.takes_dout else 0
    )
    job.has_options = job.reduce.gate != NONE or (
        job.array[R] != NULL or job.array[D] != NULL or job.array[W] != NULL
    )
    make_schedule(job)
    size_scratch(job)
    if not job.own_values:
        n_values = (n_own_values(job) + (4 * job.reduce.n_chunks if job.reduces else 0)) * n
        n_values = (n_values + 7) // 8 * 8
    memory = <char*> malloc(
        n_values * sizeof(double) + job.schedule.n_threads * job.scratch_bytes + 64
    )
    if memory == NULL:
        raise MemoryError("bn_fast: no memory for the scratch of this call")
    try:
        job.scratch = <char*> ((<size_t> memory + 63) // 64 * 64)
        lay_out(job, <double*> job.scratch, n, 0)
        job.scratch += n_values * sizeof(double)
        job.schedule.n_threads = bn_startable(job.schedule.n_threads)
        if job.schedule.n_threads <= 1 and size < HELD_SIZE:
            run_natively(job)
        else:
            with nogil:
                run_natively(job)
    finally:
        free(memory)
        for v in range(N_VALUES):
            if not job.given[v]:
                job.value[v] = NULL
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


cdef void new_job(
    Job* job, int operation, cnp.ndarray x, cnp.ndarray stats, int axis, int n_threads,
) noexcept:
    """stats: mean, the mean's low part, inv_std and var: float64 (4, n_features), contiguous."""
    cdef Py_ssize_t n = cnp.PyArray_DIMS(stats)[1]
    cdef int k
    memset(job, 0, <char*> &job.reduce - <char*> job)
    job.op = &operations[1 if storage_of(x) == FLOAT64 else 0][operation]
    job.features = <unsigned long long> 1 << axis
    job.n_features = n
    job.n_threads = n_threads
    job.eps = -1
    job.exact_mean = True
    bring(job, X, x)
    for k in range(4):
        job.value[MEAN + k] = <double*> cnp.PyArray_DATA(stats) + k * n
    job.value[MULTIPLIER] = job.value[INV_STD]


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


cpdef tuple forward(
    cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray beta, int axis, double eps, cnp.ndarray out,
    cnp.ndarray stats, int n_threads, int activation=0, double negative_slope=0,
    cnp.ndarray residual=None, cnp.ndarray weights=None, double total=0,
):
    """Normalize x along every axis but one.

    stats: mean, the mean's low part, inv_std and var, float64 (4, n_features), contiguous; None for
    those of the batch, which alone need eps.  activation: a value of `activations`.  residual and
    weights have the shape and dtype of x, and total is the sum of the weights of a feature.
    Returns out (new if None) and stats.
    """
    cdef Job job
    cdef Py_ssize_t f, n = cnp.PyArray_DIMS(x)[axis]
    cdef bint frozen = stats is not None
    if frozen and not are_statistics(stats, n):
        raise ValueError("stats must be float64, contiguous and of shape (4, n_features)")
    if out is None:
        out = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    if not frozen:
        stats = new_statistics(n)
    new_job(&job, FROZEN if frozen else FORWARD, x, stats, axis, n_threads)
    bring(&job, R, residual)
    bring(&job, Y, out)
    bring(&job, W, weights)
    set_parameter(&job.gamma_given, gamma)
    set_parameter(&job.beta_given, beta)
    job.reduces = not frozen
    job.applies = True
    job.activation = activation
    job.negative_slope = negative_slope
    job.total = total
    job.eps = eps
    if job.reduces and cnp.PyArray_SIZE(x) == 0:
        for f in range(4 * n):
            job.value[MEAN][f] = NAN
    execute(&job)
    return out, stats


cdef void store_parameter(const double* values, cnp.ndarray target) noexcept:
    cdef Py_ssize_t f
    for f in range(cnp.PyArray_DIMS(target)[0]):
        if cnp.PyArray_TYPE(target) == cnp.NPY_FLOAT32:
            (<float*> cnp.PyArray_DATA(target))[f] = <float> values[f]
        else:
            (<double*> cnp.PyArray_DATA(target))[f] = values[f]


cpdef tuple backward(
    cnp.ndarray dout, cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray stats, int axis, double eps,
    cnp.ndarray out, bint frozen, bint exact_mean, int n_threads, int activation=0,
    double negative_slope=0, cnp.ndarray beta=None, cnp.ndarray residual=None,
    cnp.ndarray weights=None, double total=0, bint needs_dx=True, bint needs_sums=True,
    bint needs_dresidual=False,
):
    """Gradients dx (in out, new if None), dgamma, dbeta from dout and the forward's x and stats;
    and dresidual where it is needed.

    eps: negative where it is not known.  frozen: the statistics were given, so dx = gamma inv_std
    dout.  exact_mean: they are x's own.  beta and what follows: as in forward; beta and residual
    are read only for an activation.  What is not needed is not computed, dgamma and dbeta then
    mean nothing.
    """
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
    new_job(&job, FROZEN_BACKWARD if frozen else BACKWARD, x, stats, axis, n_threads)
    bring(&job, G, dout)
    bring(&job, R, residual)
    bring(&job, Y, out)
    bring(&job, D, dresidual)
    bring(&job, W, weights)
    set_parameter(&job.gamma_given, gamma)
    set_parameter(&job.beta_given, beta)
    job.reduces = needs_sums or needs_dresidual or (needs_dx and not frozen)
    job.applies = needs_dx
    job.activation = activation
    job.negative_slope = negative_slope
    # With weights dout has no shift, and M = 2 no form of its own.
    job.exact_mean = exact_mean and weights is None
    job.eps = eps if weights is None else -1
    job.total = total
    job.value[DGAMMA] = sums
    job.value[DBETA] = sums + n
    try:
        execute(&job)
        store_parameter(sums, dgamma)
        store_parameter(sums + n, dbeta)
    finally:
        free(sums)
    return (out, dgamma, dbeta) if dresidual is None else (out, dgamma, dbeta, dresidual)


# ---------------------------------------------------------------- one visit alone
#
# The pieces from which statistics and gradients over several arrays are put together.

def moments(
    cnp.ndarray x not None, int axis, int n_threads, cnp.ndarray weights=None, double total=0,
):
    """stats of x, as forward has them with eps = 0; x has at least one element.  weights and total
    are forward's too."""
    cdef Job job
    cdef cnp.ndarray stats = new_statistics(cnp.PyArray_DIMS(x)[axis])
    new_job(&job, FORWARD, x, stats, axis, n_threads)
    bring(&job, W, weights)
    job.reduces = True
    job.eps = 0
    job.total = total
    execute(&job)
    return stats


def backward_sums(
    cnp.ndarray dout not None, cnp.ndarray x not None, cnp.ndarray stats not None, int axis,
    int n_threads, bint normalized=False,
):
    """sum dout (x - mean), times inv_std if `normalized`, and sum dout as float64 (2, n_features),
    whatever x has to do with stats."""
    cdef Job job
    cdef Py_ssize_t f, n = cnp.PyArray_DIMS(x)[axis]
    cdef cnp.npy_intp shape[2]
    cdef cnp.ndarray sums, ones
    shape[0] = 2
    shape[1] = n
    sums = cnp.PyArray_ZEROS(2, shape, cnp.NPY_FLOAT64, 0)
    ones = cnp.PyArray_EMPTY(1, &shape[1], cnp.NPY_FLOAT64, 0)
    new_job(&job, BACKWARD, x, stats, axis, n_threads)
    bring(&job, G, dout)
    job.reduces = True
    job.exact_mean = False
    if not normalized:
        job.value[MULTIPLIER] = <double*> cnp.PyArray_DATA(ones)
        for f in range(n):
            (<double*> cnp.PyArray_DATA(ones))[f] = 1
    job.value[DGAMMA] = <double*> cnp.PyArray_DATA(sums)
    job.value[DBETA] = job.value[DGAMMA] + n
    execute(&job)
    return sums


def backward_dx(
    cnp.ndarray dout not None, cnp.ndarray x not None, cnp.ndarray gamma not None,
    cnp.ndarray stats not None, cnp.ndarray sums not None, double total, int axis,
    cnp.ndarray out, int n_threads,
):
    """dx (in out, new if None) = gamma inv_std (dout - dbeta / total - x_hat dgamma / total), where
    sums, float64 (2, n_features), are dgamma and dbeta over all parts, and total counts them."""
    cdef Job job
    cdef Py_ssize_t n = cnp.PyArray_DIMS(x)[axis]
    if out is None:
        out = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    new_job(&job, BACKWARD, x, stats, axis, n_threads)
    bring(&job, G, dout)
    bring(&job, Y, out)
    set_parameter(&job.gamma_given, gamma)
    job.applies = True
    job.exact_mean = False
    job.total = total
    job.value[DGAMMA] = <double*> cnp.PyArray_DATA(sums)
    job.value[DBETA] = job.value[DGAMMA] + n
    execute(&job)
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

cdef int sum_pair(Job* job, cnp.ndarray other, double* mean, double* along) except -1:
    """Backward's sums of the job's array, which has its statistics, and another: its mean (two
    rows) and that of its product with x_hat, also where the sum leaves the range."""
    cdef Py_ssize_t f, n = job.n_features
    cdef double m = <double> (cnp.PyArray_SIZE(other) // n)
    cdef double* total = job.value[DGAMMA]
    job.reduces = True
    job.value[MEAN_GX] = along
    if mean != NULL:
        job.value[MEAN_G] = mean
        job.value[MEAN_G_LOW] = mean + n
    bring(job, G, other)
    execute(job)
    job.value[MEAN_G] = job.value[MEAN_G_LOW] = NULL
    for f in range(n):
        along[f] = total[f] / m if isfinite(total[f]) else along[f]
    return 0


cdef int sum_pairs(
    double* v, cnp.ndarray ddx, cnp.ndarray dout, cnp.ndarray x, cnp.ndarray stats, int axis,
    bint frozen, bint exact_mean, int n_threads,
) except -1:
    """The five sums, into rows of n values from v on: the means of ddx and dout, two rows each,
    their mean product times inv_std, and those of ddx and dout with x_hat; then dgamma and another
    row."""
    cdef Job job
    cdef Py_ssize_t f, n = cnp.PyArray_DIMS(x)[axis]
    cdef double m = <double> (cnp.PyArray_SIZE(x) // n)
    cdef double* inv_std = <double*> cnp.PyArray_DATA(stats) + 2 * n
    cdef double* dgamma = v + 7 * n
    cdef cnp.ndarray plain = new_statistics(n)  # of dout: its mean, and the factor
    cdef double* value = <double*> cnp.PyArray_DATA(plain)
    if not frozen:
        new_job(&job, BACKWARD, x, stats, axis, n_threads)
        job.exact_mean = exact_mean
        job.value[DGAMMA] = dgamma
        job.value[DBETA] = dgamma + n
        sum_pair(&job, dout, v + 2 * n, v + 6 * n)
        sum_pair(&job, ddx, v, v + 5 * n)
    memcpy(value, v + 2 * n, 2 * n * sizeof(double))
    memcpy(value + 2 * n, inv_std, n * sizeof(double))  # a product alone may leave the range
    memset(value + 3 * n, 0, n * sizeof(double))
    new_job(&job, FROZEN_BACKWARD if frozen else PRODUCT, dout, plain, axis, n_threads)
    job.exact_mean = exact_mean
    job.value[DGAMMA] = dgamma
    job.value[DBETA] = dgamma + n
    sum_pair(&job, ddx, NULL, v + 4 * n)
    if not frozen:
        for f in range(n):
            dgamma[f] -= inv_std[f] * m * v[5 * n + f] * v[6 * n + f]
    return 0


def double_backward(
    cnp.ndarray ddx, cnp.ndarray ddgamma not None, cnp.ndarray ddbeta not None,
    cnp.ndarray dout not None, cnp.ndarray x not None, cnp.ndarray gamma not None,
    cnp.ndarray stats not None, int axis, double eps, bint frozen, bint exact_mean, int n_threads,
):
    """Gradients dx, dgamma, ddout of backward, from those of its three results.

    ddx, dout, x: of one dtype and shape; ddx None: zeros.  ddgamma and ddbeta: float64, contiguous.
    The rest as in backward.
    """
    cdef Job job
    cdef Py_ssize_t n = cnp.PyArray_DIMS(x)[axis]
    cdef cnp.npy_intp shape[2]
    cdef double* v
    cdef cnp.ndarray values, dgamma, dx, ddout
    cdef int k
    cdef int* names = [MEAN_R, MEAN_R_LOW, MEAN_G, MEAN_G_LOW, PRODUCT_GR, ALONG_R, ALONG_G]
    dx = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    ddout = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    shape[0] = 9
    shape[1] = n
    values = cnp.PyArray_ZEROS(2, shape, cnp.NPY_FLOAT64, 0)
    v = <double*> cnp.PyArray_DATA(values)
    dgamma = cnp.PyArray_ZEROS(1, &shape[1], parameter_type(x), 0)
    if cnp.PyArray_SIZE(x) == 0:
        return dx, dgamma, ddout
    if ddx is None or frozen:
        # dx is that of backward, with ddgamma for gamma.
        new_job(&job, FROZEN_BACKWARD if frozen else BACKWARD, x, stats, axis, n_threads)
        bring(&job, G, dout)
        bring(&job, Y, dx)
        set_parameter(&job.gamma_given, ddgamma)
        job.reduces = not frozen
        job.applies = True
        job.exact_mean = exact_mean
        job.eps = eps
        job.value[DGAMMA] = v + 7 * n
        job.value[DBETA] = v + 8 * n
        execute(&job)
    if ddx is None:  # ddout is forward's output, with ddgamma and ddbeta for gamma and beta
        new_job(&job, FROZEN, x, stats, axis, n_threads)
        bring(&job, Y, ddout)
        set_parameter(&job.gamma_given, ddgamma)
        set_parameter(&job.beta_given, ddbeta)
        job.applies = True
        execute(&job)
        return dx, dgamma, ddout
    sum_pairs(v, ddx, dout, x, stats, axis, frozen, exact_mean, n_threads)
    store_parameter(v + 7 * n, dgamma)
    new_job(&job, SECOND, x, stats, axis, n_threads)
    bring(&job, R, ddx)
    bring(&job, D, ddout)
    if not frozen:
        bring(&job, G, dout)
        bring(&job, Y, dx)
    set_parameter(&job.gamma_given, gamma)
    job.applies = True
    for k in range(7):
        job.value[names[k]] = v + k * n
    job.value[DDGAMMA] = <double*> cnp.PyArray_DATA(ddgamma)
    job.value[DDBETA] = <double*> cnp.PyArray_DATA(ddbeta)
    execute(&job)
    return dx, dgamma, ddout


# ---------------------------------------------------------------- norms
#
# A norm says which of x's axes a statistic is over, and along which gamma and beta lie.  Are these
# among the former, they vary within a statistic.

cdef double one = 1, zero = 0


cdef void set_constant(Parameter* given, const double* value) noexcept:
    given.data = <const char*> value
    given.stride = 0
    given.period = INTPTR_MAX
    given.single = False


cdef unsigned long long mask_of(tuple axes) except? 0:
    cdef unsigned long long mask = 0
    for axis in axes:
        mask |= <unsigned long long> 1 << <int> axis
    return mask


cdef bint are_within(cnp.ndarray x, unsigned long long over, unsigned long long along) noexcept:
    """Whether parameters vary within a statistic."""
    cdef int d
    for d in range(cnp.PyArray_NDIM(x)):
        if over >> d & along >> d & 1 and cnp.PyArray_DIMS(x)[d] > 1:
            return True
    return False


cdef cnp.ndarray native_parameter(cnp.ndarray values, cnp.ndarray x, Py_ssize_t n, double default):
    """values in the type of x's lanes, contiguous; None: n times the default."""
    cdef cnp.ndarray native
    cdef cnp.npy_intp length = n
    cdef int kind = parameter_type(x)
    cdef Py_ssize_t f
    if values is not None and cnp.PyArray_TYPE(values) == kind and (
        cnp.PyArray_ISCARRAY_RO(values)
    ):
        return values
    native = cnp.PyArray_EMPTY(1, &length, kind, 0)
    if values is not None:
        cnp.PyArray_CopyInto(native, values)
        return native
    for f in range(n):
        if kind == cnp.NPY_FLOAT32:
            (<float*> cnp.PyArray_DATA(native))[f] = <float> default
        else:
            (<double*> cnp.PyArray_DATA(native))[f] = default
    return native


cdef cnp.npy_intp place_parameters(Job* job, cnp.ndarray x, unsigned long long along) noexcept:
    """Strides of contiguous parameters along x's axes; returns how many these are."""
    cdef int d
    cdef cnp.npy_intp size = 8 if parameter_type(x) == cnp.NPY_FLOAT64 else 4, stride = size
    for d in range(cnp.PyArray_NDIM(x) - 1, -1, -1):
        job.varying.stride[d] = 0
        if along >> d & 1:
            job.varying.stride[d] = stride
            stride *= cnp.PyArray_DIMS(x)[d]
    return stride // size


cdef Py_ssize_t n_statistics(cnp.ndarray x, unsigned long long over) noexcept:
    cdef Py_ssize_t n = 1
    cdef int d
    for d in range(cnp.PyArray_NDIM(x)):
        if not over >> d & 1:
            n *= cnp.PyArray_DIMS(x)[d]
    return n


def norm_forward(
    cnp.ndarray x not None, cnp.ndarray gamma, cnp.ndarray beta, tuple over, tuple along,
    double eps, cnp.ndarray out, bint has_mean, int n_threads,
):
    """Normalize x over some of its axes, then scale and shift along some.

    gamma, beta: float32 or float64, one dimension, or None.  out: new if None.
    Returns out and the statistics, float64 (4, n) as `forward` has them.
    """
    cdef Job job
    cdef unsigned long long axes = mask_of(over), parameters = mask_of(along)
    cdef Py_ssize_t n = n_statistics(x, axes), size
    cdef cnp.ndarray stats = new_statistics(n)
    cdef cnp.ndarray scale, shift
    if out is None:
        out = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    if cnp.PyArray_SIZE(x) == 0:
        memset(cnp.PyArray_DATA(stats), 0, 4 * n * sizeof(double))
        return out, stats
    new_job(&job, FORWARD if has_mean else RMS_FORWARD, x, stats, 0, n_threads)
    job.features = ~axes
    job.by_row = True
    bring(&job, Y, out)
    set_constant(&job.gamma_given, &one)
    set_constant(&job.beta_given, &zero)
    if are_within(x, axes, parameters):  # without them too: the same rows, and so the same bits
        size = place_parameters(&job, x, parameters)
        scale = native_parameter(gamma, x, size, 1)
        shift = native_parameter(beta, x, size, 0)
        job.varying.gamma = <char*> cnp.PyArray_DATA(scale)
        job.varying.beta = <char*> cnp.PyArray_DATA(shift)
    else:
        if gamma is not None:
            set_parameter(&job.gamma_given, gamma)
        if beta is not None:
            set_parameter(&job.beta_given, beta)
    job.reduces = job.applies = True
    job.eps = eps
    execute(&job)
    return out, stats


cdef cnp.ndarray added_up(const double* high, const double* low, Py_ssize_t n_parts,
                          Py_ssize_t step, Py_ssize_t n, cnp.ndarray x):
    """The sums of n values over parts that lie `step` apart, with their low parts or NULL."""
    cdef cnp.npy_intp length = n
    cdef cnp.ndarray values = cnp.PyArray_ZEROS(1, &length, parameter_type(x), 0)
    cdef double* sums = <double*> calloc(2 * n + 1, sizeof(double))
    cdef Py_ssize_t part, k
    if sums == NULL:
        raise MemoryError("bn_fast: no memory for the sums of this call")
    for part in range(n_parts):
        add_compensated(sums, sums + n, high + part * step, n)
        if low != NULL:
            fold_halves(sums + n, low + part * step, n)
    for k in range(n):
        sums[k] = finish_sum(sums[k], sums[n + k])
    store_parameter(sums, values)
    free(sums)
    return values


cdef cnp.ndarray with_mean_of(
    cnp.ndarray x, cnp.ndarray stats, unsigned long long over, int n_threads,
):
    """stats with the mean of x in place of one that has been rounded."""
    cdef Job job
    cdef Py_ssize_t n = cnp.PyArray_DIMS(stats)[1]
    cdef cnp.ndarray own = new_statistics(n)
    new_job(&job, FORWARD, x, own, 0, n_threads)
    job.features = ~over
    job.by_row = job.reduces = True
    job.eps = 0
    execute(&job)
    memcpy(
        <double*> cnp.PyArray_DATA(own) + 2 * n, <double*> cnp.PyArray_DATA(stats) + 2 * n,
        2 * n * sizeof(double),
    )
    return own


def norm_backward(
    cnp.ndarray dout not None, cnp.ndarray x not None, cnp.ndarray gamma,
    cnp.ndarray stats not None, tuple over, tuple along, double eps, cnp.ndarray out,
    bint has_mean, bint exact_mean, int n_threads, bint needs_dx, bint needs_sums,
):
    """Gradients dx (in out, new if None), dgamma and dbeta, of norm_forward; None for those that
    are not needed.  eps: negative where it is not known."""
    cdef Job job
    cdef unsigned long long axes = mask_of(over), parameters = mask_of(along)
    cdef Py_ssize_t n = cnp.PyArray_DIMS(stats)[1], size, units = 0
    cdef bint within = are_within(x, axes, parameters)
    cdef cnp.ndarray scale, dgamma = None, dbeta = None
    cdef double* sums
    if out is None and needs_dx:
        out = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    if has_mean and not exact_mean and cnp.PyArray_SIZE(x):
        stats = with_mean_of(x, stats, axes, n_threads)
    new_job(&job, BACKWARD if has_mean else RMS_BACKWARD, x, stats, 0, n_threads)
    size = place_parameters(&job, x, parameters)
    if cnp.PyArray_SIZE(x) == 0:
        if needs_sums:
            dgamma = added_up(NULL, NULL, 0, 0, size, x)
            dbeta = added_up(NULL, NULL, 0, 0, size, x)
        return out, dgamma, dbeta
    job.features = ~axes
    job.by_row = True
    bring(&job, G, dout)
    bring(&job, Y, out)
    set_constant(&job.gamma_given, &one)
    if within:
        scale = native_parameter(gamma, x, size, 1)
        job.varying.gamma = job.varying.beta = <char*> cnp.PyArray_DATA(scale)
        job.varying.size = size
        if needs_sums:
            units = min(<Py_ssize_t> MAX_UNITS, (n + FOLD_ROWS - 1) // FOLD_ROWS)
            job.varying.unit = 1
    elif gamma is not None:
        set_parameter(&job.gamma_given, gamma)
    job.reduces = needs_dx or (needs_sums and not within)
    job.applies = needs_dx
    job.exact_mean = has_mean
    job.eps = eps
    sums = <double*> calloc(2 * n + 4 * units * size + 1, sizeof(double))
    if sums == NULL:
        raise MemoryError("bn_fast: no memory for the sums of this call")
    job.value[DBETA] = sums
    job.value[DGAMMA] = sums + n
    job.varying.totals = sums + 2 * n
    try:
        if job.reduces or units:
            job.reduces = True
            execute(&job)
        if needs_sums and within:
            sums += 2 * n
            units = (n + job.varying.unit - 1) // job.varying.unit
            dbeta = added_up(sums, sums + size, units, 4 * size, size, x)
            dgamma = added_up(sums + 2 * size, sums + 3 * size, units, 4 * size, size, x)
            sums -= 2 * n
        elif needs_sums:
            dbeta = added_up(sums, NULL, n // size, size, size, x)
            dgamma = added_up(sums + n, NULL, n // size, size, size, x)
    finally:
        free(sums)
    return out, dgamma, dbeta


# ---------------------------------------------------------------- the straight road
#
# Whether arguments need no conversion and no check, and the small calls for which that is all, in
# one piece.  Checked one by one in Python they cost more than the engine's work: (32, 64) with a
# bn_param 6.3 us, of which the engine 2.

cdef inline bint is_plain_array(object array) noexcept:
    """An ndarray proper, float16, float32 or float64, aligned and native."""
    cdef int kind
    if not cnp.PyArray_CheckExact(array):
        return False
    kind = cnp.PyArray_TYPE(array)
    return (
        kind == cnp.NPY_FLOAT32 or kind == cnp.NPY_FLOAT64 or kind == cnp.NPY_FLOAT16
    ) and cnp.PyArray_ISBEHAVED_RO(array)


cdef bint is_plain_twin(object array, cnp.ndarray like) noexcept:
    """A plain array with the type and shape of another."""
    cdef int d
    if (
        not is_plain_array(array)
        or cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(like)
        or cnp.PyArray_NDIM(array) != cnp.PyArray_NDIM(like)
    ):
        return False
    for d in range(cnp.PyArray_NDIM(like)):
        if cnp.PyArray_DIMS(array)[d] != cnp.PyArray_DIMS(like)[d]:
            return False
    return True


cdef bint is_plain_output(object out, cnp.ndarray like, cnp.ndarray other) noexcept:
    """None, or a contiguous array to write to, away from the inputs or exactly the first."""
    if out is None:
        return True
    return (
        is_plain_twin(out, like)
        and cnp.PyArray_ISWRITEABLE(out)
        and (cnp.PyArray_IS_C_CONTIGUOUS(out) or cnp.PyArray_IS_F_CONTIGUOUS(out))
        and (not overlap(out, like) or is_same_buffer(out, like))
        and (other is None or not overlap(out, other))
    )


cdef bint is_plain_parameter(object values, Py_ssize_t n) noexcept:
    return (
        is_plain_array(values) and cnp.PyArray_TYPE(values) != cnp.NPY_FLOAT16
        and cnp.PyArray_NDIM(values) == 1
        and cnp.PyArray_DIMS(values)[0] == n
    )


cpdef bint is_plain(x, gamma, beta, axis, out) noexcept:
    """Whether a forward call's arguments need no conversion and no check."""
    cdef Py_ssize_t n
    if not is_plain_array(x) or cnp.PyArray_NDIM(x) < 2:
        return False
    if type(axis) is not int or not 0 <= axis < cnp.PyArray_NDIM(x):
        return False
    n = cnp.PyArray_DIMS(x)[<int> axis]
    return (
        is_plain_parameter(gamma, n) and is_plain_parameter(beta, n)
        and is_plain_output(out, x, None)
        and (out is None or not (overlap(out, gamma) or overlap(out, beta)))
    )


cpdef bint is_plain_gradient(dout, cnp.ndarray x, cnp.ndarray gamma, out) noexcept:
    """The same for a backward call, whose x and gamma have been checked before."""
    return (
        is_plain_twin(dout, x) and is_plain_output(out, dout, x)
        and (out is None or not overlap(out, gamma))
    )


cpdef bint are_plain_statistics(mean, var, Py_ssize_t n_features) noexcept:
    """Whether running averages, None for the defaults, need no conversion and no check; no variance
    is negative."""
    cdef char* data
    cdef Py_ssize_t f, stride
    if mean is not None and not is_plain_parameter(mean, n_features):
        return False
    if var is None:
        return True
    if not is_plain_parameter(var, n_features):
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


cdef bint is_plain_number(object value, double lowest, double* number) noexcept:
    """Whether it is a finite float, above `lowest` or equal to it."""
    if type(value) is not float:
        return False
    number[0] = value
    return lowest <= number[0] and fabs(number[0]) < INFINITY


cdef bint is_plain_activation(object name, int* code) noexcept:
    """Whether it is None or one of `activations`, which has the code."""
    code[0] = IDENTITY
    if name is None:
        return True
    if type(name) is not str or name not in activations:
        return False
    code[0] = activations[name]
    return True


cdef bint is_plain_residual(object residual, cnp.ndarray x, object out) noexcept:
    return residual is None or (
        is_plain_twin(residual, x)
        and (out is None or not overlap(out, residual) or is_same_buffer(out, residual))
    )


cdef object default_eps = 1e-5
cdef object default_momentum = 0.9


def plain_forward(
    x, gamma, beta, bn_param, axis, out, activation, negative_slope, residual, Py_ssize_t size,
):
    """A call of batchnorm_forward that takes a straight road, of fewer than `size` elements.

    Returns x, gamma, out, stats, eps, whether the statistics were given, and the fields of Options
    or None; or None alone, and nothing is done, where an argument needs a closer look.
    """
    cdef double eps = 1e-5, momentum = 0.9, slope
    cdef bint train = True
    cdef int code, n_known
    cdef cnp.ndarray y, stats, mean = None, var = None
    cdef const char* batch
    cdef Py_ssize_t row
    cdef tuple kept = None
    if not (
        is_plain(x, gamma, beta, axis, out) and 0 < cnp.PyArray_SIZE(x) < size
        and is_plain_activation(activation, &code)
        and is_plain_number(negative_slope, -INFINITY, &slope)
        and is_plain_residual(residual, x, out)
    ):
        return None
    if activation is not None or residual is not None:
        spoilt = code != IDENTITY and out is not None and residual is not None and (
            is_same_buffer(out, residual)
        )
        kept = activation, negative_slope, beta, residual, None, 0.0, spoilt
    if bn_param is None:
        y, stats = forward(
            x, gamma, beta, axis, eps, out, None, 1, code, slope, residual, None, 0
        )
        return x, gamma, y, stats, default_eps, False, kept
    if type(bn_param) is not dict:
        return None
    mode = (<dict> bn_param).get("mode")
    if type(mode) is not str:
        return None
    train = mode == "train"
    given_eps = (<dict> bn_param).get("eps", default_eps)
    given_momentum = (<dict> bn_param).get("momentum", default_momentum)
    old_mean = (<dict> bn_param).get("running_mean")
    old_var = (<dict> bn_param).get("running_var")
    n_known = (
        1 + (given_eps is not default_eps) + (given_momentum is not default_momentum)
        + (old_mean is not None) + (old_var is not None)
    )
    if not (
        n_known == len(<dict> bn_param)  # no key is unknown, nor stands for a default
        and (train or mode == "test") and is_plain_number(given_eps, 0, &eps)
        and is_plain_number(given_momentum, -INFINITY, &momentum)
        and are_plain_statistics(old_mean, old_var, cnp.PyArray_DIMS(x)[<int> axis])
    ):
        return None
    # Made before anything is written to out: there may be no memory, and out may lie over them.
    mean = running_average(old_mean, x, axis)
    var = running_average(old_var, x, axis)
    y, stats = forward(
        x, gamma, beta, axis, eps, out, None if train else given_statistics(mean, var, eps), 1,
        code, slope, residual, None, 0,
    )
    if train:
        batch = <char*> cnp.PyArray_DATA(stats)
        row = cnp.PyArray_STRIDES(stats)[0]
        average_in(mean, batch, sizeof(double), momentum, 1 - momentum)
        average_in(var, batch + 3 * row, sizeof(double), momentum, 1 - momentum)
    bn_param["running_mean"] = mean
    bn_param["running_var"] = var
    return x, gamma, y, stats, given_eps, not train, kept


cdef bint is_plain_cache(object x, object gamma, object stats, object axis, object eps) noexcept:
    """Whether what a forward call left is what backward reads: it can be changed by hand."""
    cdef Py_ssize_t n
    cdef double number
    if not is_plain_array(x) or type(axis) is not int:
        return False
    if not is_plain_number(eps, -INFINITY, &number):
        return False
    if not 0 <= axis < cnp.PyArray_NDIM(x) or cnp.PyArray_NDIM(x) < 2:
        return False
    n = cnp.PyArray_DIMS(x)[<int> axis]
    return (
        is_plain_parameter(gamma, n) and is_plain_array(stats)
        and cnp.PyArray_TYPE(stats) == cnp.NPY_FLOAT64 and cnp.PyArray_IS_C_CONTIGUOUS(stats)
        and cnp.PyArray_NDIM(stats) == 2
        and cnp.PyArray_DIMS(stats)[0] == 4 and cnp.PyArray_DIMS(stats)[1] == n
    )


def plain_backward(
    dout, x, gamma, stats, axis, eps, out, bint frozen, bint exact_mean, options, Py_ssize_t size,
):
    """The same for batchnorm_backward, with what the forward call left; returns all gradients."""
    cdef int code = IDENTITY
    cdef double slope = 0
    activation = beta = residual = weights = None
    spoilt = False
    if not is_plain_cache(x, gamma, stats, axis, eps):
        return None
    if options is not None:
        if not isinstance(options, tuple) or len(options) != 7:
            return None
        activation, given_slope, beta, residual, weights, _, spoilt = options
        if (
            type(given_slope) is not float or not is_plain_residual(residual, x, None)
            or not is_plain_parameter(beta, cnp.PyArray_DIMS(x)[<int> axis])
        ):
            return None
        slope = given_slope
    if (
        not is_plain_gradient(dout, x, gamma, out) or cnp.PyArray_SIZE(x) >= size
        or not is_plain_activation(activation, &code) or weights is not None or spoilt
        or (out is not None and beta is not None and overlap(out, beta))
        or (out is not None and residual is not None and overlap(out, residual))
    ):
        return None
    return backward(
        dout, x, gamma, stats, axis, eps, out, frozen, exact_mean, 1, code, slope, beta,
        residual, None, 0, True, True, residual is not None,
    )
