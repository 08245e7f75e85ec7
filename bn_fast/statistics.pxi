# Between the visits: from a feature's sums to its statistics, gradients and constants.
#
# Each step is one loop over a tile's features, free of branches so that it vectorizes (the face of
# a small call: 64 features cost 2 us one by one).  A loop also says which features it could not
# settle; those are prepared for another try, and the same loop then runs over that feature alone.

cdef inline double low_limit(const real* real_tag) noexcept nogil:
    """Constants between this and its inverse leave the lanes room for x - shift and its square."""
    if real is float:
        return 1e-30
    else:
        return 1e-290


cdef inline double beyond(double value, double low) noexcept nogil:
    """1 if |value| is below low or above 1/low, else 0; zero and NaN pass.  (Conditions are doubles
    here: gcc 12 does not vectorize loops that mix them with ints.)"""
    cdef double size = fabs(value)
    cdef double small = size if size < low else 0
    return (1.0 if small > 0 else 0.0) + above(value, low)


cdef inline double above(double value, double low) noexcept nogil:
    """1 if |value| is over 1/low, else 0.  That is all that is asked of a bias: what rounding loses
    of a small one, half the least subnormal, is less than an output can hold.  And small it is
    where the mean happens to be a number of x's dtype: one feature in a hundred with M = 3136,
    and one such feature cost (64, 7, 7, 512) half its speed."""
    return 1.0 if fabs(value) > 1 / low else 0.0


cdef inline double is_lost(double product, double x, double y) noexcept nogil:
    """1 if the product of two factors that are not 0 sank to 0."""
    cdef double factors = (1.0 if x != 0 else 0.0) * (1.0 if y != 0 else 0.0)
    return factors if product == 0 else 0.0


cdef inline double power_of_two(double value) noexcept nogil:
    """The power of two below |value|, kept where it and its inverse are normal."""
    cdef int exponent
    if value == 0 or not isfinite(value):
        return 1
    frexp(value, &exponent)
    return ldexp(1.0, max(-1000, min(1000, exponent - 1)))


# ---------------------------------------------------------------- shifts

