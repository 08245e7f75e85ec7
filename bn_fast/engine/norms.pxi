# Norms whose statistics are others than batch norm's.  A norm says over which of x's axes a
# statistic is, and along which gamma and beta lie:
#
#     norm        statistics over      gamma, beta along    so that they are
#     instance    places               channels             constants of the features (n, c)
#     group       C/G, places          channels             the same; C/G features share statistics
#     layer, RMS  any axes             the same axes        varying within the features, the others
#
# Rows of features with constants of their own are the layout ROWS; short ones are taken as columns.
# What features share: cells.pxi.  What varies within a statistic has roles (S, B) and is multiplied
# in by the formulas SCALED and SCALED_GRADIENT, or on the way of rows (filters.pxi); its gradients:
# parameters.pxi.  Groups without places, (N, C), are rows whose gamma varies too.

cdef enum:
    MAX_DEFAULTS = 4096


cdef cnp.ndarray filled(int kind, Py_ssize_t n, double value):
    cdef cnp.npy_intp length = n
    cdef cnp.ndarray values = cnp.PyArray_ZEROS(1, &length, kind, 0)
    if value != 0:
        values.fill(value)
    return values


# What gamma and beta are where they are not given, of most calls; made once.
cdef tuple defaults = (
    (filled(cnp.NPY_FLOAT32, MAX_DEFAULTS, 0), filled(cnp.NPY_FLOAT32, MAX_DEFAULTS, 1)),
    (filled(cnp.NPY_FLOAT64, MAX_DEFAULTS, 0), filled(cnp.NPY_FLOAT64, MAX_DEFAULTS, 1)),
)


cdef cnp.ndarray native_parameter(cnp.ndarray values, cnp.ndarray x, Py_ssize_t n, bint default):
    """values in the type of x's lanes, contiguous; None: n times the default, or more."""
    cdef cnp.ndarray native
    cdef cnp.npy_intp length = n
    cdef int kind = parameter_type(x)
    if values is None:
        return (
            defaults[kind == cnp.NPY_FLOAT64][default] if n <= MAX_DEFAULTS
            else filled(kind, n, default)
        )
    if cnp.PyArray_TYPE(values) == kind and cnp.PyArray_ISCARRAY_RO(values):
        return values
    native = cnp.PyArray_EMPTY(1, &length, kind, 0)
    cnp.PyArray_CopyInto(native, values)
    return native


cdef void place_parameters(Job* job, cnp.ndarray x, unsigned long long along) noexcept:
    """Strides of contiguous parameters along x's axes."""
    cdef int d
    cdef cnp.npy_intp size = 8 if parameter_type(x) == cnp.NPY_FLOAT64 else 4, stride = size
    for d in range(cnp.PyArray_NDIM(x) - 1, -1, -1):
        job.varying.stride[d] = 0
        if along >> d & 1:
            job.varying.stride[d] = stride
            stride *= cnp.PyArray_DIMS(x)[d]


cdef struct Norm:             # a norm of an array
    unsigned long long over   # the axes that its statistics are over,
    unsigned long long along  # and those of its parameters
    Py_ssize_t cells          # neighbors along these that share a statistic
    bint cut                  # the channels are seen as two axes


cdef int find_norm(cnp.ndarray x, axes, Norm* norm) except -1:
    """axes: Axes (_cache.py), which fit x.  Groups of cells that have places need no cut."""
    cdef unsigned long long channels
    shape, over, along = axes
    norm.over, norm.along, norm.cells = mask_of(over), mask_of(along), 1
    norm.cut = len(shape) > cnp.PyArray_NDIM(x)
    if not norm.cut:
        return 0
    channels = <unsigned long long> 1 << <int> along[0]
    if cnp.PyArray_SIZE(x) > n_along(x, channels | 1):  # there are places
        norm.along, norm.over = channels, ~(channels | 1)
        norm.cells = shape[along[1]]
        norm.cut = False
    return 0


cdef inline Py_ssize_t n_statistics(cnp.ndarray seen, const Norm* norm) noexcept:
    return n_along(seen, ~norm.over) // norm.cells


cdef inline bint are_within(cnp.ndarray seen, const Norm* norm) noexcept:
    """Whether parameters vary within a statistic."""
    return n_along(seen, norm.over & norm.along) > 1


