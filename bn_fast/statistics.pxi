# Between the visits: from a feature's sums to its statistics, gradients and constants.
#
# Each step is one loop over a tile's features, free of branches so that it vectorizes (the face of
# a small call: 64 features cost 2 us one by one).  A loop also says which features it could not
# settle; those are prepared for another try, and the same loop then runs over that feature alone.

cdef enum:
    LOOKS = 16                # values at which a doubtful shift of dout is looked at again

cdef struct Looks:            # their addresses, of x, dout and the residual
    char* value[3][LOOKS]


cdef inline double scaled_down() noexcept nogil:
    """What dout is multiplied by where it is so large that sums leave float64's range: no digit
    that counts is lost then."""
    return 2.0 ** -128


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


cdef inline double wide_factor(double mean, double inv_std) noexcept nogil:
    """What float64 lanes multiply x by so that x - mean is near 1; but a feature as large as that
    is constant if its deviation is below 1, and must not leave the range."""
    cdef double factor = power_of_two(inv_std)
    return 1 if factor > 1 and fabs(mean) * factor > 1e300 else factor


# ---------------------------------------------------------------- shifts

cdef inline char* value_at(
    const Plan* plan, int role, Py_ssize_t feature, const Place* place,
) noexcept nogil:
    cdef const Segment* segment = &plan.segment[place.segment]
    cdef char* row
    row_pointers(
        segment, role, plan.base[role] + feature * plan.feature_stride[role], place.row, 1, &row
    )
    return row + place.joined * segment.joined_stride[role] + place.run * segment.run_stride[role]


cdef inline double weight_at(
    const Plan* plan, const Place* place, const real* real_tag,
) noexcept nogil:
    return (<const real*> value_at(plan, W, 0, place))[0]


cdef bint find_weight(
    const Plan* plan, Place* place, int direction, double least, const real* real_tag,
) noexcept nogil:
    """Take the place on to the nearest of at least that weight: from its row on in the direction,
    the values of a row in turn."""
    cdef char* rows[BLOCK_ROWS]
    cdef const Segment* segment
    cdef const char* value
    cdef Py_ssize_t n, i, turn, q, e
    while 0 <= place.segment < plan.n_segments:
        segment = &plan.segment[place.segment]
        while 0 <= place.row < segment.n_rows:
            n = segment.n_rows - place.row if direction > 0 else place.row + 1
            n = min(n, <Py_ssize_t> BLOCK_ROWS)
            i = place.row if direction > 0 else place.row - n + 1
            row_pointers(segment, W, plan.base[W], i, n, rows)
            for turn in range(n):
                i = turn if direction > 0 else n - 1 - turn
                for q in range(segment.n_joined):
                    value = rows[i] + q * segment.joined_stride[W]
                    for e in range(segment.n_run):
                        if (<const real*> (value + e * segment.run_stride[W]))[0] >= least:
                            place.row += direction * turn
                            place.joined = q
                            place.run = e
                            return True
            place.row += direction * n
        place.segment += direction
        if 0 <= place.segment < plan.n_segments:
            place.row = 0 if direction > 0 else plan.segment[place.segment].n_rows - 1
    return False


cdef void choose_sample(Plan* plan, double least, const real* real_tag) noexcept nogil:
    """Where the three values lie from which a feature's shift is guessed: first, in the middle,
    last, each with at least that weight, if there are weights."""
    cdef const Segment* main = &plan.segment[0]
    cdef Place* place
    cdef int k
    for k in range(3):
        place = &plan.sample[k]
        place.segment = 0
        place.row = (main.n_rows - 1) * k // 2
        place.joined = (main.n_joined - 1) * k // 2
        place.run = (main.n_run - 1) * k // 2
        if not plan.used[W] or weight_at(plan, place, real_tag) >= least:
            continue
        if k == 2:
            place.segment = plan.n_segments - 1
            place.row = plan.segment[place.segment].n_rows - 1
        if not find_weight(plan, place, -1 if k == 2 else 1, least, real_tag):
            place[0] = plan.sample[0]  # none from the middle on; but from the first row there is


