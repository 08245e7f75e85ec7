# Operations: everything that the package computes is a row of this table over reduce and apply.
#
#     operation         reduce                    apply
#     FORWARD           x: sum d, sum d^2         y = x' + bias (+ residual), activated
#     FROZEN            -                         the same, with given statistics
#     BACKWARD          x, dout: sum t, sum t d   dx = dout' + x' + bias
#     FROZEN_BACKWARD   x, dout: sum t, sum t d   dx = dout', as the statistics were given
#     PRODUCT           two arrays: sum t d       -
#     RMS_FORWARD       x: sum x^2                y = x' + bias
#     RMS_BACKWARD      x, dout: sum t d          dx = dout' + x'
#     SECOND            -                         dx = dout' + ddx' + x' + bias,
#                                                 ddout = ddx' + x' + bias
#
# x' is (x - shift) coef, of each feature, and so are the others.  A row says with what shifts the
# sums start, how sums become statistics or gradients, what is done with features for which that
# failed, and what constants the output has.  The pointers are followed once a tile.  There are two
# tables, for float and double lanes.

cdef enum:
    FORWARD
    FROZEN
    BACKWARD
    FROZEN_BACKWARD
    PRODUCT
    SECOND
    RMS_FORWARD
    RMS_BACKWARD
    N_OPERATIONS

ctypedef void (*Start)(Job*, Py_ssize_t, Py_ssize_t, const void*) noexcept nogil
ctypedef double (*Settle)(Job*, Py_ssize_t, Py_ssize_t, bint) noexcept nogil
ctypedef void (*Retry)(Job*, Py_ssize_t, const void*) noexcept nogil
ctypedef void (*SetConstants)(Job*, Py_ssize_t, Py_ssize_t, bint, const void*) noexcept nogil

cdef struct Operation:
    Start start               # shifts of a range of features
    Settle settle             # their sums; returns how many need another try (marked RETRY)
    Retry retry               # better shifts or factors for one of them
    SetConstants set_constants
    bint centers              # around the mean
    bint takes_dout           # as an input, behind the gate of an activation
    bint weighs               # weights have a part in the output too
    int formula               # of the output,
    int input                 # and the role of what it takes for x
    int n_results             # values that the call has brought for them
    int[4] results
    int n_reduce              # columns of constants in either visit
    int[N_OWN] reduce_columns
    int n_apply
    int[N_OWN] apply_columns


# ---------------------------------------------------------------- start

cdef void start_statistics(
    Job* job, Py_ssize_t first, Py_ssize_t n, const lane* lane_tag,
) noexcept nogil:
    if job.value[TOTAL] != NULL:
        sample_own_shift[lane](job, first, n, lane_tag)
    else:
        sample_shift[lane](job, X, first, n, lane_tag)


cdef void start_at_zero(
    Job* job, Py_ssize_t first, Py_ssize_t n, const void* lane_tag,
) noexcept nogil:
    memset(job.value[SHIFT_X] + first, 0, n * sizeof(double))


cdef void start_product(
    Job* job, Py_ssize_t first, Py_ssize_t n, const lane* lane_tag,
) noexcept nogil:
    round_near[lane](job, first, n, lane_tag)
    sample_shift[lane](job, G, first, n, lane_tag)


cdef void start_gradients(
    Job* job, Py_ssize_t first, Py_ssize_t n, const lane* lane_tag,
) noexcept nogil:
    cdef Py_ssize_t f = first
    round_means[lane](job, first, n, lane_tag)
    while f < first + n and job.exact_mean:  # cells may be more than are sampled at a time
        sample_shift[lane](job, G, f, min(<Py_ssize_t> MAX_COLUMNS, first + n - f), lane_tag)
        f += MAX_COLUMNS
    if job.cells > 1:
        drop_lone_shifts(job, first, n)
    if job.exact_mean:
        if job.reduce.gate != NONE:
            drop_gated_shift[lane](job, first, n, lane_tag)


cdef void start_at_means(
    Job* job, Py_ssize_t first, Py_ssize_t n, const lane* lane_tag,
) noexcept nogil:
    cdef Py_ssize_t f
    cdef const double* mean = job.value[MEAN]
    cdef double* shift = job.value[SHIFT_X]
    for f in range(first, first + n):
        shift[f] = <double> (<lane> mean[f])
    memset(job.value[SHIFT_G] + first, 0, n * sizeof(double))


# ---------------------------------------------------------------- settle
#
# Whether it is the first try, and exact, is a constant of the inlined loops: as a variable it kept
# gcc 12 from vectorizing them: four times the instructions.

cdef inline double squares_settled(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint first_try, bint exact,
) noexcept nogil:
    cdef double** v = job.value
    cdef double* sums = job.sums + f
    cdef Py_ssize_t stride = job.stride
    return settle_statistics(
        sums, sums + stride, sums + 2 * stride, sums + 3 * stride,
        v[SHIFT_X] + f, v[FACTOR_X] + f, v[MEAN] + f, v[MEAN_LOW] + f, v[INV_STD] + f,
        v[VAR] + f, v[RETRY] + f, n, total_of(job, f), job.eps, low_limit(job), first_try,
        exact,
    )