cdef cnp.ndarray seen_by(const Norm* norm, cnp.ndarray array, axes):
    """The array (or None) as the norm has it: its own, but for the channels, which may be two.
    (Not by `reshape`, which forgets the strides of axes of length 1: a sample alone would be
    another layout, of other bits.)"""
    cdef cnp.npy_intp[MAX_DIMS] size
    cdef cnp.npy_intp[MAX_DIMS] stride
    cdef cnp.ndarray seen
    cdef int d, n, channels
    if array is None or not norm.cut:
        return array
    shape, _, along = axes
    n = len(shape)
    channels = along[0]
    for d in range(n):
        size[d] = shape[d]
        stride[d] = cnp.PyArray_STRIDES(array)[d if d <= channels else d - 1]
    stride[channels] *= size[channels + 1]
    seen = cnp.PyArray_New(
        cnp.ndarray, n, size, cnp.PyArray_TYPE(array), stride, cnp.PyArray_DATA(array),
        0, cnp.PyArray_FLAGS(array) & cnp.NPY_ARRAY_WRITEABLE, None,
    )
    cnp.set_array_base(seen, array)
    return seen


cdef cnp.ndarray in_line(cnp.ndarray values):
    """A parameter (or None) of any shape as one of one dimension."""
    return values if values is None or cnp.PyArray_NDIM(values) == 1 else values.ravel()


cdef void start_norm(
    Job* job, int operation, cnp.ndarray x, cnp.ndarray stats, const Norm* norm, bint keeps,
    int n_threads,
) noexcept:
    """As `new_job`.  Statistics that features share are not theirs; nor are some that nobody keeps.
    """
    cdef int k
    new_job(job, operation, x, stats, ~norm.over, n_threads)
    job.by_row = True
    job.cells = norm.cells
    job.n_features = n_along(x, ~norm.over)
    if keeps and norm.cells > 1:
        job.shared = job.value[MEAN]
    for k in range(MEAN, MULTIPLIER + 1):
        job.value[k] = job.value[k] if keeps and norm.cells == 1 else NULL


cdef cnp.ndarray norm_of(
    cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray beta, const Norm* norm, double eps,
    cnp.ndarray out, int operation, int n_threads, bint keeps,
):
    """Fills out, of the shape of x; returns the statistics, None if they are not to be kept."""
    cdef Job job
    cdef Py_ssize_t size
    cdef cnp.ndarray stats = new_statistics(n_statistics(x, norm) if keeps else 0)
    cdef cnp.ndarray scale, shift
    if cnp.PyArray_SIZE(x) == 0:
        memset(cnp.PyArray_DATA(stats), 0, cnp.PyArray_NBYTES(stats))
        return stats if keeps else None
    start_norm(&job, operation, x, stats, norm, keeps, n_threads)
    bring(&job, Y, out)
    set_constant(&job.gamma_given, &one)
    set_constant(&job.beta_given, &zero)
    if are_within(x, norm):  # without them too: the same rows, and so the same bits
        size = n_along(x, norm.along)
        place_parameters(&job, x, norm.along)
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
    return stats if keeps else None


def norm_forward(
    cnp.ndarray x not None, cnp.ndarray gamma, cnp.ndarray beta, axes, double eps,
    cnp.ndarray out, bint has_mean, int n_threads, bint keeps=True,
):
    """Normalize x over some of its axes, then scale and shift along some.

    gamma, beta: float32 or float64, or None.  axes: Axes (_cache.py).  out: new if None.
    Returns out and the statistics, float64 (4, n) as `forward` has them, if they are to be kept.
    """
    cdef Norm norm
    find_norm(x, axes, &norm)
    if out is None:
        out = new_result(x)
    return out, norm_of(
        seen_by(&norm, x, axes), in_line(gamma), in_line(beta), &norm, eps,
        seen_by(&norm, out, axes), FORWARD if has_mean else RMS_FORWARD, n_threads, keeps,
    )


cdef bint is_plain_call(x, gamma, beta, Py_ssize_t n, eps, out, double* number) except -1:
    """Whether a forward call's arguments need no conversion and no check, of n parameters; number:
    the default of eps, and then what it is."""
    return (
        is_plain_parameter(gamma, n) and is_plain_parameter(beta, n)
        and (eps is None or is_plain_number(eps, 0, number)) and is_plain_output(out, x)
        and are_apart(out, gamma) and are_apart(out, beta)
    )


def plain_rows(
    x, gamma, beta, axis, eps, out, bint has_mean, bint keeps, Py_ssize_t small,
):
    """The straight road of layer and RMS norm over the last axis, of fewer than `small` elements.

    Returns what `norm_forward` does, or None, and nothing is done, where an argument needs a closer
    look.
    """
    cdef double number = 1e-5
    cdef int last
    cdef Norm norm
    if not is_plain_array(x) or type(axis) is not int or cnp.PyArray_NDIM(x) < 1:
        return None
    last = cnp.PyArray_NDIM(x) - 1
    if not (
        (axis == -1 or axis == last) and 0 < cnp.PyArray_SIZE(x) < small
        and is_plain_call(x, gamma, beta, cnp.PyArray_DIMS(x)[last], eps, out, &number)
    ):
        return None
    norm.over = norm.along = <unsigned long long> 1 << last
    norm.cells = 1
    if out is None:
        out = new_result(x)
    return out, norm_of(
        x, gamma, beta, &norm, number, out, FORWARD if has_mean else RMS_FORWARD, 1, keeps
    )


