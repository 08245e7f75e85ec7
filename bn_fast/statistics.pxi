# Between the visits: from a feature's sums to its statistics, gradients and constants.

cdef inline double low_limit(const real* real_tag) noexcept nogil:
    """Constants between this and its inverse leave the lanes room for x - shift and its square."""
    if real is float:
        return 1e-30
    else:
        return 1e-290


cdef inline bint in_range(double value, double low) noexcept nogil:
    """Zero, NaN and infinity pass: they come out the same in any lane."""
    cdef double size = fabs(value)
    return value == 0 or not (size < low or (size > 1 / low and isfinite(value)))


cdef inline bint too_few(const Job* job, const real* real_tag) noexcept nogil:
    """M = 2: dx = gamma r^3 eps (dout - mean dout) is all that is left when two terms of the size of
    dout cancel.  In float32 that leaves no digit, so such features take the float64 lanes."""
    if real is float:
        return job.count <= 2
    else:
        return False


cdef inline double power_of_two(double value) noexcept nogil:
    """The power of two below |value|, kept where it and its inverse are normal."""
    cdef int exponent
    if value == 0 or not isfinite(value):
        return 1
    frexp(value, &exponent)
    return ldexp(1.0, max(-1000, min(1000, exponent - 1)))


cdef double total_sum(Job* job, int which, Py_ssize_t f) noexcept nogil:
    """Chunk sums in order, errors kept; `which` is 0 or 2."""
    cdef double* sums = job.sums + which * job.n_features + f
    cdef double high = 0, low = 0
    cdef Py_ssize_t chunk
    for chunk in range(job.reduce.n_chunks):
        add_compensated(&high, &low, sums, 1)
        low += sums[job.n_features]
        sums += 4 * job.n_features
    return high + low if isfinite(high) else high


cdef double median_of_three(
    char** rows, const Py_ssize_t* offset, const real* real_tag,
) noexcept nogil:
    """A value near the middle of the data that no single outlier can be; 0 if it is not finite."""
    cdef double a = (<const real*> (rows[0] + offset[0]))[0]
    cdef double b = (<const real*> (rows[1] + offset[1]))[0]
    cdef double c = (<const real*> (rows[2] + offset[2]))[0]
    cdef double middle = max(min(a, b), min(max(a, b), c))
    return middle if isfinite(a) and isfinite(b) and isfinite(c) else 0


