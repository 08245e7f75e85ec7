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
# in by the kernels (ScaledProducts, SCALED, SCALED_GRADIENT), or on the way of rows (filters.pxi);
# its gradients: parameters.pxi.  Groups without places, (N, C), are rows whose gamma varies too.

cdef enum:
    MAX_DEFAULTS = 4096


# What gamma and beta are where they are not given, of most calls; made once.
cdef tuple defaults = (
    (filled(cnp.NPY_FLOAT32, 1, MAX_DEFAULTS, 0), filled(cnp.NPY_FLOAT32, 1, MAX_DEFAULTS, 1)),
    (filled(cnp.NPY_FLOAT64, 1, MAX_DEFAULTS, 0), filled(cnp.NPY_FLOAT64, 1, MAX_DEFAULTS, 1)),
)


cdef cnp.ndarray native_parameter(
    cnp.ndarray values, cnp.ndarray x, const Norm* norm, bint default,
):
    """values in the type of x's lanes, contiguous; None: as many times the default, or more."""
    cdef cnp.ndarray native
    cdef cnp.npy_intp n = n_along(x, norm.along)
    cdef int kind = parameter_type(x)
    if values is None:
        return (
            defaults[kind == cnp.NPY_FLOAT64][default] if n <= MAX_DEFAULTS
            else filled(kind, 1, n, default)
        )
    if cnp.PyArray_TYPE(values) == kind and cnp.PyArray_ISCARRAY_RO(values):
        return values
    native = cnp.PyArray_EMPTY(1, &n, kind, 0)
    cnp.PyArray_CopyInto(native, in_line(values))
    return native


cdef void place_parameters(
    Job* job, cnp.ndarray x, const Norm* norm, cnp.ndarray gamma, cnp.ndarray beta,
) noexcept:
    """Native parameters, which vary within a statistic, and their strides along x's axes."""
    cdef int d
    cdef cnp.npy_intp stride = cnp.PyArray_ITEMSIZE(gamma)
    job.varying.gamma = <char*> cnp.PyArray_DATA(gamma)
    job.varying.beta = <char*> cnp.PyArray_DATA(beta)
    for d in range(cnp.PyArray_NDIM(x) - 1, -1, -1):
        job.varying.stride[d] = 0
        if norm.along >> d & 1:
            job.varying.stride[d] = stride
            stride *= cnp.PyArray_DIMS(x)[d]


cdef struct Norm:             # a norm of an array
    bint has_mean             # takes the mean off
    unsigned long long over   # the axes that its statistics are over,
    unsigned long long along  # and those of its parameters
    Py_ssize_t cells          # neighbors along these that share a statistic
    int channels              # the axis that is seen as two, (groups, channels of a group);
    Py_ssize_t n_groups       # 0: none is


cdef void set_norm(
    Norm* norm, bint has_mean, unsigned long long over, unsigned long long along, Py_ssize_t cells,
) noexcept:
    norm.has_mean, norm.over, norm.along, norm.cells = has_mean, over, along, cells
    norm.n_groups = 0


