# Moments of parts of the data: rows of float64, a value for each feature,
#
#     count, mean, its low part, m2, its low part, exponent
#
# m2 in units of 4^exponent, in which m2 / count is near 1: variances of 1e400 have room.  Mean and
# m2 are sums of two float64; the formulas are in _moments.py.

cdef enum:
    NO_SIZE = -20000          # the exponent of 0, and of what is not finite: below all others
    N_ROWS = 6

ctypedef struct Part:         # one feature's moments
    double count
    Twofold mean
    Twofold m2
    int exponent


# ---------------------------------------------------------------- arithmetic

# By the bits of normal numbers: with the C library's functions moments of (16, 65536) took 1.66 ms,
# one thread, so 1.33.

cdef inline double times_power(double value, int exponent) noexcept nogil:
    cdef unsigned long long bits
    cdef double power
    if exponent == 0:
        return value
    if exponent <= -1023 or exponent >= 1024:
        return ldexp(value, exponent)
    bits = <unsigned long long> (exponent + 1023) << 52
    memcpy(&power, &bits, sizeof(power))
    return value * power


cdef inline Twofold twofold_times_power(Twofold a, int exponent) noexcept nogil:
    return Twofold(times_power(a.high, exponent), times_power(a.low, exponent))


cdef inline int exponent_of(double value) noexcept nogil:
    cdef unsigned long long bits
    cdef int exponent = 0  # not every C library sets it where value is not finite
    memcpy(&bits, &value, sizeof(bits))
    if 0 < (bits >> 52 & 0x7ff) < 0x7ff:
        return <int> (bits >> 52 & 0x7ff) - 1022
    frexp(value, &exponent)
    return exponent


cdef inline int size_of_value(double value) noexcept nogil:
    return exponent_of(value) if isfinite(value) and value != 0 else NO_SIZE


cdef inline int size_of_count(double count) noexcept nogil:
    """Its exponent, kept where as many squares near 1 neither overflow nor sink."""
    return max(-900, min(900, exponent_of(count)))


# ---------------------------------------------------------------- rows

cdef inline Part load_part(const double* rows, Py_ssize_t n, Py_ssize_t f) noexcept nogil:
    return Part(
        rows[f], Twofold(rows[n + f], rows[2 * n + f]), Twofold(rows[3 * n + f], rows[4 * n + f]),
        <int> rows[5 * n + f],
    )


cdef inline void store_part(Part part, double* rows, Py_ssize_t n, Py_ssize_t f) noexcept nogil:
    """In the units that fit m2."""
    cdef int step, size
    if part.count == 0:
        part.mean = Twofold(NAN, 0)
        part.m2 = Twofold(0, 0)
    size = size_of_value(part.m2.high)
    if size == NO_SIZE:
        part.exponent = 0
    else:
        step = (size - size_of_count(part.count)) >> 1
        part.exponent += step
        part.m2 = twofold_times_power(part.m2, -2 * step)
    rows[f] = part.count
    rows[n + f] = part.mean.high
    rows[2 * n + f] = part.mean.low
    rows[3 * n + f] = part.m2.high
    rows[4 * n + f] = part.m2.low
    rows[5 * n + f] = part.exponent


cdef cnp.ndarray new_rows(Py_ssize_t n_rows, cnp.ndarray rows):
    """A new array of so many rows of the same features."""
    cdef cnp.npy_intp[MAX_DIMS] shape
    memcpy(shape, cnp.PyArray_DIMS(rows), cnp.PyArray_NDIM(rows) * sizeof(cnp.npy_intp))
    shape[0] = n_rows
    return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(rows), shape, cnp.NPY_FLOAT64, 0)


# ---------------------------------------------------------------- what is done with them

cdef inline Part part_of_statistics(
    double count, const double* stats, Py_ssize_t n, Py_ssize_t f, int power,
) noexcept nogil:
    """From mean, its low part, inv_std and var with eps = 0, the last two of 2^power x.  inv_std
    has the digits where var is beyond the range, or subnormal."""
    cdef double inv_std = stats[2 * n + f], var = stats[3 * n + f], root, m2
    cdef int inverse, exponent, size = size_of_value(var)
    if 0 < inv_std < INFINITY and not 2.0 ** -1022 <= var < INFINITY:
        root = frexp(inv_std, &inverse)
        exponent = 2 - inverse  # 2: times the largest count it is finite
        m2 = 1 / ((4 * root) * (4 * root))
    else:
        exponent = 2 + (0 if size == NO_SIZE else size >> 1)
        m2 = times_power(var, -2 * exponent)
    return Part(
        count, Twofold(stats[f], stats[n + f]), Twofold(m2 * count, 0), exponent - power
    )