cdef inline double products_settled(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint first_try, bint exact,
) noexcept nogil:
    cdef double** v = job.value
    cdef double* sums = job.sums + f
    cdef Py_ssize_t stride = job.stride
    cdef double count = settle_gradients(
        sums, sums + stride, sums + 2 * stride, sums + 3 * stride,
        v[SHIFT_X] + f, v[SHIFT_G] + f, v[FACTOR_X] + f, v[FACTOR_G] + f,
        v[MEAN] + f, v[MEAN_LOW] + f, v[MULTIPLIER] + f, v[DGAMMA] + f, v[DBETA] + f,
        v[MEAN_G] + f, v[MEAN_G_LOW] + f, v[MEAN_GX] + f, v[RETRY] + f,
        n, total_of(job, f), low_limit(job), first_try, exact,
    )
    if not first_try:
        unscale_product(job, f)
    return count


cdef inline double sums_settled(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint first_try, bint exact,
) noexcept nogil:
    if job.op.takes_dout:
        return products_settled(job, f, n, first_try, exact)
    return squares_settled(job, f, n, first_try, exact)


cdef double settle_sums(Job* job, Py_ssize_t f, Py_ssize_t n, bint first_try) noexcept nogil:
    if job.value[TOTAL] != NULL:
        return settle_one_by_one(job, f, n, first_try)
    if not first_try:
        return sums_settled(job, f, n, False, True)
    if job.reduce.storage == FLOAT64:
        return sums_settled(job, f, n, True, True)
    return sums_settled(job, f, n, True, False)


cdef double settle_one_by_one(Job* job, Py_ssize_t f, Py_ssize_t n, bint first_try) noexcept nogil:
    """The same of features that differ in their total.  Without weight there is no mean, and x_hat
    is 0."""
    cdef double** v = job.value
    cdef double count = 0
    cdef Py_ssize_t k
    for k in range(f, f + n):
        count += sums_settled(job, k, 1, first_try, True)
        if v[TOTAL][k] == 0 and job.op.takes_dout:
            v[MEAN_G][k] = v[MEAN_G_LOW][k] = v[MEAN_GX][k] = 0
        elif v[TOTAL][k] == 0:
            v[MEAN][k] = v[MEAN_LOW][k] = v[INV_STD][k] = 0
            v[VAR][k] = NAN
    return count


cdef double settle_backward(Job* job, Py_ssize_t f, Py_ssize_t n, bint first_try) noexcept nogil:
    cdef double count = settle_sums(job, f, n, first_try)
    return count + look_again(job, f, n) if first_try and job.exact_mean else count


cdef inline double squares_alone_settled(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint first_try,
) noexcept nogil:
    cdef double** v = job.value
    return settle_squares(
        job.sums + 2 * job.stride + f, job.sums + 3 * job.stride + f, v[FACTOR_X] + f,
        v[MEAN] + f, v[MEAN_LOW] + f, v[INV_STD] + f, v[VAR] + f, v[RETRY] + f,
        n, job.total, job.eps, low_limit(job), first_try,
    )


cdef double settle_squares_alone(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint first_try,
) noexcept nogil:
    """RMS norm: 65536 rows of 8 forward, one thread, 1161 to 640 us as a loop of vectors."""
    if first_try:
        return squares_alone_settled(job, f, n, True)
    return squares_alone_settled(job, f, n, False)


cdef double settle_product_alone(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint first_try,
) noexcept nogil:
    """RMS norm: dx has no mean of dout."""
    cdef double count = settle_sums(job, f, n, first_try)
    memset(job.value[MEAN_G] + f, 0, n * sizeof(double))
    memset(job.value[MEAN_G_LOW] + f, 0, n * sizeof(double))
    return count


# ---------------------------------------------------------------- retry
#
# A better shift where that was the matter, else other lanes: float64's hold every square of
# float32, and every square of float64 once it is scaled.

cdef void retry_statistics(Job* job, Py_ssize_t f, const lane* lane_tag) noexcept nogil:
    cdef double* sums = job.sums + f
    cdef double m = total_of(job, f)
    cdef double s1 = finish_sum(sums[0], sums[job.stride])
    cdef double s2 = finish_sum(sums[2 * job.stride], sums[3 * job.stride])
    cdef bint finite = isfinite(s1) and isfinite(s2)
    if finite and is_far(s1 * (1 / m), s1, s2) != 0:
        job.value[SHIFT_X][f] += s1 / m / job.value[FACTOR_X][f]
    elif lane is double:
        job.value[FACTOR_X][f] = ldexp(1.0, 540 if finite else -540)


cdef void retry_squares(Job* job, Py_ssize_t f, const lane* lane_tag) noexcept nogil:
    cdef double s2 = job.sums[2 * job.stride + f]
    if lane is double:
        job.value[FACTOR_X][f] = ldexp(1.0, 540 if isfinite(s2) else -540)