cdef Py_ssize_t sample_rows(
    const Plan* plan, int role, Py_ssize_t first, Py_ssize_t n_features, char** row,
    float[MAX_COLUMNS]* sample,
) noexcept nogil:
    """Addresses of the first, middle and last value of a tile's first feature, and how far the next
    feature's lie, in bytes; half types are taken to `sample`."""
    cdef Py_ssize_t offset[MAX_COLUMNS]
    cdef Py_ssize_t f, step = plan.feature_stride[role]
    cdef const Segment* segment = &plan.segment[0]
    cdef char* start = plan.base[role] + first * plan.feature_stride[role]
    cdef Py_ssize_t k
    for k in range(3):
        row_pointers(segment, role, start, (segment.n_rows - 1) * k // 2, 1, &row[k])
        row[k] += (
            (segment.n_joined - 1) * k // 2 * segment.joined_stride[role]
            + (segment.n_run - 1) * k // 2 * segment.run_stride[role]
        )
    if plan.storage == NATIVE:
        return step
    for f in range(n_features):
        offset[f] = f * step
    for k in range(3):
        gather_half_row[float](plan.storage, row[k], offset, n_features, sample[k])
        row[k] = <char*> sample[k]
    return sizeof(float)


cdef inline void sample_features(
    const char* row_a, const char* row_b, const char* row_c, Py_ssize_t step, Py_ssize_t n,
    bint around_zero, double* restrict shift, const real* real_tag,
) noexcept nogil:
    """shift[f] from three values of each of n features, which lie `step` bytes apart."""
    cdef Py_ssize_t f
    cdef real a, b, c, low, high, middle, gap, big, size
    cdef real digits = 1.5 * 2.0 ** 21 if real is float else 1.5 * 2.0 ** 50
    for f in range(n):
        a = (<const real*> (row_a + f * step))[0]
        b = (<const real*> (row_b + f * step))[0]
        c = (<const real*> (row_c + f * step))[0]
        low = a if a < b else b
        high = b if a < b else a
        middle = c if c < high else high
        middle = low if middle < low else middle
        low = low if low < c else c
        high = high if high > c else c
        gap = middle - low if middle - low < high - middle else high - middle
        big = digits * gap
        middle = (middle + big) - big
        if around_zero:
            size = middle if middle >= 0 else -middle
            big = middle if size > high - low else 0
            middle = big if gap > 0 else middle
        shift[f] = middle if (a - a) + (b - b) + (c - c) + (middle - middle) == 0 else 0


cdef void sample_shift(
    const Plan* plan, int role, Py_ssize_t first, Py_ssize_t n_features, double* restrict shift,
    const real* real_tag,
) noexcept nogil:
    """The shift of every feature of a tile: the median of its first, middle and last value, so near
    the middle of the data as no single outlier can be; 0 if it is not finite.

    It is rounded to a fourth of the gap to the nearer of the other two (adding and taking away 2^p
    steps does that).  A shift with more digits than the data makes roundings of x - shift that all
    go one way: float32, M = 8e5, sum dout was off by 60 roundings and dgamma, by way of the mean,
    by 100.  Equal values are kept, so that a constant feature leaves only zeros.

    A dout that lies around 0 needs no shift: its sum cancels, so that every digit of it counts, and
    the shift would be one more thing to round (float64, M = 1e6: 55 roundings for dgamma).  Not so
    a dout that repeats itself: its roundings do not average out.
    """
    cdef char* row[3]
    cdef float[3][MAX_COLUMNS] sample
    cdef Py_ssize_t step = sample_rows(plan, role, first, n_features, row, sample)
    cdef bint around_zero = role == G
    shift += first
    if step != sizeof(real):
        sample_features(
            row[0], row[1], row[2], step, n_features, around_zero, shift, real_tag
        )
    elif around_zero:  # what the compiler knows it can vectorize
        sample_features(
            row[0], row[1], row[2], sizeof(real), n_features, True, shift, real_tag
        )
    else:
        sample_features(
            row[0], row[1], row[2], sizeof(real), n_features, False, shift, real_tag
        )


cdef inline void gate_constants(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint wide, const real* real_tag,
) noexcept nogil:
    forward_constants[real](
        job.mean + f, job.mean_low + f, job.inv_std + f, job.gamma + f, job.beta + f,
        job.gate_shift + f, job.gate_factor + f, job.gate_scale + f, job.gate_bias + f,
        job.gate_wide + f, n, low_limit(real_tag), wide, real_tag,
    )


cdef void start_gate(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, const real* real_tag,
) noexcept nogil:
    """The constants that forward had, as finish_tile makes them there."""
    cdef Py_ssize_t f
    read_parameter(&job.gamma_given, first, n_features, job.gamma + first)
    read_parameter(&job.beta_given, first, n_features, job.beta + first)
    gate_constants[real](job, first, n_features, False, real_tag)
    if fold_run(job.gate_wide + first, n_features) == 0:  # none
        return
    for f in range(first, first + n_features):
        if job.gate_wide[f] != 0:
            if real is double:
                job.gate_factor[f] = power_of_two(job.inv_std[f])
            gate_constants[real](job, f, 1, True, real_tag)
            job.gate_wide[f] = 1


cdef void drop_gated_shift(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, const real* real_tag,
) noexcept nogil:
    """dout's shift is kept where the three values that it was guessed from come through: behind a
    gate that is closed (a dead unit) only 0 leaves sums of exactly 0.  It has to come through at
    shift_x too, as the kernel's padding does."""
    cdef const Plan* plan = &job.reduce
    cdef char* x[3]
    cdef char* r[3]
    cdef float[3][MAX_COLUMNS] x_sample
    cdef float[3][MAX_COLUMNS] r_sample
    cdef Py_ssize_t f, k, x_step, r_step = 0
    cdef double z
    cdef real at_shift
    x_step = sample_rows(plan, X, first, n_features, x, x_sample)
    if plan.used[R]:
        r_step = sample_rows(plan, R, first, n_features, r, r_sample)
    for f in range(n_features):
        for k in range(3):
            z = (<const real*> (x[k] + f * x_step))[0] - job.mean[first + f]
            z = z * job.inv_std[first + f] * job.gamma[first + f] + job.beta[first + f]
            if plan.used[R]:
                z += (<const real*> (r[k] + f * r_step))[0]
            if not z > 0:
                job.shift_g[first + f] = 0
        at_shift = affine(
            <real> job.shift_x[first + f], <real> job.gate_shift[first + f],
            <real> job.gate_scale[first + f], <real> job.gate_bias[first + f],
            0, <const Nothing*> NULL,
        )
        if not at_shift > 0:
            job.shift_g[first + f] = 0


cdef void start_tile(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, const real* real_tag,
) noexcept nogil:
    cdef Py_ssize_t f
    cdef double step, shift, steps = 1.5 * 2.0 ** 49 if job.kind == BACKWARD else 0
    for f in range(first, first + n_features):
        job.factor[f] = 1
    if job.gated:
        start_gate[real](job, first, n_features, real_tag)
    if job.kind == FORWARD or job.kind == PRODUCT:
        sample_shift[real](&job.reduce, X, first, n_features, job.shift_x, real_tag)
    if job.kind == PRODUCT:
        sample_shift[real](&job.reduce, G, first, n_features, job.shift_g, real_tag)
    if job.kind == FORWARD or job.kind == PRODUCT:
        return
    # Any shift near the mean will do for sums.  One with no digits below an eighth of the deviation
    # leaves x - shift exact or its rounding unbiased; with the digits of the mean, dgamma was off
    # by up to 100 roundings (M = 8e5).  Adding and taking away 2^52 steps rounds to a step.  A
    # constant feature keeps its value, for dgamma = 0, and so does a mean that was given.
    for f in range(first, first + n_features):
        step = steps * sqrt(job.var[f])
        shift = (job.mean[f] + step) - step
        job.shift_x[f] = <double> (<real> (shift if fabs(shift) < INFINITY else job.mean[f]))
        job.shift_g[f] = 0
    if job.kind == BACKWARD and job.exact_mean:
        sample_shift[real](&job.reduce, G, first, n_features, job.shift_g, real_tag)
        if job.gated:
            drop_gated_shift[real](job, first, n_features, real_tag)


# ---------------------------------------------------------------- sums to statistics

cdef inline double finish_sum(double high, double low) noexcept nogil:
    return high + low if fabs(high) < INFINITY else high


cdef inline double is_far(double delta, double s1, double s2) noexcept nogil:
    """1 if the shift is too far off: M var = S2 - S1^2/M is harmless while delta^2 <= 9 var, where
    delta = S1/M = mean - shift; the median of three keeps that but for contrived data."""
    return 1.0 if delta * s1 > 9 * (s2 - delta * s1) else 0.0


cdef inline double settle_forward(
    const double* restrict s1_high, const double* restrict s1_low,
    const double* restrict s2_high, const double* restrict s2_low,
    const double* restrict shift, const double* restrict factor,
    double* restrict mean, double* restrict mean_low, double* restrict inv_std,
    double* restrict var, double* restrict retry,
    Py_ssize_t n, double m, double eps, double low, bint first_try,
) noexcept nogil:
    """Mean, variance and inverse deviation of n features from their sums of d = x - shift:
    mean = shift + S1/M,  M var = S2 - S1^2/M.  Returns how many need another try (marked).

    The first try is in native lanes, whose factor is 1.  Divisions are what this loop costs.
    """
    cdef Py_ssize_t f
    cdef double s1, s2, delta, delta_low, part, high, m2, spread, back, scaled_eps, finite, sank
    cdef double count = 0, per = 1 / m, again = 1 if first_try else 0
    for f in range(n):
        back = 1.0 if first_try else 1 / factor[f]  # powers of two, both
        s1 = finish_sum(s1_high[f], s1_low[f])
        s2 = finish_sum(s2_high[f], s2_low[f])
        finite = 1.0 if fabs(s1) + fabs(s2) < INFINITY else 0.0
        delta = s1 * per
        m2 = s2 - delta * s1
        spread = m2 * per if m2 > 0 else 0.0
        sank = (
            (1.0 if s1 != 0 else 0.0) * (1.0 if spread + eps < low else 0.0)
            * (1.0 if fabs(shift[f]) < 1e140 else 0.0)
        )
        retry[f] = finite * is_far(delta, s1, s2) + again * (1 - finite + sank)
        count += retry[f]
        # What that left of S1: delta m is subtracted in two products that are exact.
        part = delta * (2.0 ** 27 + 1)
        part = part - (part - delta)
        delta_low = (((s1_high[f] - part * m) - (delta - part) * m) + s1_low[f]) * per
        delta_low = (delta_low if fabs(delta) < 1e290 else 0.0) * back
        delta = delta * back
        high = shift[f] + delta
        delta_low = ((shift[f] - high) + delta) + delta_low
        mean[f] = high
        mean_low[f] = delta_low if finite > 0 else 0.0
        spread = spread if finite > 0 else NAN
        var[f] = spread * back * back
        scaled_eps = eps if first_try else eps * factor[f] * factor[f]
        inv_std[f] = (
            (1.0 if first_try else factor[f]) / sqrt(spread + scaled_eps)
            if spread + scaled_eps != 0 else 0.0
        )
    return count


cdef inline double settle_backward(
    const double* restrict s1_high, const double* restrict s1_low,
    const double* restrict s2_high, const double* restrict s2_low,
    const double* restrict shift_x, const double* restrict shift_g,
    const double* restrict factor, const double* restrict mean,
    const double* restrict mean_low, const double* restrict multiplier,
    double* restrict dgamma, double* restrict dbeta,
    double* restrict mean_g, double* restrict mean_g_low, double* restrict retry,
    Py_ssize_t n, double m, double low, bint first_try,
) noexcept nogil:
    """dbeta = S1 + M shift_g and, as x - mean = d - rest,  dgamma = r (S2 - rest S1), where
    S1 = sum t, S2 = sum t d, t = dout - shift_g and r is the multiplier.  Returns how many need
    another try (marked)."""
    cdef Py_ssize_t f
    cdef double s1, s2, t, t_low, part, rest, high, rounding, finite, dead, sank, count = 0
    cdef double per = 1 / m, again = 1 if first_try else 0
    for f in range(n):
        s1 = finish_sum(s1_high[f], s1_low[f])
        s2 = finish_sum(s2_high[f], s2_low[f])
        rest = (mean[f] - shift_x[f]) + mean_low[f]
        finite = 1.0 if fabs(s1) + fabs(s2) < INFINITY else 0.0
        dead = 1.0 if fabs(s1) + fabs(s2) == 0 else 0.0
        sank = (1.0 if fabs(s2) < m * low else 0.0) * (1 - dead)
        retry[f] = again * (1 - finite + sank)
        count += retry[f]
        part = shift_g[f] * (2.0 ** 27 + 1)
        part = part - (part - shift_g[f])
        t = m * shift_g[f]
        t_low = (part * m - t) + (shift_g[f] - part) * m
        t_low = t_low if fabs(t) < 1e290 else 0.0
        high = s1_high[f] + t
        rounding = (s1_high[f] - (high - (high - s1_high[f]))) + (t - (high - s1_high[f]))
        dbeta[f] = finish_sum(high, rounding + t_low + s1_low[f])
        t = s1 * per
        part = t * (2.0 ** 27 + 1)  # what that left, as in forward
        part = part - (part - t)
        t_low = (((s1_high[f] - part * m) - (t - part) * m) + s1_low[f]) * per
        mean_g[f] = shift_g[f] + t
        mean_g_low[f] = ((shift_g[f] - mean_g[f]) + t) + (t_low if fabs(t) < 1e290 else 0.0)
        dgamma[f] = (
            (multiplier[f] if first_try else multiplier[f] / factor[f]) * s2
            - (multiplier[f] * rest * s1 if rest != 0 else 0.0)
        )
    return count


cdef void merge_chunks(Job* job, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """Add the chunks' sums to those of chunk 0, in order, rounding errors kept."""
    cdef Py_ssize_t chunk, which, stride = job.stride
    cdef double* total
    cdef double* part
    for chunk in range(1, job.reduce.n_chunks):
        for which in range(0, 4, 2):
            total = job.sums + first + which * stride
            part = total + 4 * chunk * stride
            add_compensated(total, total + stride, part, n)
            fold_halves(total + stride, part + stride, n)


cdef inline double settle(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint first_try, const real* real_tag,
) noexcept nogil:
    cdef double* sums = job.sums + f
    cdef double m = job.total
    cdef double low = low_limit(real_tag)
    cdef Py_ssize_t stride = job.stride
    if job.kind == FORWARD:
        return settle_forward(
            sums, sums + stride, sums + 2 * stride, sums + 3 * stride,
            job.shift_x + f, job.factor + f,
            job.mean + f, job.mean_low + f, job.inv_std + f, job.var + f, job.retry + f,
            n, m, job.eps, low, first_try,
        )
    return settle_backward(
        sums, sums + stride, sums + 2 * stride, sums + 3 * stride,
        job.shift_x + f, job.shift_g + f, job.factor + f,
        job.mean + f, job.mean_low + f, job.multiplier + f,
        job.dgamma + f, job.dbeta + f, job.mean_g + f, job.mean_g_low + f, job.retry + f,
        n, m, low, first_try,
    )


cdef void prepare_retry(Job* job, Py_ssize_t f, const real* real_tag) noexcept nogil:
    """A better shift where that was the matter, else other lanes: float64's hold every square of
    float32, and every square of float64 once it is scaled."""
    cdef double* sums = job.sums + f
    cdef double m = job.total
    cdef double s1 = finish_sum(sums[0], sums[job.stride])
    cdef double s2 = finish_sum(sums[2 * job.stride], sums[3 * job.stride])
    cdef bint finite = isfinite(s1) and isfinite(s2)
    if job.kind != FORWARD:
        job.shift_x[f] = job.mean[f]
        if real is double:
            job.factor[f] = power_of_two(job.inv_std[f])
    elif finite and is_far(s1 * (1 / m), s1, s2) != 0:
        job.shift_x[f] += s1 / m / job.factor[f]
    elif real is double:
        job.factor[f] = ldexp(1.0, 540 if finite else -540)


# ---------------------------------------------------------------- statistics to constants
#
# What the second visit subtracts, multiplies and adds.  The shift is the mean rounded to x's dtype,
# so x - shift is exact near the mean; the rest of the mean goes into the constant.  The marks are
# those features whose constants the native lanes cannot hold; for them it is done again, `wide`,
# with factor set.

cdef inline void forward_constants(
    const double* restrict mean, const double* restrict mean_low, const double* restrict inv_std,
    const double* restrict gamma, const double* restrict beta,
    double* restrict shift, double* restrict factor, double* restrict scale,
    double* restrict bias, double* restrict wide_mark,
    Py_ssize_t n, double low, bint wide, const real* real_tag,
) noexcept nogil:
    """y = (x - shift) scale + bias."""
    cdef Py_ssize_t f
    cdef double r, a, rest
    for f in range(n):
        r = inv_std[f]
        a = gamma[f] * r
        shift[f] = mean[f] if wide else <double> (<real> mean[f])
        rest = (mean[f] - shift[f]) + mean_low[f]
        factor[f] = factor[f] if wide else 1
        scale[f] = gamma[f] * (r / factor[f]) if wide else a
        bias[f] = beta[f] - (rest * a if rest != 0 else 0.0)
        wide_mark[f] = (
            beyond(shift[f], low) + beyond(r, low) + beyond(a, low) + above(bias[f], low)
            + is_lost(a, gamma[f], r)
        )


cdef inline void backward_constants(
    const double* restrict mean, const double* restrict mean_low, const double* restrict inv_std,
    const double* restrict gamma, const double* restrict dgamma,
    const double* restrict mean_g, const double* restrict mean_g_low,
    double* restrict shift_x, double* restrict shift_g, double* restrict factor,
    double* restrict scale, double* restrict slope, double* restrict bias,
    double* restrict wide_mark,
    Py_ssize_t n, double m, double eps, double low, bint wide, const real* real_tag,
) noexcept nogil:
    """dx = a ((dout - mean_g) - (x - mean) r dgamma / M), a = gamma r; M = 1 leaves dx = 0.

    M = 2 leaves of two terms of the size of dout only dx = a eps r^2 (dout - mean_g), which is used
    where eps is known (not negative): no digit is lost.
    """
    cdef Py_ssize_t f
    cdef double r, a, q, rest, share
    # gcc does not vectorize a choice that is the same for all features, hence the arithmetic.
    cdef double two = 1 if m == 2 and eps >= 0 else 0
    cdef double least = 1 - two
    cdef double per = 0 if two or m <= 1 else 1 / m
    eps = eps * two
    for f in range(n):
        r = inv_std[f]
        share = eps * r * r
        a = gamma[f] * r * (share if share > least else least)
        q = dgamma[f] * per
        shift_x[f] = mean[f] if wide else <double> (<real> mean[f])
        shift_g[f] = mean_g[f] if wide else <double> (<real> mean_g[f])
        rest = (mean[f] - shift_x[f]) + mean_low[f]
        factor[f] = factor[f] if wide else 1
        scale[f] = a
        slope[f] = a * q * (r / factor[f] if wide else r)
        bias[f] = (
            (slope[f] * (factor[f] * rest if wide else rest) if rest != 0 else 0.0)
            - a * ((mean_g[f] - shift_g[f]) + mean_g_low[f])
        )
        wide_mark[f] = (
            beyond(shift_x[f], low) + beyond(shift_g[f], low) + beyond(r, low)
            + beyond(a, low) + beyond(slope[f], low) + above(bias[f], low)
            + (1 - two) * is_lost(a, gamma[f], r) + is_lost(slope[f], a, q)
        )


cdef inline void set_constants(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint wide, const real* real_tag,
) noexcept nogil:
    cdef double low = low_limit(real_tag)
    cdef Py_ssize_t k
    if job.kind == BACKWARD:
        backward_constants[real](
            job.mean + f, job.mean_low + f, job.inv_std + f, job.gamma + f, job.dgamma + f,
            job.mean_g + f, job.mean_g_low + f,
            job.shift_x + f, job.shift_g + f, job.factor + f, job.scale + f, job.slope + f,
            job.bias + f, job.wide + f,
            n, job.total, job.eps, low, wide, real_tag,
        )
    elif job.kind == SECOND:
        second_constants[real](job, f, n, wide, real_tag)
    elif job.kind == BACKWARD_FROZEN:
        # dx = gamma inv_std dout: the affine kernel on dout.
        for k in range(f, f + n):
            job.shift_x[k] = job.bias[k] = 0
            job.factor[k] = 1
            job.scale[k] = job.gamma[k] * job.inv_std[k]
            job.wide[k] = beyond(job.scale[k], low) + is_lost(
                job.scale[k], job.gamma[k], job.inv_std[k]
            )
    else:
        forward_constants[real](
            job.mean + f, job.mean_low + f, job.inv_std + f, job.gamma + f, job.beta + f,
            job.shift_x + f, job.factor + f, job.scale + f, job.bias + f, job.wide + f,
            n, low, wide, real_tag,
        )


cdef void finish_tile(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, Scratch* s, const real* real_tag,
) noexcept nogil:
    """Settle the tile's features, again in wide lanes where needed, and set their constants."""
    cdef Py_ssize_t f, chunk
    cdef double unsettled
    cdef int attempt
    if job.reduces:
        merge_chunks(job, first, n_features)
        unsettled = settle(job, first, n_features, True, real_tag)
        for attempt in range(3):
            if unsettled == 0:
                break
            for f in range(first, first + n_features):
                if job.retry[f] != 0:
                    prepare_retry[real](job, f, real_tag)
            for chunk in range(job.reduce.n_chunks):
                reduce_tile[real, double](
                    job, chunk, first, n_features, s, real_tag, <const double*> NULL, True
                )
            merge_chunks(job, first, n_features)
            unsettled = 0
            for f in range(first, first + n_features):
                if job.retry[f] != 0:
                    unsettled += settle(job, f, 1, False, real_tag)
    if job.mean_kept != NULL:
        memcpy(job.mean_kept + first, job.mean_g + first, n_features * sizeof(double))
        memcpy(job.mean_kept_low + first, job.mean_g_low + first, n_features * sizeof(double))
    if not job.applies:
        return
    if job.kind == BACKWARD and not job.reduces:
        for f in range(first, first + n_features):
            job.mean_g[f] = job.dbeta[f] / job.total
            job.mean_g_low[f] = 0
    read_parameter(&job.gamma_given, first, n_features, job.gamma + first)
    if job.beta_given.data != NULL:
        read_parameter(&job.beta_given, first, n_features, job.beta + first)
    set_constants[real](job, first, n_features, False, real_tag)
    if fold_run(job.wide + first, n_features) == 0:  # none
        return
    for f in range(first, first + n_features):
        if job.wide[f] != 0:
            if real is double:
                job.factor[f] = power_of_two(job.inv_std[f])
            set_constants[real](job, f, 1, True, real_tag)
            job.wide[f] = 1
