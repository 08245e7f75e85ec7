# Norms whose statistics are others than batch norm's.  A norm says over which of x's axes a
# statistic is, and along which gamma and beta lie:
#
#     norm        statistics over      gamma, beta along    so that they are
#     instance    places               channels             constants of the features (n, c)
#     group       C/G, places          groups, C/G          varying within the features (n, g)
#     layer, RMS  any axes             the same axes        varying within the features, the others
#
# Rows of features with constants of their own are the layout ROWS; short ones are taken as columns.
# What varies within a statistic has roles (S, B) and is multiplied in by the formulas SCALED and
# SCALED_GRADIENT, or on the way of rows (filters.pxi); its gradients: parameters.pxi.

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


cdef tuple norm_of(
    cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray beta, unsigned long long over,
    unsigned long long along, double eps, cnp.ndarray out, int operation, int n_threads,
    bint keeps,
):
    """out and the statistics, which are None if they are not to be kept."""
    cdef Job job
    cdef Py_ssize_t n = n_along(x, ~over), size
    cdef cnp.ndarray stats = new_statistics(n if keeps else 0)
    cdef cnp.ndarray scale, shift
    cdef int k
    if out is None:
        out = new_result(x)
    if cnp.PyArray_SIZE(x) == 0:
        memset(cnp.PyArray_DATA(stats), 0, cnp.PyArray_NBYTES(stats))
        return out, stats if keeps else None
    new_job(&job, operation, x, stats, ~over, n_threads)
    job.n_features = n
    for k in range(MEAN, MULTIPLIER + 1):
        job.value[k] = job.value[k] if keeps else NULL
    job.by_row = True
    bring(&job, Y, out)
    set_constant(&job.gamma_given, &one)
    set_constant(&job.beta_given, &zero)
    if are_within(x, over, along):  # without them too: the same rows, and so the same bits
        size = place_parameters(&job, x, along)
        scale = native_parameter(gamma, x, size, 1)
        shift = native_parameter(beta, x, size, 0)
        job.varying.gamma = <char*> cnp.PyArray_DATA(scale)
        job.varying.beta = <char*> cnp.PyArray_DATA(shift)
    else:
        set_parameter(&job.gamma_given, gamma, &one)
        set_parameter(&job.beta_given, beta, &zero)
    job.reduces = job.applies = True
    job.eps = eps
    execute(&job)
    return out, stats if keeps else None


def norm_forward(
    cnp.ndarray x not None, cnp.ndarray gamma, cnp.ndarray beta, tuple over, tuple along,
    double eps, cnp.ndarray out, bint has_mean, int n_threads, bint keeps=True,
):
    """Normalize x over some of its axes, then scale and shift along some.

    gamma, beta: float32 or float64, one dimension, or None.  out: new if None.
    Returns out and the statistics, float64 (4, n) as `forward` has them, if they are to be kept.
    """
    return norm_of(
        x, gamma, beta, mask_of(over), mask_of(along), eps, out,
        FORWARD if has_mean else RMS_FORWARD, n_threads, keeps,
    )


def plain_rows(
    x, gamma, beta, axis, eps, out, bint has_mean, bint keeps, Py_ssize_t size,
):
    """The straight road of layer and RMS norm over the last axis, of fewer than `size` elements.

    Returns what `norm_forward` does, or None, and nothing is done, where an argument needs a closer
    look.
    """
    cdef double number = 1e-5
    cdef int last
    cdef unsigned long long mask
    if not is_plain_array(x) or type(axis) is not int or cnp.PyArray_NDIM(x) < 1:
        return None
    last = cnp.PyArray_NDIM(x) - 1
    if not (
        (axis == -1 or axis == last) and 0 < cnp.PyArray_SIZE(x) < size
        and is_plain_parameter(gamma, cnp.PyArray_DIMS(x)[last])
        and is_plain_parameter(beta, cnp.PyArray_DIMS(x)[last])
        and (eps is None or is_plain_number(eps, 0, &number)) and is_plain_output(out, x)
        and are_apart(out, gamma) and are_apart(out, beta)
    ):
        return None
    mask = <unsigned long long> 1 << last
    return norm_of(
        x, gamma, beta, mask, mask, number, out, FORWARD if has_mean else RMS_FORWARD, 1, keeps
    )


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


cdef bint is_in_order_of(cnp.ndarray out, cnp.ndarray x) noexcept:
    """Whether axes that merge in x do so in out."""
    cdef cnp.npy_intp* shape = cnp.PyArray_DIMS(x)
    cdef bint same = True, falls = True, rises = True
    cdef Py_ssize_t step, before = -1
    cdef int d
    for d in range(cnp.PyArray_NDIM(x)):
        if shape[d] == 1:
            continue
        step = distance(cnp.PyArray_STRIDES(x)[d])
        same = same and cnp.PyArray_STRIDES(x)[d] == cnp.PyArray_STRIDES(out)[d]
        falls = falls and (before < 0 or step < before)
        rises = rises and (before < 0 or step > before)
        before = step
    return (
        same or (falls and cnp.PyArray_IS_C_CONTIGUOUS(out))
        or (rises and cnp.PyArray_IS_F_CONTIGUOUS(out))
    )


cdef cnp.ndarray with_mean_of(
    cnp.ndarray x, cnp.ndarray stats, unsigned long long over, int n_threads,
):
    """stats with the mean of x in place of one that has been rounded."""
    cdef Job job
    cdef Py_ssize_t n = cnp.PyArray_DIMS(stats)[1]
    cdef cnp.ndarray own = new_statistics(n)
    new_job(&job, FORWARD, x, own, ~over, n_threads)
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
    cdef cnp.ndarray scale, dgamma = None, dbeta = None, given = out
    cdef double* sums
    # The order of sums must not depend on the strides of out.
    if needs_dx and (out is None or (within and needs_sums and not is_in_order_of(out, x))):
        out = new_result(x)
    if has_mean and not exact_mean and cnp.PyArray_SIZE(x):
        stats = with_mean_of(x, stats, axes, n_threads)
    new_job(&job, BACKWARD if has_mean else RMS_BACKWARD, x, stats, ~axes, n_threads)
    size = place_parameters(&job, x, parameters)
    if cnp.PyArray_SIZE(x) == 0:
        if needs_sums:
            dgamma = added_up(NULL, NULL, 0, 0, size, x)
            dbeta = added_up(NULL, NULL, 0, 0, size, x)
        return out, dgamma, dbeta
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
    else:
        set_parameter(&job.gamma_given, gamma, &one)
    job.reduces = True  # the constants of x_hat come after the sums
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
        if needs_dx or needs_sums:
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
    if given is not None and out is not given:
        cnp.PyArray_CopyInto(given, out)
    return out, dgamma, dbeta
