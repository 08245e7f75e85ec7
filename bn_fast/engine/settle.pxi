# Between the visits, from a feature's sums to its statistics, gradients and constants.
#
# Each step is one loop over a tile's features, free of branches so that it vectorizes (which a
# small call feels: 64 features cost 2 us one by one).  A loop also says which features it could not
# settle; those are prepared for another try, and the same loop then runs over that feature alone.

# ---------------------------------------------------------------- the range

cdef inline double low_limit(const Job* job) noexcept nogil:
    """Constants between this and its inverse leave the lanes room for x - shift and its square."""
    return 1e-290 if job.reduce.storage == FLOAT64 else 1e-30


cdef inline double scaled_down() noexcept nogil:
    """What dout is multiplied by where it is so large that sums leave float64's range: no digit
    that counts is lost then."""
    return 2.0 ** -128


cdef inline double above(double value, double low) noexcept nogil:
    """1 if |value| is over 1/low, else 0.  That is all that is asked of a bias: what rounding loses
    of a small one, half the least subnormal, is less than an output can hold.  And small it is
    where the mean happens to be a number of x's dtype: one feature in a hundred with M = 3136,
    and one such feature cost (64, 7, 7, 512) half its speed."""
    return 1.0 if fabs(value) > 1 / low else 0.0


cdef inline double beyond(double value, double low) noexcept nogil:
    """1 if |value| is below low or above 1/low, else 0; zero and NaN pass.  (Conditions are doubles
    here: gcc 12 does not vectorize loops that mix them with ints.)"""
    cdef double size = fabs(value)
    cdef double small = size if size < low else 0
    return (1.0 if small > 0 else 0.0) + above(value, low)


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
    return ldexp(1.0, max(-1021, min(1021, exponent - 1)))


cdef inline double sinking(double gamma, double inv_std) noexcept nogil:
    """What dout is multiplied by where gamma inv_std would leave float64's range at the lower end,
    else 1."""
    return power_of_two(inv_std) if inv_std < 1 and fabs(gamma * inv_std) < 1e-290 else 1


cdef inline double wide_factor(double mean, double inv_std) noexcept nogil:
    """What float64 lanes multiply x by so that x - mean is near 1.  Products of deviations down to
    2^-300 are in range as they are; and a feature that would leave it is constant."""
    cdef double factor = power_of_two(inv_std)
    if fabs(mean) > 1e290:  # nor may x - mean overflow where x has no weight, and is the lowest
        return min(factor, 0.25)
    return 1 if 1 < factor < 2.0 ** 300 or fabs(mean) * factor > 1e300 else factor


# ---------------------------------------------------------------- shifts