cdef Py_ssize_t sample_rows(
    const Plan* plan, int role, Py_ssize_t first, Py_ssize_t n_features, char** row,
    float[MAX_COLUMNS]* sample,
) noexcept nogil:
    """Addresses of the three sampled values of a tile's first feature, and how far the next
    feature's lie, in bytes; half types are taken to `sample`."""
    cdef Py_ssize_t offset[MAX_COLUMNS]
    cdef Py_ssize_t f, k, step = plan.feature_stride[role]
    for k in range(3):
        row[k] = value_at(plan, role, first, &plan.sample[k])
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
    bint around_zero, double* restrict shift, double* restrict spread, const real* real_tag,
) noexcept nogil:
    """shift[f] from three values of each of n features, which lie `step` bytes apart, and, where
    that is asked again, how far apart they are."""
    cdef Py_ssize_t f
    cdef real a, b, c, low, high, middle, gap, big, size, down, up
    cdef real digits = 1.5 * 2.0 ** 21 if real is float else 1.5 * 2.0 ** 50
    # Values from here on are scaled for the rounding: 2^p steps would leave the range.
    cdef real large = 2.0 ** 60 if real is float else 2.0 ** 500
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
        size = middle if middle >= 0 else -middle
        down = 1 / large if size > large else 1
        up = large if size > large else 1
        big = digits * (gap * down)
        middle = ((middle * down + big) - big) * up
        if around_zero:
            size = middle if middle >= 0 else -middle
            big = middle if size > high - low else 0
            middle = big if gap > 0 else middle
            spread[f] = high - low
        shift[f] = middle if (a - a) + (b - b) + (c - c) + (middle - middle) == 0 else 0