cdef void sample_shift(
    const Plan* plan, int role, Py_ssize_t first, Py_ssize_t n_features, double* shift,
    const real* real_tag,
) noexcept nogil:
    """The shift of every feature of a tile: from its first, middle and last value."""
    cdef const Segment* segment = &plan.segment[0]
    cdef char* rows[3]
    cdef Py_ssize_t offset[3]
    cdef Py_ssize_t f, k
    cdef char* start = plan.base[role] + first * plan.feature_stride[role]
    for k in range(3):
        row_pointers(segment, role, start, (segment.n_rows - 1) * k // 2, 1, &rows[k])
        offset[k] = (
            (segment.n_joined - 1) * k // 2 * segment.joined_stride[role]
            + (segment.n_run - 1) * k // 2 * segment.run_stride[role]
        )
    for f in range(first, first + n_features):
        shift[f] = median_of_three[real](rows, offset, real_tag)
        for k in range(3):
            offset[k] += plan.feature_stride[role]


cdef void start_tile(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, const real* real_tag,
) noexcept nogil:
    cdef Py_ssize_t f
    for f in range(first, first + n_features):
        job.state[f] = PENDING
        job.factor[f] = 1
        job.shift_g[f] = 0
        if job.kind != FORWARD:
            job.shift_x[f] = <double> (<real> job.mean[f])
    if job.kind == FORWARD:
        sample_shift[real](&job.reduce, X, first, n_features, job.shift_x, real_tag)
    elif job.kind == BACKWARD and job.exact_mean:
        sample_shift[real](&job.reduce, G, first, n_features, job.shift_g, real_tag)


cdef bint settle_forward(Job* job, Py_ssize_t f, const real* real_tag) noexcept nogil:
    """Mean, variance and inverse deviation from the shifted sums, or another shift or scale to try.

    With d = x - shift:  mean = shift + S1/M,  M var = S2 - S1^2/M.  The subtraction is harmless
    while (mean - shift)^2 <= 9 var; the median of three is within that but for contrived data.
    """
    cdef double m = <double> job.count
    cdef double s1 = total_sum(job, 0, f), s2 = total_sum(job, 2, f)
    cdef double shift = job.shift_x[f], factor = job.factor[f]
    cdef double delta = s1 / m, m2 = s2 - s1 * delta
    cdef double low = low_limit(real_tag), spread, high
    cdef bint finite = isfinite(s1) and isfinite(s2)
    cdef bint first_try = job.state[f] == PENDING
    if finite and delta * delta * m > 9 * m2:
        job.shift_x[f] = shift + delta / factor
        job.state[f] = SCALED
        return False
    if first_try and (not finite or too_few(job, real_tag)):
        # float32: the float64 lanes hold every square.  float64: scaled by 2^-540 they do.
        if real is double:
            job.factor[f] = ldexp(1.0, -540)
        job.state[f] = SCALED
        return False
    spread = m2 / m if m2 > 0 else 0
    if first_try and finite and s1 != 0 and spread + job.eps < low and fabs(shift) < 1e140:
        if real is double:
            job.factor[f] = ldexp(1.0, 540)
        job.state[f] = SCALED
        return False
    if not finite:
        spread = NAN
    high = shift + delta / factor
    job.mean[f] = high
    job.mean_low[f] = (shift - high) + delta / factor if isfinite(high) else 0
    job.var[f] = spread / factor / factor
    spread += job.eps * factor * factor
    job.inv_std[f] = factor / sqrt(spread) if spread != 0 else 0
    return True


cdef bint settle_backward(Job* job, Py_ssize_t f, const real* real_tag) noexcept nogil:
    """dbeta = S1 + M shift_g and, with x - mean = d - rest,  dgamma = r (S2 - rest S1)."""
    cdef double m = <double> job.count
    cdef double s1 = total_sum(job, 0, f), s2 = total_sum(job, 2, f)
    cdef double r = job.inv_std[f], factor = job.factor[f]
    cdef double rest = (job.mean[f] - job.shift_x[f]) + job.mean_low[f]
    if job.state[f] == PENDING and not (
        isfinite(s1) and isfinite(s2) and not too_few(job, real_tag)
        and (fabs(s2) >= m * low_limit(real_tag) or (s1 == 0 and s2 == 0))
    ):
        job.shift_x[f] = job.mean[f]
        if real is double:
            job.factor[f] = power_of_two(r)
        job.state[f] = SCALED
        return False
    job.dbeta[f] = s1 + m * job.shift_g[f]
    job.mean_g[f] = job.shift_g[f] + s1 / m
    job.mean_g_low[f] = (job.shift_g[f] - job.mean_g[f]) + s1 / m
    job.dgamma[f] = r / factor * s2
    if rest != 0:
        job.dgamma[f] -= r * rest * s1
    return True


cdef void set_constants(Job* job, Py_ssize_t f, const real* real_tag) noexcept nogil:
    """What the second visit multiplies and adds, and whether the native lanes can do it.

    The shift is the mean rounded to x's dtype, so x - shift is exact near the mean; the rest of the
    mean goes into the constant.  Tried in the native lanes first, then in the wide ones.
    """
    cdef double low = low_limit(real_tag), m = <double> job.count
    cdef double gamma = job.gamma[f], r = job.inv_std[f], a = gamma * r
    cdef double shift, rest, factor, scale, slope, bias, slope_g
    cdef bint wide
    for wide in range(2):
        shift = job.mean[f] if wide else <double> (<real> job.mean[f])
        rest = (job.mean[f] - shift) + job.mean_low[f]
        factor = power_of_two(r) if wide and sizeof(real) == sizeof(double) else 1
        if job.kind == BACKWARD:
            # dx = a ((dout - mean_g) - (x - mean) r dgamma / M); M = 1 leaves dx = 0.
            job.shift_g[f] = job.mean_g[f] if wide else <double> (<real> job.mean_g[f])
            scale = a
            slope_g = job.dgamma[f] / m if job.count > 1 else 0
            slope = a * slope_g * (r / factor)
            bias = -a * ((job.mean_g[f] - job.shift_g[f]) + job.mean_g_low[f])
            if rest != 0:
                bias += slope * factor * rest
        elif job.kind == BACKWARD_FROZEN:
            # dx = gamma inv_std dout: the affine kernel on dout.
            shift = rest = bias = slope = slope_g = job.shift_g[f] = 0
            factor = 1
            scale = a
        else:
            job.shift_g[f] = slope = slope_g = 0
            scale = gamma * (r / factor)
            bias = job.beta[f] - rest * a if rest != 0 else job.beta[f]
        if not wide and (
            in_range(shift, low) and in_range(r, low) and in_range(scale, low)
            and in_range(job.shift_g[f], low) and in_range(slope, low) and in_range(bias, low)
            and (scale != 0 or gamma == 0 or r == 0) and (slope != 0 or slope_g == 0 or a == 0)
            and (job.kind == FORWARD_FROZEN or not too_few(job, real_tag))
        ):
            break
    job.shift_x[f] = shift
    job.factor[f] = factor
    job.scale[f] = scale
    job.slope[f] = slope
    job.bias[f] = bias
    job.wide[f] = wide


cdef void reduce_tile_wide(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, Scratch* s, const real* real_tag,
) noexcept nogil:
    cdef Py_ssize_t chunk
    for chunk in range(job.reduce.n_chunks):
        reduce_chunk[real, double](
            job, chunk, first, n_features, s, real_tag, <const double*> NULL, True
        )


cdef void finish_tile(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, Scratch* s, const real* real_tag,
) noexcept nogil:
    """Settle the tile's features, again in wide lanes where needed, and set their constants."""
    cdef Py_ssize_t f, unsettled
    cdef bint done
    cdef int attempt
    if job.kind != FORWARD_FROZEN:
        for attempt in range(4):
            unsettled = 0
            for f in range(first, first + n_features):
                if job.state[f] == SETTLED:
                    continue
                if job.kind == FORWARD:
                    done = settle_forward[real](job, f, real_tag)
                else:
                    done = settle_backward[real](job, f, real_tag)
                if done:
                    job.state[f] = SETTLED
                else:
                    unsettled += 1
            if unsettled == 0:
                break
            reduce_tile_wide[real](job, first, n_features, s, real_tag)
    for f in range(first, first + n_features):
        set_constants[real](job, f, real_tag)