def plain_channels(
    x, gamma, beta, num_groups, axis, eps, out, bint keeps, Py_ssize_t small,
):
    """The same of group and instance norm (num_groups None) of an x with places."""
    cdef double number = 1e-5
    cdef Py_ssize_t n, n_groups
    cdef Norm norm
    if not is_plain_input(x, axis) or axis == 0 or not 0 < cnp.PyArray_SIZE(x) < small:
        return None
    n = n_groups = cnp.PyArray_DIMS(x)[<int> axis]
    if num_groups is not None:
        if type(num_groups) is not int or not 0 < num_groups <= n:
            return None
        n_groups = num_groups
    norm.along = <unsigned long long> 1 << <int> axis
    norm.over = ~(norm.along | 1)
    norm.cells = n // n_groups
    if n % n_groups or (norm.cells > 1 and n_along(x, norm.over) == 1) or (
        not is_plain_call(x, gamma, beta, n, eps, out, &number)
    ):
        return None
    if out is None:
        out = new_result(x)
    return out, norm_of(x, gamma, beta, &norm, number, out, FORWARD, 1, keeps)


# ---------------------------------------------------------------- backward

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


cdef void store_parts(
    double* sums, const double* lows, double* low, Py_ssize_t n_parts, Py_ssize_t step,
    Py_ssize_t n, cnp.ndarray target,
) noexcept:
    """The sums of n values over parts that lie `step` apart, with their low parts or NULL, in
    target (or None); `low` is zeros, for the errors."""
    cdef Py_ssize_t part, k
    if target is None:
        return
    for part in range(n_parts):
        if part:
            add_compensated(sums, low, sums + part * step, n)
        if lows != NULL:
            fold_halves(low, lows + part * step, n)
    for k in range(n):
        sums[k] = finish_sum(sums[k], low[k])
    store_parameter(sums, target)