cdef Py_ssize_t sample_rows(
    const Plan* plan, int role, Py_ssize_t first, Py_ssize_t n, Py_ssize_t cells, char** row,
    float[MAX_COLUMNS]* sample,
) noexcept nogil:
    """Addresses of three values of a tile's first feature, or of the first, the middle and the last
    of so many cells, and how far the next one's lie, in bytes; half types' n are taken to `sample`.
    """
    cdef Py_ssize_t offset[MAX_COLUMNS]
    cdef Py_ssize_t f, k, step = plan.feature_stride[role] * cells
    for k in range(3):
        row[k] = value_at(plan, role, first + (cells - 1) * k // 2, &plan.sample[k])
    if not is_half(plan.storage):
        return step
    for f in range(n):
        offset[f] = f * step
    for k in range(3):
        gather_half[float](plan.storage, row[k], offset, n, sample[k])
        row[k] = <char*> sample[k]
    return sizeof(float)


cdef inline void sample_features(
    const char* row_a, const char* row_b, const char* row_c, Py_ssize_t step, Py_ssize_t n,
    bint around_zero, double* restrict shift, double* restrict spread, const lane* lane_tag,
) noexcept nogil:
    """shift[f] from three values of each of n features, which lie `step` bytes apart, and, where
    that is asked again, how far apart they are."""
    cdef Py_ssize_t f
    cdef lane a, b, c, low, high, middle, gap, big, size, down, up
    cdef lane digits = 1.5 * 2.0 ** 21 if lane is float else 1.5 * 2.0 ** 50
    # Values from here on are scaled for the rounding: 2^p steps would leave the range.
    cdef lane large = 2.0 ** 60 if lane is float else 2.0 ** 500
    for f in range(n):
        a = (<const lane*> (row_a + f * step))[0]
        b = (<const lane*> (row_b + f * step))[0]
        c = (<const lane*> (row_c + f * step))[0]
        low = a if a < b else b
        high = b if a < b else a
        middle = c if c < high else high
        middle = low if middle < low else middle
        low = low if low < c else c
        high = high if high > c else c
        gap = middle - low if middle - low < high - middle else high - middle
        size = middle if middle >= 0 else -middle
        down = 1 / large if size > large else 1
        up = large if size > large else 1
        big = digits * (gap * down)
        middle = ((middle * down + big) - big) * up
        if around_zero:
            size = middle if middle >= 0 else -middle
            big = middle if size > 4 * (high - low) else 0
            middle = big if gap > 0 else middle
            spread[f] = high - low
        shift[f] = middle if (a - a) + (b - b) + (c - c) + (middle - middle) == 0 else 0


cdef void sample_own_shift(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, const lane* lane_tag,
) noexcept nogil:
    """The shift of x, as below, where weights differ between features: each has its own three
    values."""
    cdef const Plan* plan = job.reduce
    cdef Place[3] sample
    cdef lane[3] value
    cdef Py_ssize_t f, k
    for f in range(first, first + n_features):
        choose_sample(plan, f, job.value[TOTAL][f] / job.total / 2, sample)
        for k in range(3):
            value[k] = <lane> load_value(plan.storage, value_at(plan, X, f, &sample[k]))
        sample_features[lane](
            <char*> &value[0], <char*> &value[1], <char*> &value[2], sizeof(lane), 1, False,
            job.value[SHIFT_X] + f, job.value[SPREAD] + f, lane_tag,
        )


cdef void sample_shift(
    Job* job, int role, Py_ssize_t first, Py_ssize_t n_features, const lane* lane_tag,
) noexcept nogil:
    """The shift of every feature of a tile: the median of three of its values, so near the middle
    of the data as no single outlier can be; 0 if it is not finite.

    It is rounded to a fourth of the gap to the nearer of the other two (adding and taking away 2^p
    steps does that).  A shift with more digits than the data makes roundings of x - shift that all
    go one way: float32, M = 8e5, sum dout was off by 60 roundings and dgamma, by way of the mean,
    by 100.  Equal values are kept, so that a constant feature leaves only zeros.

    A dout that lies around 0, or not four times farther from it than its values from one another,
    needs no shift: its sum cancels, so that every digit of it counts, and the shift would be one
    more thing to round, M times over (float64, M = 1e6: 55 roundings for dgamma; M = 1560, of 24
    features one or two had a shift: 12 for dbeta, 1 without).  Not so a dout that repeats itself:
    its roundings do not average out.

    Cells have one shift of x, that their sums may be added, and each its own of dout.
    """
    cdef char* row[3]
    cdef float[3][MAX_COLUMNS] sample
    cdef lane[3][MAX_COLUMNS] scaled
    cdef const char* gamma
    cdef bint around_zero = role == G
    cdef Py_ssize_t cells = 1 if around_zero else job.cells, n = n_features // cells
    cdef Py_ssize_t f, k, step = sample_rows(
        job.reduce, role, first, n, cells, row, sample
    )
    cdef double* shift = job.value[SHIFT_G if around_zero else SHIFT_X] + first
    cdef double* spread = job.value[SPREAD] + first
    if role == G and job.reduce.used[S]:  # what is summed
        for k in range(3):
            gamma = value_at(job.reduce, S, first, &job.reduce.sample[k])
            for f in range(n_features):
                scaled[k][f] = (<const lane*> (row[k] + f * step))[0] * <lane> load_native(
                    job.reduce, gamma + f * job.reduce.feature_stride[S]
                )
            row[k] = <char*> scaled[k]
        step = sizeof(lane)
    if step != sizeof(lane):
        sample_features(row[0], row[1], row[2], step, n, around_zero, shift, spread, lane_tag)
    elif around_zero:  # what the compiler knows it can vectorize
        sample_features(row[0], row[1], row[2], sizeof(lane), n, True, shift, spread, lane_tag)
    else:
        sample_features(row[0], row[1], row[2], sizeof(lane), n, False, shift, spread, lane_tag)
    if cells > 1:
        for f in range(n_features - 1, -1, -1):
            shift[f] = shift[f // cells]


cdef void round_means(
    Job* job, Py_ssize_t first, Py_ssize_t n, const lane* lane_tag,
) noexcept nogil:
    """Shifts of x near its mean; none of dout.

    Any shift near the mean will do for sums.  One with no digits below an eighth of the deviation
    leaves x - shift exact or its rounding unbiased; with the digits of the mean, dgamma was off
    by up to 100 roundings (M = 8e5).  Adding and taking away 2^52 steps rounds to a step.  A
    constant feature keeps its value, for dgamma = 0."""
    cdef Py_ssize_t f
    cdef double* mean = job.value[MEAN]
    cdef double* var = job.value[VAR]
    cdef double step, shift
    for f in range(first, first + n):
        step = 1.5 * 2.0 ** 49 * sqrt(var[f])
        shift = (mean[f] + step) - step
        job.value[SHIFT_X][f] = <double> (<lane> (shift if fabs(shift) < INFINITY else mean[f]))
        job.value[SHIFT_G][f] = 0


cdef void round_near(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, const lane* lane_tag,
) noexcept nogil:
    """The same where a mean is known but not the deviation: no digits below a fourth of the nearest
    of three values' distance.  (The median of three may be an outlier, where there are many: the
    second order's dgamma was 370 roundings off, M = 6e4.)"""
    cdef char* row[3]
    cdef float[3][MAX_COLUMNS] sample
    cdef double* mean = job.value[MEAN] + first
    cdef double near, shift, step
    cdef Py_ssize_t f, k, stride = sample_rows(
        job.reduce, X, first, n_features, 1, row, sample
    )
    for f in range(n_features):
        near = INFINITY
        for k in range(3):
            near = min(near, fabs((<const lane*> (row[k] + f * stride))[0] - mean[f]))
        step = 1.5 * 2.0 ** 50 * near
        shift = (mean[f] + step) - step
        job.value[SHIFT_X][first + f] = <double> (
            <lane> (shift if fabs(shift) < INFINITY else mean[f])
        )


# ---------------------------------------------------------------- the gate

cdef inline bint is_open_at(const Job* job, double z) noexcept nogil:
    return kernels[job.activation][0].is_open(z, job.negative_slope, NULL)


cdef inline bint comes_through(const Job* job, Py_ssize_t f, double x, double r) noexcept nogil:
    """Whether the gate is open for a value of x and the residual's; near a kink it may say the
    wrong thing, so nothing that has to be exact may depend on it."""
    cdef double x_hat = (x - job.value[MEAN][f]) * job.value[INV_STD][f]
    return is_open_at(job, x_hat * job.value[GAMMA][f] + job.value[BETA][f] + r)


cdef void drop_gated_shift(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, const lane* lane_tag,
) noexcept nogil:
    """dout's shift is kept where the three values that it was guessed from come through: behind a
    gate that is closed (a dead unit) only 0 leaves sums of exactly 0.  It has to come through at
    shift_x too, as the kernel's padding does."""
    cdef const Plan* plan = job.reduce
    cdef double** v = job.value
    cdef char* x[3]
    cdef char* r[3]
    cdef float[3][MAX_COLUMNS] x_sample
    cdef float[3][MAX_COLUMNS] r_sample
    cdef Py_ssize_t f, k, x_step, r_step = 0
    cdef double residual = 0
    cdef bint open
    cdef lane d
    x_step = sample_rows(plan, X, first, n_features, 1, x, x_sample)
    if plan.used[R]:
        r_step = sample_rows(plan, R, first, n_features, 1, r, r_sample)
    for f in range(first, first + n_features):
        d = <lane> v[SHIFT_X][f] - <lane> v[GATE_SHIFT][f]
        open = is_open_at(job, d * <lane> v[GATE_COEF][f] + <lane> v[GATE_BIAS][f])
        for k in range(3):
            if plan.used[R]:
                residual = (<const lane*> (r[k] + (f - first) * r_step))[0]
            open = open and comes_through(
                job, f, (<const lane*> (x[k] + (f - first) * x_step))[0], residual
            )
        if not open:
            v[SPREAD][f] += fabs(v[SHIFT_G][f])
            v[SHIFT_G][f] = 0


# ---------------------------------------------------------------- a second look at dout's shift

cdef enum:
    LOOKS = 8                 # values at which a doubtful shift of dout is looked at again


cdef inline void mark_doubtful(
    const double* restrict shift, const double* restrict mean, double* restrict spread,
    Py_ssize_t n,
) noexcept nogil:
    """In place of its spread 1 for a feature whose shift of dout may not be near the mean: farther
    than the three values let expect, or than 0 is; else 0."""
    cdef Py_ssize_t f
    cdef double limit, size
    for f in range(n):
        limit = 4 * spread[f]
        size = fabs(mean[f]) if shift[f] != 0 else limit
        limit = size if size < limit else limit
        spread[f] = 1.0 if fabs(mean[f] - shift[f]) > limit else 0.0


cdef double distance_from_mean(
    const Job* job, Py_ssize_t first, Py_ssize_t f, char* (*look)[LOOKS],
) noexcept nogil:
    """How far dout is from its mean, on the mean of some values, of which the first feature's lie
    at these places."""
    cdef const Plan* plan = job.reduce
    cdef const Py_ssize_t* step = plan.feature_stride
    cdef Py_ssize_t k, n = f - first
    cdef double g, x, r = 0, mean = job.value[MEAN_G][f], distance = 0
    for k in range(LOOKS):
        g = load_value(plan.storage, look[G][k] + n * step[G])
        if plan.used[S]:
            g *= load_native(plan, look[S][k] + n * step[S])
        if plan.gate != NONE:
            x = load_value(plan.storage, look[X][k] + n * step[X])
            if plan.used[R]:
                r = load_value(plan.storage, look[R][k] + n * step[R])
            g = g if comes_through(job, f, x, r) else 0
        distance += fabs(g - mean)
    return distance / LOOKS


cdef double look_again(Job* job, Py_ssize_t first, Py_ssize_t n_features) noexcept nogil:
    """Mark the features whose shift of dout was not near the mean, now that it is known, and give
    them a better one; returns how many.

    Of three values two may be outliers, and then what the others add to the sums is rounded away,
    always in one direction: dout = 1 but for three values of 1e9, float32, M = 1e5, dbeta was off
    by 280 roundings.  Where that may be, some more values say how far from the mean is far.
    """
    cdef const Plan* plan = job.reduce
    cdef const Segment* segment = &plan.segment[0]
    cdef double** v = job.value
    cdef Place place
    cdef char* look[N_ROLES][LOOKS]
    cdef Py_ssize_t f, k, end = first + n_features
    cdef int r
    cdef double* shift = v[SHIFT_G]
    cdef double* mean = v[MEAN_G]
    cdef double* doubtful = v[SPREAD]
    cdef double distance, step, n_far = 0
    mark_doubtful(shift + first, mean + first, doubtful + first, n_features)
    if fold_run(doubtful + first, n_features) == 0:
        return 0
    for k in range(LOOKS):
        place.segment = 0
        place.row = (segment.n_rows - 1) * (2 * k + 1) // (2 * LOOKS)
        place.joined = k % segment.n_joined
        place.run = (segment.n_run - 1) * (2 * k + 1) // (2 * LOOKS)
        for r in range(N_ROLES):
            if plan.used[r]:
                look[r][k] = value_at(plan, r, first, &place)
    f = next_marked(doubtful, first, end)
    while f < end:
        distance = distance_from_mean(job, first, f, look) if v[RETRY][f] == 0 else INFINITY
        if fabs(mean[f] - shift[f]) > 8 * distance:
            step = 1.5 * 2.0 ** 49 * distance  # no more digits than it needs, see round_means
            step = step if step < INFINITY else 0
            shift[f] = (mean[f] + step) - step
            v[RETRY][f] = 1
            n_far += 1
        f = next_marked(doubtful, f + 1, end)
    return n_far


# ---------------------------------------------------------------- sums to statistics

cdef inline double is_far(double delta, double s1, double s2) noexcept nogil:
    """1 if the shift is too far off: M var = S2 - S1^2/M is harmless while delta^2 <= 9 var, where
    delta = S1/M = mean - shift; the median of three keeps that but for contrived data."""
    return 1.0 if delta * s1 > 9 * (s2 - delta * s1) else 0.0


cdef inline double settle_statistics(
    const double* restrict s1_high, const double* restrict s1_low,
    const double* restrict s2_high, const double* restrict s2_low,
    const double* restrict shift, const double* restrict factor,
    double* restrict mean, double* restrict mean_low, double* restrict inv_std,
    double* restrict var, double* restrict retry,
    Py_ssize_t n, double m, double eps, double low, bint first_try, bint exact,
) noexcept nogil:
    """Mean, variance and inverse deviation of n features from their sums of d = x - shift:
    mean = shift + S1/M,  M var = S2 - S1^2/M, whose low parts count: the two may be ten times as
    large as what they leave.  Not where `exact` is false: what float32 lanes have added lost more.
    Returns how many need another try (marked).

    The first try is in native lanes, whose factor is 1.
    """
    cdef Py_ssize_t f
    cdef double s1, s2, delta, delta_low, part, left, square, m2, high, spread, back, scaled_eps
    cdef double finite, sank, per = 1 / m, again = 1 if first_try else 0
    for f in range(n):
        back = 1.0 if first_try else 1 / factor[f]  # powers of two, both
        s1 = finish_sum(s1_high[f], s1_low[f])
        s2 = finish_sum(s2_high[f], s2_low[f])
        finite = 1.0 if fabs(s1) + fabs(s2) < INFINITY else 0.0
        delta = s1 * per
        left = 0
        square = delta * s1
        m2 = s2 - square
        if exact:
            part = head(delta)
            left = ((s1_high[f] - part * m) - (delta - part) * m) + s1_low[f]  # S1 - M delta
            m2 = m2 + (
                (((s2_high[f] - s2) + s2_low[f]) - product_error(delta, s1, square))
                - delta * (((s1_high[f] - s1) + s1_low[f]) + left)
            )
        spread = m2 * per if m2 > 0 else 0.0
        sank = (
            (1.0 if s1 != 0 else 0.0) * (1.0 if spread + eps < low else 0.0)
            * (1.0 if fabs(shift[f]) < 1e140 else 0.0)
        )
        retry[f] = finite * is_far(delta, s1, s2) + again * (1 - finite + sank)
        delta_low = (left * per if fabs(delta) < 1e290 else 0.0) * back
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
    return fold_run(retry, n)


cdef inline double settle_squares(
    const double* restrict s2_high, const double* restrict s2_low, const double* restrict factor,
    double* restrict mean, double* restrict mean_low, double* restrict inv_std,
    double* restrict var, double* restrict retry,
    Py_ssize_t n, double m, double eps, double low, bint first_try,
) noexcept nogil:
    """The same of RMS norm: no mean, and the shift is 0."""
    cdef Py_ssize_t f
    cdef double s2, spread, finite, scale, per = 1 / m, again = 1 if first_try else 0
    for f in range(n):
        scale = 1.0 if first_try else factor[f]
        s2 = finish_sum(s2_high[f], s2_low[f])
        finite = 1.0 if s2 < INFINITY else 0.0
        spread = s2 * per
        retry[f] = again * (1 - finite + (1.0 if spread + eps < low else 0.0))
        mean[f] = mean_low[f] = 0
        var[f] = spread if first_try else spread / scale / scale
        spread = spread + (eps if first_try else eps * scale * scale)
        inv_std[f] = scale / sqrt(spread) if spread != 0 else 0.0
    return fold_run(retry, n)


cdef inline double settle_gradients(
    const double* restrict s1_high, const double* restrict s1_low,
    const double* restrict s2_high, const double* restrict s2_low,
    const double* restrict shift_x, const double* restrict shift_g,
    const double* restrict factor, const double* restrict factor_g,
    const double* restrict mean, const double* restrict mean_low,
    const double* restrict multiplier, double* restrict dgamma, double* restrict dbeta,
    double* restrict mean_g, double* restrict mean_g_low, double* restrict mean_gx,
    double* restrict retry, Py_ssize_t n, double m, double low, bint first_try, bint exact,
) noexcept nogil:
    """dbeta = S1 + M shift_g and, as x - mean = d - rest,  dgamma = r (S2 - rest S1), where
    S1 = sum t, S2 = sum t d, t = dout - shift_g and r is the multiplier.  Their means stay finite
    where the sums do not, but for mean_gx, times factor_g: see `unscale_product`.  A dbeta so small
    that a factor would cost it digits stays as the first try had it: then what is not finite is x.
    Returns how many need another try (marked)."""
    cdef Py_ssize_t f
    cdef double s1, s2, t, t_low, part, rest, shift, high, whole, finite, dead, sank, back
    cdef double per = 1 / m, again = 1 if first_try else 0
    for f in range(n):
        back = 1.0 if first_try else 1 / factor_g[f]  # powers of two, both
        s1 = finish_sum(s1_high[f], s1_low[f])
        s2 = finish_sum(s2_high[f], s2_low[f])
        rest = (mean[f] - shift_x[f]) + mean_low[f]
        dead = 1.0 if fabs(s1) + fabs(s2) == 0 else 0.0
        sank = (1.0 if fabs(s2) < m * low else 0.0) * (1 - dead)
        shift = shift_g[f] * (1.0 if first_try else factor_g[f])
        t = m * shift
        if exact:
            part = head(shift)
            t_low = (part * m - t) + (shift - part) * m
            t_low = t_low if fabs(t) < 1e290 else 0.0
            high = s1_high[f] + t
            whole = finish_sum(high, sum_error(s1_high[f], t, high) + t_low + s1_low[f]) * back
        else:
            whole = (s1 + t) * back
        if first_try or not 0 < fabs(dbeta[f]) < 2.0 ** -800:
            dbeta[f] = whole
        t = s1 * per
        t_low = 0
        if exact:
            part = head(t)  # what that left, as in forward
            t_low = (((s1_high[f] - part * m) - (t - part) * m) + s1_low[f]) * per
        high = shift + t
        mean_g[f] = high * back
        mean_g_low[f] = (((shift - high) + t) + (t_low if fabs(t) < 1e290 else 0.0)) * back
        t = (
            (multiplier[f] if first_try else multiplier[f] / factor[f]) * s2
            - (multiplier[f] * rest * s1 if rest != 0 else 0.0)
        )
        dgamma[f] = t * back
        mean_gx[f] = t * per
        finite = 1.0 if fabs(s1) + fabs(s2) + fabs(t) < INFINITY else 0.0
        retry[f] = again * (1 - finite + sank)
    return fold_run(retry, n)


cdef inline void unscale_product(Job* job, Py_ssize_t f) noexcept nogil:
    """Take dout's factor off the mean of dout x_hat.  Where x has no weight x_hat may be anything,
    so that this leaves the range where dx does not: both stay then, for `backward_constants`."""
    cdef double* factor = job.value[FACTOR_G] + f
    cdef double* scaled = job.value[MEAN_GX] + f
    cdef double product = scaled[0] / factor[0]
    if job.array[W] == NULL or fabs(product) < INFINITY or not fabs(scaled[0]) < INFINITY:
        scaled[0] = product
        factor[0] = 1


# ---------------------------------------------------------------- sums of chunks
#
# The sums of chunks are added as a binary tree whose nodes are chunks k 2^l .. (k + 1) 2^l - 1, so
# that the order depends on their number alone and yet a thread adds up what lies in its own share,
# in its own cache: chunks start .. end - 1 leave few nodes, one after the other in slots from
# `start` on.  Of (3136, 512) on two threads 82 KB are left for the others to read, of 410.

cdef inline Py_ssize_t node_length(Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    """Of the largest node that begins with chunk `start` and ends before `end`."""
    cdef Py_ssize_t length = 1
    while start % (2 * length) == 0 and start + 2 * length <= end:
        length *= 2
    return length


cdef inline Py_ssize_t n_nodes(Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t n = 0
    while start < end:
        start += node_length(start, end)
        n += 1
    return n


cdef void join_nodes(
    Job* job, Py_ssize_t low, Py_ssize_t high, Py_ssize_t first, Py_ssize_t n,
) noexcept nogil:
    """Add one slot's sums to another's, rounding errors kept."""
    cdef Py_ssize_t which, stride = job.stride
    cdef double* total
    cdef double* part
    for which in range(0, 4, 2):
        total = job.sums + (4 * low + which) * stride + first
        part = job.sums + (4 * high + which) * stride + first
        add_compensated(total, total + stride, part, n)
        fold_halves(total + stride, part + stride, n)


cdef inline Py_ssize_t share_start(
    Py_ssize_t n_tasks, int thread, int n_threads, Py_ssize_t tile, Py_ssize_t n_tiles,
) noexcept nogil:
    """A thread's first chunk of a tile; tasks are tiles of chunk 0, of chunk 1, ..."""
    return (thread * n_tasks // n_threads - tile + n_tiles - 1) // n_tiles


cdef void join_shares(
    Job* job, double* sums, Py_ssize_t tile, int n_threads, Py_ssize_t first, Py_ssize_t n,
) noexcept nogil:
    """The sums of n_threads' shares of a tile's chunks, which lie in `sums`, into the job's first
    slot."""
    cdef Py_ssize_t[MAX_CHUNKS] open_nodes
    cdef Py_ssize_t n_tiles = job.schedule.n_tiles, n_tasks = job.reduce.n_chunks * n_tiles
    cdef Py_ssize_t start, end, slot, which, at, n_open = 0
    cdef int thread
    for thread in range(n_threads):
        start = slot = share_start(n_tasks, thread, n_threads, tile, n_tiles)
        end = share_start(n_tasks, thread + 1, n_threads, tile, n_tiles)
        while start < end:
            if sums != job.sums:
                for which in range(4):
                    at = (4 * slot + which) * job.stride + first
                    memcpy(job.sums + at, sums + at, n * sizeof(double))
            open_nodes[n_open] = slot
            n_open += 1
            slot += 1
            start += node_length(start, end)
            while n_open > (n_nodes(0, start) if start < job.reduce.n_chunks else 1):
                n_open -= 1
                join_nodes(job, open_nodes[n_open - 1], open_nodes[n_open], first, n)


# ---------------------------------------------------------------- statistics to constants

cdef inline void forward_constants(
    const double* restrict mean, const double* restrict mean_low, const double* restrict inv_std,
    const double* restrict gamma, const double* restrict beta,
    double* restrict shift, double* restrict factor, double* restrict coef,
    double* restrict bias, double* restrict wide_mark,
    Py_ssize_t n, double low, bint wide, const lane* lane_tag,
) noexcept nogil:
    """y = (x - shift) coef + bias.  The shift is the mean rounded to x's dtype, so x - shift is
    exact near the mean; the rest of the mean goes into the bias.  Marks features whose constants
    the native lanes cannot hold; for them it is done again, `wide`, with factor set."""
    cdef Py_ssize_t f
    cdef double r, a, rest
    for f in range(n):
        r = inv_std[f]
        a = gamma[f] * r
        shift[f] = mean[f] if wide else <double> (<lane> mean[f])
        rest = (mean[f] - shift[f]) + mean_low[f]
        factor[f] = factor[f] if wide else 1
        coef[f] = gamma[f] * (r / factor[f]) if wide else a
        # gamma = inf leaves beta as it is: x - shift alone says the sign of infinity.
        rest = rest * factor[f] * coef[f] if rest != 0 and fabs(gamma[f]) < INFINITY else 0.0
        bias[f] = beta[f] - rest
        wide_mark[f] = (
            beyond(shift[f], low) + beyond(r, low) + beyond(a, low) + above(bias[f], low)
            + is_lost(a, gamma[f], r)
        )


cdef inline void forward_set(
    Job* job, int shift, Py_ssize_t f, Py_ssize_t n, bint wide, const lane* lane_tag,
) noexcept nogil:
    """Into the values from SHIFT_X or GATE_SHIFT on."""
    cdef double** v = job.value
    cdef double** made = v + shift
    forward_constants[lane](
        v[MEAN] + f, v[MEAN_LOW] + f, v[INV_STD] + f, v[GAMMA] + f, v[BETA] + f,
        made[SHIFT_X] + f, made[FACTOR_X] + f, made[COEF_X] + f, made[BIAS] + f, made[WIDE] + f,
        n, low_limit(job), wide, lane_tag,
    )


# Sharing is a tag: as an argument gcc did not inline the shared loop, and did not vectorize it:
# (16, 512, 7, 7) group norm's backward, one thread, 400 to 338 us (2026-11-26).

cdef struct Alone:            # a feature with statistics of its own,
    char unused

cdef struct Cell:             # or that shares them
    char unused

ctypedef fused sharing:
    Alone
    Cell


cdef inline void backward_constants(
    const double* restrict mean, const double* restrict mean_low, const double* restrict inv_std,
    const double* restrict gamma, const double* restrict mean_gx,
    const double* restrict mean_g, const double* restrict mean_g_low,
    double* restrict shift_x, double* restrict shift_g, double* restrict factor,
    double* restrict factor_g, double* restrict coef_g, double* restrict coef_x,
    double* restrict bias, double* restrict wide_mark,
    Py_ssize_t n, double m, double own, double eps, double low, bint wide, const lane* lane_tag,
    const sharing* sharing_tag,
) noexcept nogil:
    """dx = a ((dout - mean_g) - (x - mean) r mean_gx), a = gamma r; M = 1 leaves dx = 0.

    M = 2 leaves of two terms of the size of dout only dx = a eps r^2 (dout - mean_g), which is used
    where eps is known (not negative): no digit is lost.

    `own` is 1 where the call made the sums itself: gamma = 0 leaves nothing of those that left the
    range.  Of sums that were given 0 times infinity is not a number, as in NumPy.

    Of cells that share a statistic dx = a (dout - shift_g) + r (mean_g - (x - mean) r mean_gx), as
    `share_gradients` has left these three.
    """
    cdef Py_ssize_t f
    cdef double r, a, b, q, rest, share, back, scale, up
    # gcc does not vectorize a choice that is the same for all features, hence the arithmetic.
    cdef double two = 1 if m == 2 and eps >= 0 else 0
    cdef double least = 1 - two
    cdef double some = 0 if two or m <= 1 else 1
    eps = eps * two
    for f in range(n):
        r = inv_std[f]
        share = eps * r * r
        shift_x[f] = mean[f] if wide else <double> (<lane> mean[f])
        if sharing is Alone:
            shift_g[f] = mean_g[f] if wide else <double> (<lane> mean_g[f])
        rest = (mean[f] - shift_x[f]) + mean_low[f]
        factor[f] = factor[f] if wide else 1
        scale = factor_g[f]  # of mean_gx
        back = 1
        if wide:
            back = scaled_down() if fabs(shift_g[f]) > 1e290 else 1.0
            back = min(back, sinking(gamma[f], r))
        factor_g[f] = back if wide else scale
        a = gamma[f] * (r / back if wide else r) * (share if share > least else least)
        b = (r / back if wide else r) if sharing is Cell else a
        q = mean_gx[f] * some * back
        coef_g[f] = a
        coef_x[f] = -(b * q * (r / factor[f] if wide else r))
        if wide:
            up = 256 * power_of_two(r)  # (x - mean) up stays near 1, and the coefficient in range
            coef_x[f] = coef_x[f] / scale if own == 0 or b != 0 or r == 0 else 0.0
            if fabs(coef_x[f]) == INFINITY and fabs(mean[f]) * (up / scale) < 1e300:
                factor[f] = up / scale  # and x takes over what the coefficient cannot hold
                coef_x[f] = -(b * q * (r / up))
        bias[f] = (
            (-coef_x[f] * (factor[f] * rest if wide else rest) if rest != 0 else 0.0)
            + (r * mean_g[f] if sharing is Cell
               else -a * (((mean_g[f] - shift_g[f]) + mean_g_low[f]) * back))
        )
        wide_mark[f] = (
            beyond(shift_x[f], low) + beyond(shift_g[f], low) + beyond(r, low)
            + beyond(a, low) + beyond(coef_x[f], low) + above(bias[f], low)
            + (1 - two) * is_lost(a, gamma[f], r) + is_lost(coef_x[f], b, q)
            + (0.0 if scale == 1 else 1.0)
            + own * is_lost(b, r, 1) * (0.0 if fabs(q) < INFINITY else 1.0)
        )


cdef inline void backward_set(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint wide, const lane* lane_tag,
    const sharing* sharing_tag,
) noexcept nogil:
    cdef double** v = job.value
    cdef bint alone = job.op.centers and sharing is Alone
    backward_constants[lane, sharing](
        v[MEAN] + f, v[MEAN_LOW] + f, v[INV_STD] + f, v[GAMMA] + f, v[MEAN_GX] + f,
        v[MEAN_G] + f, v[MEAN_G_LOW] + f,
        v[SHIFT_X] + f, v[SHIFT_G] + f, v[FACTOR_X] + f, v[FACTOR_G] + f, v[COEF_G] + f,
        v[COEF_X] + f, v[BIAS] + f, v[WIDE] + f,
        n, total_of(job, f) if alone else INFINITY, alone and job.reduces, job.eps,
        low_limit(job), wide, lane_tag, NULL,
    )


# Whether lanes are wide is a constant of the inlined loops, for gcc to vectorize them.

cdef void set_forward_constants(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint wide, const lane* lane_tag,
) noexcept nogil:
    if wide:
        forward_set[lane](job, SHIFT_X, f, n, True, lane_tag)
    else:
        forward_set[lane](job, SHIFT_X, f, n, False, lane_tag)


cdef void set_gate_constants(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint wide, const lane* lane_tag,
) noexcept nogil:
    """The constants that forward had."""
    if wide:
        forward_set[lane](job, GATE_SHIFT, f, n, True, lane_tag)
    else:
        forward_set[lane](job, GATE_SHIFT, f, n, False, lane_tag)


cdef void set_backward_constants(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint wide, const lane* lane_tag,
) noexcept nogil:
    cdef double** v = job.value
    cdef Py_ssize_t k
    if v[TOTAL] != NULL and n > 1:
        for k in range(f, f + n):
            set_backward_constants[lane](job, k, 1, wide, lane_tag)
        return
    if not (job.reduces or wide):  # the sums were given
        for k in range(f, f + n):
            v[MEAN_G][k] = v[DBETA][k] / total_of(job, k)
            v[MEAN_G_LOW][k] = 0
            v[MEAN_GX][k] = v[DGAMMA][k] * (1 / total_of(job, k))
            v[FACTOR_G][k] = 1
    if job.cells > 1:
        if wide:
            backward_set[lane, Cell](job, f, n, True, lane_tag, NULL)
        else:
            backward_set[lane, Cell](job, f, n, False, lane_tag, NULL)
    elif wide:
        backward_set[lane, Alone](job, f, n, True, lane_tag, NULL)
    else:
        backward_set[lane, Alone](job, f, n, False, lane_tag, NULL)


cdef void set_frozen_constants(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint wide, const lane* lane_tag,
) noexcept nogil:
    """dx = gamma inv_std dout: the affine formula on dout."""
    cdef double** v = job.value
    cdef double back
    cdef Py_ssize_t k
    for k in range(f, f + n):
        v[SHIFT_X][k] = v[BIAS][k] = 0
        back = sinking(v[GAMMA][k], v[INV_STD][k]) if wide else 1.0
        v[FACTOR_X][k] = v[FACTOR_G][k] = back  # of dout, in either role
        v[COEF_X][k] = v[GAMMA][k] * (v[INV_STD][k] / back)
        v[WIDE][k] = beyond(v[COEF_X][k], low_limit(job)) + is_lost(
            v[COEF_X][k], v[GAMMA][k], v[INV_STD][k]
        )


cdef void set_second_constants(
    Job* job, Py_ssize_t f, Py_ssize_t n, bint wide, const lane* lane_tag,
) noexcept nogil:
    """With A, B the means of ddx and ddx x_hat, C, D those of dout, E the mean product, r inv_std,
    w = ddgamma - gamma r B:

    dx = r w (dout - C) - gamma r^2 D (ddx - A) - x_hat (gamma r^2 (E - 3 B D) + ddgamma r D)
    ddout = gamma r (ddx - A) + w x_hat + ddbeta
    """
    cdef double** v = job.value
    cdef double low = low_limit(job)
    cdef double r, a, w, b, d, t, back, rest, rest_g, rest_r
    cdef Py_ssize_t k
    for k in range(f, f + n):
        r = v[INV_STD][k]
        back = sinking(v[GAMMA][k], r) if wide else 1.0
        a = v[GAMMA][k] * (r / back)
        b = v[ALONG_R][k]
        d = v[ALONG_G][k]
        w = v[DDGAMMA][k] - a * (b * back)
        t = v[GAMMA][k] * (v[PRODUCT_GR][k] - 3 * (r * b * d)) + v[DDGAMMA][k] * d
        v[SHIFT_X][k] = v[MEAN][k] if wide else <double> (<lane> v[MEAN][k])
        v[SHIFT_G][k] = v[MEAN_G][k] if wide else <double> (<lane> v[MEAN_G][k])
        v[SHIFT_R][k] = v[MEAN_R][k] if wide else <double> (<lane> v[MEAN_R][k])
        v[FACTOR_X][k] = v[FACTOR_X][k] if wide else 1
        v[FACTOR_G][k] = back  # of ddx, too
        rest = v[FACTOR_X][k] * ((v[MEAN][k] - v[SHIFT_X][k]) + v[MEAN_LOW][k])
        rest_g = back * ((v[MEAN_G][k] - v[SHIFT_G][k]) + v[MEAN_G_LOW][k])
        rest_r = back * ((v[MEAN_R][k] - v[SHIFT_R][k]) + v[MEAN_R_LOW][k])
        v[MIX_G][k] = (r / back) * w
        v[MIX_R][k] = -a * d * r
        v[MIX_X][k] = -(r * t * (r / v[FACTOR_X][k]))
        v[MIX_BIAS][k] = -v[MIX_X][k] * rest - v[MIX_G][k] * rest_g - v[MIX_R][k] * rest_r
        v[COEF_G][k] = a
        v[COEF_X][k] = w * (r / v[FACTOR_X][k])
        v[BIAS][k] = (v[DDBETA][k] - a * rest_r) - v[COEF_X][k] * rest
        v[WIDE][k] = (
            beyond(v[SHIFT_X][k], low) + beyond(v[SHIFT_G][k], low)
            + beyond(v[SHIFT_R][k], low) + beyond(r, low) + beyond(v[MIX_G][k], low)
            + beyond(v[MIX_R][k], low) + beyond(v[MIX_X][k], low)
            + above(v[MIX_BIAS][k], low) + beyond(a, low) + beyond(v[COEF_X][k], low)
            + above(v[BIAS][k], low) + is_lost(a, v[GAMMA][k], r)
            + is_lost(v[MIX_X][k], t, r)
        )