cdef void set_channels(Norm* norm, cnp.ndarray x, int axis, Py_ssize_t n_groups) noexcept:
    """That of groups of channels, with a statistic for each sample.  Where there are no places they
    are seen as rows: as cells of one element each they took 4 to 14 times as long."""
    cdef unsigned long long channels = <unsigned long long> 1 << axis
    set_norm(norm, True, ~(channels | 1), channels, cnp.PyArray_DIMS(x)[axis] // n_groups)
    if norm.cells != 1 and cnp.PyArray_SIZE(x) == n_along(x, channels | 1):
        norm.along, norm.cells = 3 * channels, 1
        norm.channels, norm.n_groups = axis, n_groups


cdef int find_norm(cnp.ndarray x, axes, bint has_mean, Norm* norm) except -1:
    """axes: Axes (_cache.py), which fit x."""
    shape, over, along = axes
    if len(shape) == cnp.PyArray_NDIM(x):
        set_norm(norm, has_mean, mask_of(over), mask_of(along), 1)
    else:
        set_channels(norm, x, along[0], shape[along[0]])
    return 0


cdef inline Py_ssize_t n_statistics(cnp.ndarray seen, const Norm* norm) noexcept:
    return n_along(seen, ~norm.over) // norm.cells


cdef inline bint are_within(cnp.ndarray seen, const Norm* norm) noexcept:
    """Whether parameters vary within a statistic."""
    return n_along(seen, norm.over & norm.along) > 1


cdef cnp.ndarray seen_by(const Norm* norm, cnp.ndarray array):
    """The array (or None) as the norm has it: its own, but for the channels, which may be two.
    (Not by `reshape`, which forgets the strides of axes of length 1: a sample alone would be
    another layout, of other bits.)"""
    cdef cnp.npy_intp[MAX_DIMS + 1] size
    cdef cnp.npy_intp[MAX_DIMS + 1] stride
    cdef cnp.ndarray seen
    cdef int d, own, channels = norm.channels
    if array is None or not norm.n_groups:
        return array
    for d in range(cnp.PyArray_NDIM(array) + 1):
        own = d if d <= channels else d - 1
        size[d] = cnp.PyArray_DIMS(array)[own]
        stride[d] = cnp.PyArray_STRIDES(array)[own]
    size[channels + 1] = size[channels] // norm.n_groups
    size[channels] = norm.n_groups
    stride[channels] *= size[channels + 1]
    seen = cnp.PyArray_New(
        cnp.ndarray, cnp.PyArray_NDIM(array) + 1, size, cnp.PyArray_TYPE(array), stride,
        cnp.PyArray_DATA(array), 0, cnp.PyArray_FLAGS(array) & cnp.NPY_ARRAY_WRITEABLE, None,
    )
    cnp.set_array_base(seen, array)
    return seen


cdef cnp.ndarray in_line(cnp.ndarray values):
    """A parameter (or None) of any shape as one of one dimension."""
    return values if values is None or cnp.PyArray_NDIM(values) == 1 else values.ravel()


cdef void start_norm(
    Job* job, int operation, cnp.ndarray x, cnp.ndarray stats, const Norm* norm, bint keeps,
) noexcept:
    """As `new_job`.  Statistics that features share are not theirs; nor are some that nobody keeps.
    """
    cdef int k
    new_job(job, operation, x, stats, ~norm.over)
    job.by_row = True
    job.cells = norm.cells
    job.n_features = n_along(x, ~norm.over)
    if keeps and norm.cells > 1:
        job.shared = job.value[MEAN]
    for k in range(MEAN, MULTIPLIER + 1):
        job.value[k] = job.value[k] if keeps and norm.cells == 1 else NULL


cdef tuple norm_of(
    cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray beta, const Norm* norm, double eps,
    cnp.ndarray out, int n_threads, bint keeps,
):
    """out (new if None) and the statistics; None if they are not to be kept."""
    cdef Job job
    cdef cnp.ndarray seen = seen_by(norm, x), scale, shift
    cdef cnp.ndarray stats = new_statistics(n_statistics(seen, norm) if keeps else 0)
    if out is None:
        out = new_result(x)
    if cnp.PyArray_SIZE(x) == 0:
        memset(cnp.PyArray_DATA(stats), 0, cnp.PyArray_NBYTES(stats))
        return out, stats if keeps else None
    start_norm(&job, FORWARD if norm.has_mean else RMS_FORWARD, seen, stats, norm, keeps)
    if are_within(seen, norm):  # without them too: the same rows, and so the same bits
        scale = native_parameter(gamma, seen, norm, 1)
        shift = native_parameter(beta, seen, norm, 0)
        place_parameters(&job, seen, norm, scale, shift)
        gamma = beta = None
    take_statistics(&job, eps)
    run_forward(&job, in_line(gamma), in_line(beta), seen_by(norm, out), n_threads)
    return out, stats if keeps else None


def norm_forward(str name, call, int n_threads, bint keeps=True):
    """Normalize x over some of its axes, then scale and shift along some, as a NormCall
    (_norm_checks.py) says.

    Returns out and the statistics, float64 (4, n) as `forward` has them, if they are to be kept.
    """
    cdef Norm norm
    x, gamma, beta, axes, eps, out = call
    find_norm(x, axes, name != "rmsnorm", &norm)
    return norm_of(x, gamma, beta, &norm, eps, out, n_threads, keeps)


def plain_norm(
    str name, x, gamma, beta, num_groups, axis, eps, out, bint keeps, n_threads, Py_ssize_t small,
):
    """The straight road of all norms, of layer and RMS norm over the last axis.

    Returns what `norm_forward` does, or None, and nothing is done, where an argument needs a closer
    look.
    """
    cdef double number = 1e-5
    cdef unsigned long long last
    cdef Py_ssize_t n, n_groups
    cdef int d
    cdef Norm norm
    if not is_plain_array(x) or type(axis) is not int or cnp.PyArray_SIZE(x) == 0:
        return None
    d = cnp.PyArray_NDIM(x) - 1
    if name == "layernorm" or name == "rmsnorm":
        if d < 0 or not (axis == -1 or axis == d):
            return None
        last = <unsigned long long> 1 << d
        set_norm(&norm, name != "rmsnorm", last, last, 1)
        n = cnp.PyArray_DIMS(x)[d]
    else:
        if not 0 < axis <= d:
            return None
        d = axis
        n = n_groups = cnp.PyArray_DIMS(x)[d]
        if name == "groupnorm":
            if type(num_groups) is not int or not 0 < num_groups <= n or n % num_groups:
                return None
            n_groups = num_groups
        set_channels(&norm, x, d, n_groups)
    if not (
        (eps is None or is_plain_number(eps, 0, &number)) and is_plain_rest(x, gamma, beta, n, out)
    ):
        return None
    return norm_of(
        x, gamma, beta, &norm, number, out, n_threads_of(x, n_threads, small), keeps
    )


# ---------------------------------------------------------------- backward

cdef cnp.ndarray with_mean_of(
    cnp.ndarray x, cnp.ndarray stats, unsigned long long over, int n_threads,
):
    """stats with the mean of x in place of one that has been rounded."""
    cdef Py_ssize_t n = cnp.PyArray_DIMS(stats)[1]
    cdef cnp.ndarray own = statistics_of(x, ~over, True, None, 0, n_threads)
    memcpy(
        <double*> cnp.PyArray_DATA(own) + 2 * n, <double*> cnp.PyArray_DATA(stats) + 2 * n,
        2 * n * sizeof(double),
    )
    return own


cdef void add_parts(
    double* sums, const double* lows, double* low, Py_ssize_t n_parts, Py_ssize_t n,
) noexcept:
    """Of n sums all parts, and their low parts if there are any, onto the first; `low`: n zeros."""
    cdef Py_ssize_t part, k
    for part in range(n_parts):
        if part:
            add_compensated(sums, low, sums + part * n, n)
        if lows != NULL:
            fold_halves(low, lows + part * n, n)
    for k in range(n):
        sums[k] = finish_sum(sums[k], low[k])


cdef int differentiate_norm(
    cache, const Norm* norm, cnp.ndarray dout, cnp.ndarray x, cnp.ndarray out, cnp.ndarray dgamma,
    cnp.ndarray dbeta, int n_threads,
) except -1:
    """Fill out, dgamma and dbeta, where they are not None; dout, x and out as the norm has them."""
    cdef Job job
    cdef bint within = are_within(x, norm), sums_needed = dgamma is not None or dbeta is not None
    cdef Py_ssize_t n = n_along(x, ~norm.over), size = n_along(x, norm.along), units = 0
    cdef cnp.ndarray gamma = cache.gamma, stats = cache.stats, scale
    cdef double* sums
    cdef double* low
    cdef double* totals
    if norm.has_mean and not cache.exact_mean:
        stats = with_mean_of(x, stats, norm.over, n_threads)
    start_norm(&job, BACKWARD if norm.has_mean else RMS_BACKWARD, x, stats, norm, True)
    if within:
        scale = native_parameter(gamma, x, norm, 1)
        place_parameters(&job, x, norm, scale, scale)
        job.varying.size = size
        gamma = None
        if sums_needed:
            units = min(<Py_ssize_t> MAX_UNITS, (n + FOLD_ROWS - 1) // FOLD_ROWS)
            job.varying.unit = 1
    job.reduces = True  # the constants of x_hat come after the sums
    job.exact_mean = norm.has_mean
    job.eps = cache.eps
    # dgamma and dbeta of the statistics, zeros, and the units' sums with their low parts
    sums = <double*> allocate((2 * n + 2 * size + 4 * units * size) * sizeof(double))
    low = sums + 2 * n
    memset(low, 0, 2 * size * sizeof(double))
    job.varying.totals = totals = low + 2 * size
    job.varying.lows = totals + 2 * units * size
    try:
        run_backward(&job, dout, in_line(gamma), out, sums, n_threads)
        if within and sums_needed:
            units = (n + job.varying.unit - 1) // job.varying.unit
            add_parts(totals, job.varying.lows, low, units, 2 * size)
            store_parameter(totals, dbeta)
            store_parameter(totals + size, dgamma)
        elif sums_needed:
            add_parts(sums, NULL, low, n // size, size)
            add_parts(sums + n, NULL, low + size, n // size, size)
            store_parameter(sums, dgamma)
            store_parameter(sums + n, dbeta)
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


cdef bint is_plain_norm_cache(cache, cnp.ndarray seen, const Norm* norm) except -1:
    """What `is_plain_cache` asks, of a norm's, but of its x."""
    cdef Py_ssize_t n = n_along(seen, norm.along)
    cdef double number
    beta_shape, stats = cache.beta_shape, cache.stats
    return (
        is_plain_number(cache.eps, -INFINITY, &number) and is_plain_parameter(cache.gamma, n, True)
        and cnp.PyArray_CheckExact(stats) and are_statistics(stats, n_statistics(seen, norm))
        and (beta_shape is None or is_shape_of(beta_shape, n))
    )


def norm_backward(dout, cache, out, needs, n_threads, Py_ssize_t small=-1):
    """Gradients dx (in out, new if None), dgamma and dbeta in the shapes of gamma and beta: those
    that were given and that `needs` names (None: all), and None for the others.

    cache: a NormCache (_cache.py), whose axes fit its x; told if that is overwritten.  small,
    n_threads: as for `backward`.
    """
    cdef cnp.ndarray dgamma = None, dbeta = None, target = None, seen
    cdef Norm norm
    x, gamma, beta_shape = cache.x, cache.gamma, cache.beta_shape
    if small >= 0 and not is_plain_array(x):
        return None
    find_norm(x, cache.axes, cache.norm != "rmsnorm", &norm)
    seen = seen_by(&norm, x)
    if small >= 0 and not (
        is_plain_norm_cache(cache, seen, &norm) and is_plain_gradient(dout, x, gamma, out)
    ):
        return None
    if gamma is not None and wants(needs, "dgamma"):
        dgamma = new_gradient(x, (<object> gamma).shape)
    if beta_shape is not None and wants(needs, "dbeta"):
        dbeta = new_gradient(x, beta_shape)
    target = out
    if out is None and wants(needs, "dx"):
        target = out = new_result(x)
    # The order of sums over rows must not depend on the strides of out.
    elif out is not None and (dgamma is not None or dbeta is not None) and (
        are_within(seen, &norm) and not has_strides_of(out, x)
    ):
        target = new_result(x)
    if cnp.PyArray_SIZE(x) and not (target is None and dgamma is None and dbeta is None):
        differentiate_norm(
            cache, &norm, seen_by(&norm, dout), seen, seen_by(&norm, target), dgamma, dbeta,
            n_threads_of(x, n_threads, small),
        )
        if target is not None and target is not out:
            cnp.PyArray_CopyInto(out, target)
        if out is not None and is_same_buffer(out, x):
            cache.overwritten = cache.norm + "_backward"
    return out, dgamma, dbeta