cdef int differentiate_norm(
    cache, const Norm* norm, cnp.ndarray dout, cnp.ndarray x, cnp.ndarray out, cnp.ndarray dgamma,
    cnp.ndarray dbeta, int n_threads,
) except -1:
    """Fill out, dgamma and dbeta, where they are not None; dout, x and out as the norm has them."""
    cdef Job job
    cdef bint has_mean = cache.norm != "rmsnorm", within = are_within(x, norm)
    cdef bint sums_needed = dgamma is not None or dbeta is not None
    cdef Py_ssize_t n = n_along(x, ~norm.over), size = n_along(x, norm.along), units = 0
    cdef cnp.ndarray gamma = in_line(cache.gamma), stats = cache.stats, scale
    cdef double* sums
    cdef double* low
    cdef double* lows
    if has_mean and not cache.exact_mean:
        stats = with_mean_of(x, stats, norm.over, n_threads)
    start_norm(&job, BACKWARD if has_mean else RMS_BACKWARD, x, stats, norm, True, n_threads)
    bring(&job, G, dout)
    bring(&job, Y, out)
    set_constant(&job.gamma_given, &one)
    if within:
        place_parameters(&job, x, norm.along)
        scale = native_parameter(gamma, x, size, 1)
        job.varying.gamma = job.varying.beta = <char*> cnp.PyArray_DATA(scale)
        job.varying.size = size
        if sums_needed:
            units = min(<Py_ssize_t> MAX_UNITS, (n + FOLD_ROWS - 1) // FOLD_ROWS)
            job.varying.unit = 1
    else:
        set_parameter(&job.gamma_given, gamma, &one)
    job.reduces = True  # the constants of x_hat come after the sums
    job.applies = out is not None
    job.exact_mean = has_mean
    job.eps = cache.eps
    # dbeta and dgamma of the statistics, zeros, and the units' sums with their low parts
    sums = <double*> malloc((2 * n + 2 * size + 4 * units * size) * sizeof(double))
    if sums == NULL:
        raise MemoryError("bn_fast: no memory for the sums of this call")
    low = sums + 2 * n
    memset(low, 0, 2 * size * sizeof(double))
    job.value[DBETA] = sums
    job.value[DGAMMA] = sums + n
    job.varying.totals = low + 2 * size
    job.varying.lows = job.varying.totals + 2 * units * size
    try:
        execute(&job)
        if within and sums_needed:
            units = (n + job.varying.unit - 1) // job.varying.unit
            lows = job.varying.lows
            store_parts(job.varying.totals, lows, low, units, 2 * size, size, dbeta)
            lows = lows + size if lows != NULL else NULL
            store_parts(job.varying.totals + size, lows, low + size, units, 2 * size, size, dgamma)
        elif sums_needed:
            store_parts(sums, NULL, low, n // size, size, size, dbeta)
            store_parts(sums + n, NULL, low + size, n // size, size, size, dgamma)
    finally:
        free(sums)
    return 0


cdef cnp.ndarray new_gradient(cnp.ndarray x, tuple shape):
    """Zeros in the shape of a parameter beside x."""
    cdef cnp.npy_intp[MAX_DIMS] length
    cdef int d, n = len(shape)
    for d in range(n):
        length[d] = shape[d]
    return cnp.PyArray_ZEROS(n, length, parameter_type(x), 0)


cdef bint is_norm_parameter(object values, Py_ssize_t n) noexcept:
    """None, or n numbers that can be read as one line."""
    return values is None or (
        is_plain_array(values) and cnp.PyArray_TYPE(values) != cnp.NPY_FLOAT16
        and cnp.PyArray_SIZE(values) == n
        and (cnp.PyArray_NDIM(values) == 1 or cnp.PyArray_ISCARRAY_RO(values))
    )


cdef bint is_shape_of(object shape, Py_ssize_t n) except -1:
    """Whether it is a shape of n values."""
    cdef Py_ssize_t product = 1
    if type(shape) is not tuple:
        return False
    for length in <tuple> shape:
        if type(length) is not int or not 0 <= length <= n or product > n:
            return False
        product *= <Py_ssize_t> length
    return product == n


cdef bint is_plain_norm_cache(cache, object x, object gamma) except -1:
    """What `is_plain_cache` asks, of a norm's; that its axes fit x is known."""
    cdef Py_ssize_t n_parameters
    cdef double number
    cdef cnp.ndarray seen
    cdef Norm norm
    if not is_plain_array(x) or not is_plain_number(cache.eps, -INFINITY, &number):
        return False
    beta_shape, stats = cache.beta_shape, cache.stats
    find_norm(x, cache.axes, &norm)
    seen = seen_by(&norm, x, cache.axes)
    n_parameters = n_along(seen, norm.along)
    if not (
        is_norm_parameter(gamma, n_parameters) and cnp.PyArray_CheckExact(stats)
        and are_statistics(stats, n_statistics(seen, &norm))
    ):
        return False
    return beta_shape is None or is_shape_of(beta_shape, n_parameters)


def norm_backward(dout, cache, out, needs, int n_threads, Py_ssize_t small=-1):
    """Gradients dx (in out, new if None), dgamma and dbeta in the shapes of gamma and beta: those
    that were given and that `needs` names (None: all), and None for the others.

    cache: a NormCache (_cache.py), whose axes fit its x; told if that is overwritten.  small: as
    for `backward`.
    """
    cdef cnp.ndarray dgamma = None, dbeta = None, target = None, seen
    cdef Norm norm
    x, gamma, beta_shape = cache.x, cache.gamma, cache.beta_shape
    if small >= 0 and not (
        is_plain_norm_cache(cache, x, gamma) and cnp.PyArray_SIZE(x) < small
        and is_plain_gradient(dout, x, gamma, out)
    ):
        return None
    if gamma is not None and (needs is None or "dgamma" in needs):
        dgamma = new_gradient(x, (<object> gamma).shape)
    if beta_shape is not None and (needs is None or "dbeta" in needs):
        dbeta = new_gradient(x, beta_shape)
    axes = cache.axes
    find_norm(x, axes, &norm)
    seen = seen_by(&norm, x, axes)
    target = out
    if needs is None or "dx" in needs:
        target = out = new_result(x) if out is None else out
        # The order of sums over rows must not depend on the strides of out.
        if (dgamma is not None or dbeta is not None) and are_within(seen, &norm) and (
            not is_in_order_of(out, x)
        ):
            target = new_result(x)
    if cnp.PyArray_SIZE(x) and not (target is None and dgamma is None and dbeta is None):
        differentiate_norm(
            cache, &norm, seen_by(&norm, dout, axes), seen, seen_by(&norm, target, axes), dgamma,
            dbeta, n_threads,
        )
        if target is not None and target is not out:
            cnp.PyArray_CopyInto(out, target)
        if out is not None and is_same_buffer(out, x):
            cache.overwritten = cache.norm + "_backward"
    return out, dgamma, dbeta
