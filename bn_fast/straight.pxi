# The straight road: whether arguments need no conversion and no check, and the small calls for
# which that is all, in one piece.  Checked one by one in Python they cost more than the engine's
# work: (32, 64) with a bn_param 6.3 us, of which the engine 2.

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
        y, stats = run_forward(
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
    y, stats = run_forward(
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
    return run_backward(
        dout, x, gamma, stats, axis, eps, out, frozen, exact_mean, 1, code, slope, beta,
        residual, None, 0, True, True, residual is not None,
    )