cdef void sample_shift(
    const Plan* plan, int role, Py_ssize_t first, Py_ssize_t n_features, double* shift,
    double* spread, const real* real_tag,
) noexcept nogil:
    """The shift of every feature of a tile: the median of three of its values, so near the middle
    of the data as no single outlier can be; 0 if it is not finite.

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
    spread += first
    if step != sizeof(real):
        sample_features(
            row[0], row[1], row[2], step, n_features, around_zero, shift, spread, real_tag
        )
    elif around_zero:  # what the compiler knows it can vectorize
        sample_features(
            row[0], row[1], row[2], sizeof(real), n_features, True, shift, spread, real_tag
        )
    else:
        sample_features(
            row[0], row[1], row[2], sizeof(real), n_features, False, shift, spread, real_tag
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
                job.gate_factor[f] = wide_factor(job.mean[f], job.inv_std[f])
            gate_constants[real](job, f, 1, True, real_tag)
            job.gate_wide[f] = 1


cdef inline bint comes_through(const Job* job, Py_ssize_t f, double x, double r) noexcept nogil:
    """Whether the gate is open for a value of x and the residual's; near 0 it may say the wrong
    thing, so nothing that has to be exact may depend on it."""
    return (x - job.mean[f]) * job.inv_std[f] * job.gamma[f] + job.beta[f] + r > 0


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
    cdef double residual = 0
    cdef bint open
    cdef real at_shift
    x_step = sample_rows(plan, X, first, n_features, x, x_sample)
    if plan.used[R]:
        r_step = sample_rows(plan, R, first, n_features, r, r_sample)
    for f in range(first, first + n_features):
        at_shift = affine(
            <real> job.shift_x[f], <real> job.gate_shift[f], <real> job.gate_scale[f],
            <real> job.gate_bias[f], 0, <const Nothing*> NULL,
        )
        open = at_shift > 0
        for k in range(3):
            if plan.used[R]:
                residual = (<const real*> (r[k] + (f - first) * r_step))[0]
            open = open and comes_through(
                job, f, (<const real*> (x[k] + (f - first) * x_step))[0], residual
            )
        if not open:
            job.spread[f] += fabs(job.shift_g[f])
            job.shift_g[f] = 0


cdef inline double value_of(
    const Plan* plan, const char* value, const real* real_tag,
) noexcept nogil:
    cdef float single
    if plan.storage == NATIVE:
        return (<const real*> value)[0]
    widen(plan.storage, value, 1, &single)
    return single


cdef inline double is_doubtful(const Job* job, Py_ssize_t f) noexcept nogil:
    """1 if a feature's shift of dout may not be near its mean: farther than the three values let
    expect, or than 0 is."""
    cdef double limit = 4 * job.spread[f], size = fabs(job.mean_g[f])
    limit = size if job.shift_g[f] != 0 and size < limit else limit
    return 1.0 if fabs(job.mean_g[f] - job.shift_g[f]) > limit else 0.0


cdef double distance_from_mean(
    const Job* job, Py_ssize_t f, Py_ssize_t first, const Looks* look, const real* real_tag,
) noexcept nogil:
    """How far dout is from its mean, on the mean of some values."""
    cdef const Plan* plan = &job.reduce
    cdef Py_ssize_t k
    cdef int role
    cdef double[3] value
    cdef double distance = 0
    for k in range(LOOKS):
        for role in range(3):
            value[role] = 0
            if plan.used[role]:
                value[role] = value_of(
                    plan, look.value[role][k] + (f - first) * plan.feature_stride[role], real_tag
                )
        if job.gated and not comes_through(job, f, value[X], value[R]):
            value[G] = 0
        distance += fabs(value[G] - job.mean_g[f]) / LOOKS
    return distance


cdef double look_again(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, const real* real_tag,
) noexcept nogil:
    """Mark the features whose shift of dout was not near the mean, now that it is known, and give
    them a better one; returns how many.

    Of three values two may be outliers, and then what the others add to the sums is rounded away,
    always in one direction: dout = 1 but for three values of 1e9, float32, M = 1e5, dbeta was off
    by 280 roundings.  Where that may be, some more values say how far from the mean is far.
    """
    cdef const Plan* plan = &job.reduce
    cdef const Segment* segment = &plan.segment[0]
    cdef Looks look
    cdef Py_ssize_t f, k
    cdef int role
    cdef double distance, step, doubtful = 0, n_far = 0
    cdef Place place
    for f in range(first, first + n_features):
        doubtful += is_doubtful(job, f)
    if doubtful == 0:
        return 0
    place.segment = 0
    for k in range(LOOKS):
        place.row = (segment.n_rows - 1) * (2 * k + 1) // (2 * LOOKS)
        place.joined = k % segment.n_joined
        place.run = (segment.n_run - 1) * (2 * k + 1) // (2 * LOOKS)
        for role in range(3):
            if plan.used[role]:
                look.value[role][k] = value_at(plan, role, first, &place)
    for f in range(first, first + n_features):
        if job.retry[f] != 0 or is_doubtful(job, f) == 0:
            continue
        distance = distance_from_mean(job, f, first, &look, real_tag)
        if fabs(job.mean_g[f] - job.shift_g[f]) > 8 * distance:
            step = 1.5 * 2.0 ** 49 * distance  # no more digits than it needs, as in start_tile
            job.shift_g[f] = (job.mean_g[f] + step) - step
            job.retry[f] = 1
            n_far += 1
    return n_far


cdef void start_tile(
    Job* job, Py_ssize_t first, Py_ssize_t n_features, const real* real_tag,
) noexcept nogil:
    cdef Py_ssize_t f
    cdef double step, shift, steps = 1.5 * 2.0 ** 49 if job.kind == BACKWARD else 0
    for f in range(first, first + n_features):
        job.factor[f] = job.factor_g[f] = 1
    if job.gated:
        start_gate[real](job, first, n_features, real_tag)
    if job.kind == FORWARD or job.kind == PRODUCT:
        sample_shift[real](&job.reduce, X, first, n_features, job.shift_x, job.spread, real_tag)
    if job.kind == PRODUCT:
        sample_shift[real](&job.reduce, G, first, n_features, job.shift_g, job.spread, real_tag)
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
        sample_shift[real](&job.reduce, G, first, n_features, job.shift_g, job.spread, real_tag)
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
    const double* restrict factor, const double* restrict factor_g,
    const double* restrict mean, const double* restrict mean_low,
    const double* restrict multiplier, double* restrict dgamma, double* restrict dbeta,
    double* restrict mean_g, double* restrict mean_g_low, double* restrict mean_gx,
    double* restrict retry, Py_ssize_t n, double m, double low, bint first_try,
) noexcept nogil:
    """dbeta = S1 + M shift_g and, as x - mean = d - rest,  dgamma = r (S2 - rest S1), where
    S1 = sum t, S2 = sum t d, t = dout - shift_g and r is the multiplier.  Their means stay finite
    where the sums do not.  Returns how many need another try (marked)."""
    cdef Py_ssize_t f
    cdef double s1, s2, t, t_low, part, rest, high, rounding, finite, dead, sank, back, count = 0
    cdef double per = 1 / m, again = 1 if first_try else 0
    for f in range(n):
        back = 1.0 if first_try else 1 / factor_g[f]  # powers of two, both
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
        part = s1_high[f] * back
        high = part + t
        rounding = (part - (high - (high - part))) + (t - (high - part))
        dbeta[f] = finish_sum(high, rounding + t_low + s1_low[f] * back)
        t = s1 * per
        part = t * (2.0 ** 27 + 1)  # what that left, as in forward
        part = part - (part - t)
        t_low = (((s1_high[f] - part * m) - (t - part) * m) + s1_low[f]) * per * back
        t = t * back
        mean_g[f] = shift_g[f] + t
        mean_g_low[f] = ((shift_g[f] - mean_g[f]) + t) + (t_low if fabs(t) < 1e290 else 0.0)
        t = (
            (multiplier[f] if first_try else multiplier[f] / factor[f]) * s2
            - (multiplier[f] * rest * s1 if rest != 0 else 0.0)
        )
        dgamma[f] = t * back
        mean_gx[f] = t * per * back
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
        job.shift_x + f, job.shift_g + f, job.factor + f, job.factor_g + f,
        job.mean + f, job.mean_low + f, job.multiplier + f, job.dgamma + f, job.dbeta + f,
        job.mean_g + f, job.mean_g_low + f, job.mean_gx + f, job.retry + f,
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
            job.factor[f] = wide_factor(job.mean[f], job.inv_std[f])
            job.factor_g[f] = 1 if finite else scaled_down()
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
        # gamma = inf leaves beta as it is: x - shift alone says the sign of infinity.
        rest = rest * factor[f] * scale[f] if rest != 0 and fabs(gamma[f]) < INFINITY else 0.0
        bias[f] = beta[f] - rest
        wide_mark[f] = (
            beyond(shift[f], low) + beyond(r, low) + beyond(a, low) + above(bias[f], low)
            + is_lost(a, gamma[f], r)
        )


cdef inline void backward_constants(
    const double* restrict mean, const double* restrict mean_low, const double* restrict inv_std,
    const double* restrict gamma, const double* restrict mean_gx,
    const double* restrict mean_g, const double* restrict mean_g_low,
    double* restrict shift_x, double* restrict shift_g, double* restrict factor,
    double* restrict factor_g, double* restrict scale, double* restrict slope,
    double* restrict bias, double* restrict wide_mark,
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
    cdef double some = 0 if two or m <= 1 else 1
    eps = eps * two
    for f in range(n):
        r = inv_std[f]
        share = eps * r * r
        a = gamma[f] * r * (share if share > least else least)
        q = mean_gx[f] * some
        shift_x[f] = mean[f] if wide else <double> (<real> mean[f])
        shift_g[f] = mean_g[f] if wide else <double> (<real> mean_g[f])
        rest = (mean[f] - shift_x[f]) + mean_low[f]
        factor[f] = factor[f] if wide else 1
        factor_g[f] = scaled_down() if wide and fabs(shift_g[f]) > 1e290 else 1.0
        scale[f] = a / factor_g[f] if wide else a
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
            job.mean + f, job.mean_low + f, job.inv_std + f, job.gamma + f, job.mean_gx + f,
            job.mean_g + f, job.mean_g_low + f,
            job.shift_x + f, job.shift_g + f, job.factor + f, job.factor_g + f, job.scale + f,
            job.slope + f, job.bias + f, job.wide + f,
            n, job.total, job.eps, low, wide, real_tag,
        )
    elif job.kind == SECOND:
        second_constants[real](job, f, n, wide, real_tag)
    elif job.kind == BACKWARD_FROZEN:
        # dx = gamma inv_std dout: the affine kernel on dout.
        for k in range(f, f + n):
            job.shift_x[k] = job.bias[k] = 0
            job.factor[k] = job.factor_g[k] = 1
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
        if job.kind == BACKWARD and job.exact_mean:
            unsettled += look_again(job, first, n_features, real_tag)
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
            job.mean_gx[f] = job.dgamma[f] * (1 / job.total)
    read_parameter(&job.gamma_given, first, n_features, job.gamma + first)
    if job.beta_given.data != NULL:
        read_parameter(&job.beta_given, first, n_features, job.beta + first)
    set_constants[real](job, first, n_features, False, real_tag)
    if fold_run(job.wide + first, n_features) == 0:  # none
        return
    for f in range(first, first + n_features):
        if job.wide[f] != 0:
            if real is double:
                job.factor[f] = wide_factor(job.mean[f], job.inv_std[f])
            set_constants[real](job, f, 1, True, real_tag)
            job.wide[f] = 1