cdef inline Part merged(Part a, Part b) noexcept nogil:
    """d = mean_b - mean_a, step = d count_b / count: mean = mean_a + step and
    m2 = m2_a + m2_b + d count_a step.  Nothing is known of more values than float64 counts."""
    cdef double count = a.count + b.count, share = b.count / count, unit, rest
    cdef bint far
    cdef int exponent, size
    cdef Twofold d, step, mean, m2, square
    if a.count == 0 or b.count == 0:
        return a if b.count == 0 else b
    share = share if count < INFINITY else NAN
    # Means at both ends of the range are farther apart than it is wide, their halves are not.
    far = fabs(a.mean.high) > 1e307 or fabs(b.mean.high) > 1e307
    far = far and a.mean.high == a.mean.high and b.mean.high == b.mean.high
    unit = 0.5 if far else 1
    d = sum_of(b.mean.high * unit, -a.mean.high * unit)
    # The means' low parts may be 1e-8 of d: without its digits in order d^2 lost some.
    d = sum_of(d.high, d.low + (b.mean.low - a.mean.low) * unit)
    # From here on in units of 2^exponent, in which the largest term of m2 is near count.
    size = 2 * (size_of_value(d.high) + far) + exponent_of(a.count) + exponent_of(share)
    size = max(size, 2 * a.exponent + size_of_value(a.m2.high))
    size = max(size, 2 * b.exponent + size_of_value(b.m2.high))
    exponent = (size - size_of_count(count)) >> 1 if size >= NO_SIZE // 2 else 0
    d = twofold_times_power(d, far - exponent)
    step = Twofold(d.high * share, product_rest(d.high, share))
    # What the division left: count share = b.count is off by less than a rounding.
    rest = ((b.count - count * share) - product_rest(count, share)) / count
    step.low += d.low * share + d.high * rest
    mean = add_twofold(
        Twofold(a.mean.high * unit, a.mean.low * unit), twofold_times_power(step, exponent - far)
    )
    mean = Twofold(mean.high / unit, mean.low / unit)
    if not isfinite(d.high):
        mean = Twofold(a.mean.high * (a.count / count) + b.mean.high * share, 0)
    square = Twofold(d.high * (a.count * step.high), product_rest(d.high, a.count * step.high))
    square.low += a.count * (d.high * step.low + d.low * step.high)
    square.low += d.high * product_rest(a.count, step.high)
    m2 = add_twofold(
        twofold_times_power(a.m2, 2 * (a.exponent - exponent)),
        twofold_times_power(b.m2, 2 * (b.exponent - exponent)),
    )
    return Part(count, mean, add_twofold(m2, square), exponent)


# ---------------------------------------------------------------- what Python calls

def moments_of_statistics(cnp.ndarray counts not None, cnp.ndarray stats not None, powers=None):
    """Rows from statistics of shape (4, ...), see `part_of_statistics`; one count or one for each
    feature, and powers of type int64."""
    cdef cnp.ndarray rows = new_rows(N_ROWS, stats), power = powers
    cdef const double* count = <double*> cnp.PyArray_DATA(counts)
    cdef Py_ssize_t f, n = cnp.PyArray_SIZE(rows) // N_ROWS
    cdef Py_ssize_t step = 1 if cnp.PyArray_NDIM(counts) else 0
    for f in range(n):
        store_part(
            part_of_statistics(
                count[f * step], <double*> cnp.PyArray_DATA(stats), n, f,
                0 if power is None else <int> (<long long*> cnp.PyArray_DATA(power))[f],
            ),
            <double*> cnp.PyArray_DATA(rows), n, f,
        )
    return rows


def merged_moments(cnp.ndarray a not None, cnp.ndarray b not None):
    """The rows of two parts together."""
    cdef cnp.ndarray rows = new_rows(N_ROWS, a)
    cdef const double* first = <double*> cnp.PyArray_DATA(a)
    cdef const double* second = <double*> cnp.PyArray_DATA(b)
    cdef Py_ssize_t f, n = cnp.PyArray_SIZE(rows) // N_ROWS
    for f in range(n):
        store_part(
            merged(load_part(first, n, f), load_part(second, n, f)),
            <double*> cnp.PyArray_DATA(rows), n, f,
        )
    return rows


def settle_moments(cnp.ndarray rows not None):
    """In place: in the units that fit."""
    cdef double* values = <double*> cnp.PyArray_DATA(rows)
    cdef Py_ssize_t f, n = cnp.PyArray_SIZE(rows) // N_ROWS
    for f in range(n):
        store_part(load_part(values, n, f), values, n, f)


def deviations_of_moments(cnp.ndarray rows not None, double ddof, double eps):
    """Shape (3, ...): inv_std, which is 0 without deviation; m2 / (count - ddof), the variance, NaN
    without a divisor above 0; and sqrt(variance + eps). The last may be in float64's range where
    the variance is not."""
    cdef cnp.ndarray found = new_rows(3, rows)
    cdef double* values = <double*> cnp.PyArray_DATA(found)
    cdef Part part
    cdef double divisor, var, std
    cdef int exponent
    cdef Py_ssize_t f, n = cnp.PyArray_SIZE(found) // 3
    for f in range(n):
        part = load_part(<double*> cnp.PyArray_DATA(rows), n, f)
        divisor = part.count - ddof
        var = part.m2.high / divisor if divisor > 0 else NAN
        exponent = max(part.exponent, exponent_of(eps) >> 1) if eps else part.exponent
        values[n + f] = times_power(var, 2 * part.exponent)
        var = times_power(var, 2 * (part.exponent - exponent))
        std = times_power(sqrt(var + times_power(eps, -2 * exponent)), exponent)
        values[f] = 1 / std if std != 0 else 0.0
        values[2 * n + f] = std
    return found
