# Cells: features that share their statistics with their neighbors, as the channels of a group do.
# All else is each one's own: its sums, gamma and beta, its constants.
#
#     forward    they have one shift of x, so that their sums are added up: each settles the same
#     backward   from each one's means of dout and dout x_hat come, with gamma, those of the group,
#                dx = inv_std (gamma dout - mean(gamma dout) - x_hat mean(gamma dout x_hat))
#
# Ranges of features are whole groups.

cdef void take_shared(Job* job, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """Give each cell the statistics that the call has brought for all of them."""
    cdef Py_ssize_t group, f, cells = job.cells, n_groups = job.n_features // cells
    cdef int k
    for group in range(first // cells, (first + n) // cells):
        for k in range(4):
            for f in range(group * cells, (group + 1) * cells):
                job.value[MEAN + k][f] = job.shared[k * n_groups + group]


cdef void give_shared(Job* job, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """The way back; nobody may want them."""
    cdef Py_ssize_t group, cells = job.cells, n_groups = job.n_features // cells
    cdef int k
    if job.shared == NULL:
        return
    for group in range(first // cells, (first + n) // cells):
        for k in range(4):
            job.shared[k * n_groups + group] = job.value[MEAN + k][group * cells]


cdef void share_sums(Job* job, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """To each cell the sums of its group."""
    cdef Py_ssize_t group, f, cells = job.cells
    cdef int which
    cdef double* high
    cdef double* low
    cdef double sum_high, sum_low
    for which in range(0, 4, 2):
        high = job.sums + which * job.stride
        low = high + job.stride
        for group in range(first // cells, (first + n) // cells):
            sum_high = sum_low = 0
            for f in range(group * cells, (group + 1) * cells):
                add_term(&sum_high, &sum_low, high[f])
                sum_low += low[f]
            for f in range(group * cells, (group + 1) * cells):
                high[f] = sum_high
                low[f] = sum_low


cdef bint are_shifted(const Job* job, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """Whether dout has a shift in one of the features."""
    cdef Py_ssize_t f
    for f in range(first, first + n):
        if job.value[SHIFT_G][f] != 0:
            return True
    return False


cdef void drop_lone_shifts(Job* job, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """Keep the shifts of dout where each cell of a group has one.  They cost another visit to x,
    see `add_shifts`, and one cell in fifty has one by chance, which cost (32, 256, 14, 14) backward
    40 %; one that has to have it is found again, by `look_again`."""
    cdef Py_ssize_t group, f, start, cells = job.cells
    for group in range(first // cells, (first + n) // cells):
        start = group * cells
        for f in range(start, start + cells):
            if job.value[SHIFT_G][f] == 0:
                memset(job.value[SHIFT_G] + start, 0, cells * sizeof(double))
                break


cdef inline double away(
    double gamma, double value, double origin, const lane* lane_tag,
) noexcept nogil:
    """gamma value - origin, without the product's rounding; those of float are exact here."""
    cdef double product = gamma * value, error = 0
    if lane is double:
        if fabs(product) + fabs(gamma) + fabs(value) < 1e290:
            error = product_error(gamma, value, product)
    return (product - origin) + error


cdef void add_shifts(
    Job* job, Py_ssize_t first, double down, const lane* lane_tag,
) noexcept nogil:
    """What the shifts of dout have kept from a group's sums of dout x_hat: shift times the sum of
    x_hat, which is 0 over the group, not over a cell.  Instead of the sums here are those of
    x - mean, see `sum_deviations`."""
    cdef double** v = job.value
    cdef Py_ssize_t f
    cdef double x_hat, origin = v[GAMMA][first] * (v[SHIFT_G][first] * down)
    for f in range(first, first + job.cells):
        x_hat = (
            finish_sum(job.sums[f], job.sums[job.stride + f])
            - job.total * v[MEAN_LOW][f] * v[FACTOR_X][f]
        ) * (v[INV_STD][f] / v[FACTOR_X][f])
        if v[SHIFT_G][f] != 0:
            v[DGAMMA][f] += v[SHIFT_G][f] * x_hat
        v[MEAN_GX][f] += away(v[GAMMA][f], v[SHIFT_G][f] * down, origin, lane_tag) * (
            x_hat / job.total
        )


cdef void share_means(Job* job, Py_ssize_t first, double down, const lane* lane_tag) noexcept nogil:
    """`share_gradients` of a group, whose sums stay in range times `down`, a power of two.  Gamma
    times the means of dout are taken from one origin, so that nothing is lost where dout lies far
    from 0 and gamma hardly differs."""
    cdef double** v = job.value
    cdef Py_ssize_t f, cells = job.cells
    cdef double rest, mean = 0, mean_low = 0, along = 0, along_low = 0
    cdef double origin = v[GAMMA][first] * (<double> (<lane> v[MEAN_G][first]) * down)
    for f in range(first, first + cells):
        v[MEAN_GX][f] *= v[GAMMA][f] * down
    if are_shifted(job, first, cells):
        add_shifts[lane](job, first, down, lane_tag)
    for f in range(first, first + cells):
        v[SHIFT_G][f] = <double> (<lane> v[MEAN_G][f])
        rest = v[GAMMA][f] * ((v[MEAN_G][f] - v[SHIFT_G][f]) + v[MEAN_G_LOW][f]) * down
        v[MEAN_G][f] = away(v[GAMMA][f], v[SHIFT_G][f] * down, origin, lane_tag)
        add_term(&mean, &mean_low, v[MEAN_G][f] + rest)
        add_term(&along, &along_low, v[MEAN_GX][f])
    mean = finish_sum(mean, mean_low) / cells
    along = finish_sum(along, along_low) / cells / down
    for f in range(first, first + cells):
        v[MEAN_G][f] = (v[MEAN_G][f] - mean) / down
        v[MEAN_GX][f] = along


cdef void share_gradients(
    Job* job, Py_ssize_t first, Py_ssize_t n, const lane* lane_tag,
) noexcept nogil:
    """mean(gamma dout x_hat) as MEAN_GX; and as MEAN_G gamma shift_g - mean(gamma dout), where
    SHIFT_G is the cell's mean of dout in x's dtype."""
    cdef Py_ssize_t f
    cdef double largest
    while n > 0:
        largest = 0
        for f in range(first, first + job.cells):
            largest = max(largest, fabs(job.value[MEAN_G][f]) + fabs(job.value[MEAN_GX][f]))
        share_means[lane](job, first, scaled_down() if largest > 1e290 else 1.0, lane_tag)
        first += job.cells
        n -= job.cells
