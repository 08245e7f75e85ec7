# Arithmetic to twice the digits: sums and products, and what their rounding leaves (Knuth 1969;
# Dekker 1971).

ctypedef struct Twofold:      # a number and what float64 leaves of it
    double high
    double low


cdef inline double finite_part(double value) noexcept nogil:
    return value if isfinite(value) else 0


cdef inline double finish_sum(double high, double low) noexcept nogil:
    return high + low if fabs(high) < INFINITY else high


cdef inline double sum_error(double a, double b, double total) noexcept nogil:
    """a + b - total, which is a + b rounded."""
    cdef double part = total - a
    return (a - (total - part)) + (b - part)


cdef inline double head(double value) noexcept nogil:
    """Its upper 26 digits: products of heads, and of what they leave, are exact."""
    cdef double large = value * (2.0 ** 27 + 1)
    return large - (large - value)


cdef inline double product_error(double x, double y, double product) noexcept nogil:
    """x y - product, which is x y rounded."""
    cdef double x_head = head(x), y_head = head(y)
    cdef double x_tail = x - x_head, y_tail = y - y_head
    return ((x_head * y_head - product) + x_head * y_tail + x_tail * y_head) + x_tail * y_tail


cdef inline double product_rest(double a, double b) noexcept nogil:
    """a b minus its rounding; 0 where halves of 26 bits cannot tell."""
    return finite_part(product_error(a, b, a * b))


cdef inline Twofold sum_of(double a, double b) noexcept nogil:
    return Twofold(a + b, finite_part(sum_error(a, b, a + b)))


cdef inline Twofold add_twofold(Twofold a, Twofold b) noexcept nogil:
    cdef Twofold high = sum_of(a.high, b.high)
    cdef Twofold total = sum_of(high.high, high.low + (a.low + b.low))
    return total if isfinite(total.high) else Twofold(high.high, total.low)


cdef inline void add_term(double* high, double* low, double term) noexcept nogil:
    cdef double total = high[0] + term
    low[0] += sum_error(high[0], term, total)
    high[0] = total


cdef inline void add_compensated(
    double* restrict high, double* restrict low, const double* restrict term, Py_ssize_t n,
) noexcept nogil:
    """(high + low)[j] += term[j] with the rounding error kept in low: blocks of rows add up to any
    M without losing a digit."""
    cdef Py_ssize_t j
    for j in range(n):
        add_term(high + j, low + j, term[j])