cdef void retry_gradients(Job* job, Py_ssize_t f, const lane* lane_tag) noexcept nogil:
    cdef double** v = job.value
    cdef double* sums = job.sums + f
    cdef double s1 = finish_sum(sums[0], sums[job.stride])
    cdef double s2 = finish_sum(sums[2 * job.stride], sums[3 * job.stride])
    cdef bint finite = isfinite(s1) and isfinite(s2) and isfinite(v[DGAMMA][f])
    v[SHIFT_X][f] = v[MEAN][f]
    if lane is double:
        v[FACTOR_X][f] = wide_factor(v[MEAN][f], v[INV_STD][f])
        v[FACTOR_G][f] = 1 if finite else scaled_down()


# ---------------------------------------------------------------- constants

cdef void set_in_lanes(
    Job* job, SetConstants set_constants, int shift, Py_ssize_t first, Py_ssize_t n,
    const lane* lane_tag,
) noexcept nogil:
    """The constants from the value SHIFT_X or GATE_SHIFT on; again for features whose constants
    native lanes cannot hold."""
    cdef double** v = job.value
    cdef double** made = v + shift
    cdef Py_ssize_t f
    read_parameter(&job.gamma_given, first, n, v[GAMMA] + first)
    if job.beta_given.data != NULL:
        read_parameter(&job.beta_given, first, n, v[BETA] + first)
    set_constants(job, first, n, False, lane_tag)
    if fold_run(made[WIDE] + first, n) == 0:  # none
        return
    for f in range(first, first + n):
        if made[WIDE][f] != 0:
            if lane is double:
                made[FACTOR_X][f] = wide_factor(v[MEAN][f], v[INV_STD][f])
            set_constants(job, f, 1, True, lane_tag)
            made[WIDE][f] = 1


# ---------------------------------------------------------------- the table

cdef Operation[2][N_OPERATIONS] operations  # of float lanes, of double lanes


cdef int list_columns(int* columns, tuple values) except -1:
    for i, value in enumerate(values):
        columns[i] = value
    return len(values)


cdef void fill_operations(Operation* row, const lane* lane_tag):
    affine = SHIFT_X, COEF_X, BIAS
    gradient = SHIFT_X, COEF_X, BIAS, SHIFT_G, COEF_G
    mixed = *gradient, SHIFT_R, MIX_X, MIX_G, MIX_R, MIX_BIAS
    cdef int i
    memset(row, 0, N_OPERATIONS * sizeof(Operation))
    for i in range(N_OPERATIONS):  # what most of them have
        row[i].start = <Start> start_at_means[lane]
        row[i].settle = settle_sums
        row[i].retry = <Retry> retry_gradients[lane]
        row[i].set_constants = <SetConstants> set_forward_constants[lane]
        row[i].centers = True
        row[i].takes_dout = i != FORWARD and i != FROZEN and i != RMS_FORWARD
        row[i].formula = AFFINE
        row[i].input = X
        row[i].n_results = list_columns(row[i].results, (DGAMMA, DBETA))
        row[i].n_reduce = list_columns(row[i].reduce_columns, (SHIFT_X, SHIFT_G))
        row[i].n_apply = list_columns(row[i].apply_columns, affine)
    row[FORWARD].start = <Start> start_statistics[lane]
    row[FORWARD].retry = <Retry> retry_statistics[lane]
    row[FORWARD].n_results = list_columns(
        row[FORWARD].results, (MEAN, MEAN_LOW, INV_STD, VAR)
    )
    row[FORWARD].n_reduce = list_columns(row[FORWARD].reduce_columns, (SHIFT_X,))
    row[BACKWARD].start = <Start> start_gradients[lane]
    row[BACKWARD].settle = settle_backward
    row[BACKWARD].set_constants = <SetConstants> set_backward_constants[lane]
    row[BACKWARD].weighs = True
    row[BACKWARD].formula = GRADIENT
    row[BACKWARD].n_apply = list_columns(row[BACKWARD].apply_columns, gradient)
    row[FROZEN_BACKWARD].set_constants = <SetConstants> set_frozen_constants[lane]
    row[FROZEN_BACKWARD].input = G
    row[RMS_FORWARD] = row[FORWARD]
    row[RMS_FORWARD].start = <Start> start_at_zero
    row[RMS_FORWARD].settle = settle_squares_alone
    row[RMS_FORWARD].retry = <Retry> retry_squares[lane]
    row[RMS_BACKWARD] = row[BACKWARD]
    row[RMS_BACKWARD].start = <Start> start_at_means[lane]
    row[RMS_BACKWARD].settle = settle_product_alone
    row[RMS_FORWARD].centers = row[RMS_BACKWARD].centers = False
    row[PRODUCT].start = <Start> start_product[lane]
    row[PRODUCT].settle = settle_backward
    row[SECOND].set_constants = <SetConstants> set_second_constants[lane]
    row[SECOND].formula = MIXED
    row[SECOND].n_apply = list_columns(row[SECOND].apply_columns, mixed)


fill_operations[float](operations[0], NULL)
fill_operations[double](operations[1], NULL)
