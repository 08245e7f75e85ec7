# How elements are stored, and how rows of them come to the kernels and back.
#
# A row is loaded by (storage, lane, factor): elements stored as float16, bfloat16, float32 or
# float64 become float or double, times a power of two.  Where storage and lane are the same and the
# columns lie side by side, the kernels read the row where it is; else it goes through a buffer of
# some rows, which stays in L1.  A half type is storage only.  Plain calls have kernels that widen
# its rows, and narrow them, in registers (Plan.as_stored); to others such an array is one of
# float32, by way of the buffer.  In registers (32, 256, 14, 14) in float16 takes half the time,
# (256, 512) 0.8 and 0.7, (65536, 128) 0.7 (Intel with 1 MiB of L2, 2026-11-27).  Wide lanes are
# float32 loaded as double, or float64 times a factor: by the buffer, for some features.

cdef extern from "_half.h" nogil:
    void bn_widen_float16(const unsigned short* from_, float* to, Py_ssize_t n)
    void bn_narrow_float16(const float* from_, unsigned short* to, Py_ssize_t n)
    void bn_widen_bfloat16(const unsigned short* from_, float* to, Py_ssize_t n)
    void bn_narrow_bfloat16(const float* from_, unsigned short* to, Py_ssize_t n)
    bint bn_is_bfloat16(const void* dtype)

cdef enum Storage:
    FLOAT16
    BFLOAT16
    FLOAT32
    FLOAT64

cdef enum:
    HALF_PIECE = 512          # elements gathered or scattered at a time

# How a kernel comes to a row of an array: where it lies; through a buffer (to be read before it is
# overwritten, or converted); the same but written past the caches; or column by column.
cdef enum Access:
    DIRECT
    COPIED
    STREAMED
    GATHERED

ctypedef fused stored:        # what needs no conversion to be computed with
    float
    double


cdef inline Storage storage_of(cnp.ndarray array) noexcept:
    """Only ml_dtypes' bfloat16 passes the checks besides NumPy's own types."""
    if cnp.PyArray_ITEMSIZE(array) != 2:
        return FLOAT32 if cnp.PyArray_ITEMSIZE(array) == 4 else FLOAT64
    return FLOAT16 if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT16 else BFLOAT16


cdef inline bint is_half(Storage storage) noexcept nogil:
    return storage <= BFLOAT16


cdef inline Py_ssize_t size_of(Storage storage) noexcept nogil:
    return 2 if is_half(storage) else 4 if storage == FLOAT32 else 8


cdef inline Storage lanes_of(Storage storage) noexcept nogil:
    """How parameters and weights beside such an array are stored: as its lanes are."""
    return FLOAT64 if storage == FLOAT64 else FLOAT32


cdef inline void widen(
    Storage storage, const char* row, Py_ssize_t n, float* values,
) noexcept nogil:
    if storage == FLOAT16:
        bn_widen_float16(<const unsigned short*> row, values, n)
    else:
        bn_widen_bfloat16(<const unsigned short*> row, values, n)


cdef inline void narrow(
    Storage storage, const float* values, Py_ssize_t n, char* row,
) noexcept nogil:
    if storage == FLOAT16:
        bn_narrow_float16(values, <unsigned short*> row, n)
    else:
        bn_narrow_bfloat16(values, <unsigned short*> row, n)


cdef inline double load_value(Storage storage, const char* value) noexcept nogil:
    cdef float single
    if storage == FLOAT64:
        return (<const double*> value)[0]
    if storage == FLOAT32:
        return (<const float*> value)[0]
    widen(storage, value, 1, &single)
    return single


# ---------------------------------------------------------------- columns one by one

cdef inline Py_ssize_t regular_step(const Py_ssize_t* offset, Py_ssize_t width) noexcept nogil:
    """The step from column to column, 0 if there is more than one.  The columns are at most a grid
    of two axes, and then the two ends say whether it is one line."""
    cdef Py_ssize_t step = offset[1] - offset[0] if width > 1 else 0
    return step if offset[width - 1] - offset[0] == step * (width - 1) else 0


cdef inline void gather_step(
    const stored* restrict row, Py_ssize_t step, Py_ssize_t width, lane* restrict packed,
) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(width):
        packed[j] = <lane> row[j * step]


cdef inline void gather_stored(
    const stored* stored_tag, const char* row, const Py_ssize_t* restrict offset,
    Py_ssize_t width, Py_ssize_t step, lane* restrict packed,
) noexcept nogil:
    """Steps known to the compiler become loads and shuffles: rows of every other column come in at
    twice the speed of single elements, reversed ones at five times."""
    cdef Py_ssize_t j
    cdef const stored* first = <const stored*> (row + offset[0])
    if step == sizeof(stored):
        gather_step(first, 1, width, packed)
    elif step == -<Py_ssize_t> sizeof(stored):
        gather_step(first, -1, width, packed)
    elif step == 2 * sizeof(stored):
        gather_step(first, 2, width, packed)
    elif step % <Py_ssize_t> sizeof(stored) == 0 and step:
        gather_step(first, step // <Py_ssize_t> sizeof(stored), width, packed)
    else:
        for j in range(width):
            packed[j] = <lane> (<const stored*> (row + offset[j]))[0]


cdef void gather_half(
    Storage storage, const char* row, const Py_ssize_t* offset, Py_ssize_t width, lane* packed,
) noexcept nogil:
    cdef Py_ssize_t j, k, n
    cdef unsigned short[HALF_PIECE] bits
    cdef float[HALF_PIECE] values
    for j in range(0, width, 512):  # HALF_PIECE; Cython wants a literal step
        n = min(<Py_ssize_t> HALF_PIECE, width - j)
        for k in range(n):
            bits[k] = (<const unsigned short*> (row + offset[j + k]))[0]
        widen(storage, <const char*> bits, n, values)
        for k in range(n):
            packed[j + k] = values[k]


cdef inline void gather_row(
    Storage storage, const char* row, const Py_ssize_t* offset, Py_ssize_t width, Py_ssize_t step,
    lane* packed,
) noexcept nogil:
    """packed[j] = the element `offset[j]` bytes into the row; the step is regular_step's."""
    if storage == FLOAT32:
        gather_stored[float, lane](<const float*> NULL, row, offset, width, step, packed)
    elif storage == FLOAT64:
        gather_stored[double, lane](<const double*> NULL, row, offset, width, step, packed)
    else:
        gather_half[lane](storage, row, offset, width, packed)


cdef inline void multiply(
    lane* restrict values, const lane* restrict factor, Py_ssize_t n,
) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n):
        values[j] *= factor[j]


cdef inline void scatter_step(
    stored* restrict row, Py_ssize_t step, Py_ssize_t width, const lane* restrict packed,
) noexcept nogil:
    """With gather's in one, by a tag, gcc 12 makes it slower: (1000, 256), every other column,
    forward on one thread 250 to 318 us."""
    cdef Py_ssize_t j
    for j in range(width):
        row[j * step] = <stored> packed[j]


cdef void scatter_stored(
    const stored* stored_tag, char* row, const Py_ssize_t* restrict offset, Py_ssize_t width,
    const lane* restrict packed,
) noexcept nogil:
    cdef Py_ssize_t j, step = regular_step(offset, width)
    cdef stored* first = <stored*> (row + offset[0])
    if step == sizeof(stored):
        scatter_step(first, 1, width, packed)
    elif step == -<Py_ssize_t> sizeof(stored):
        scatter_step(first, -1, width, packed)
    elif step % <Py_ssize_t> sizeof(stored) == 0 and step:
        scatter_step(first, step // <Py_ssize_t> sizeof(stored), width, packed)
    else:
        for j in range(width):
            (<stored*> (row + offset[j]))[0] = <stored> packed[j]


cdef void scatter_row(
    Storage storage, char* row, const Py_ssize_t* offset, Py_ssize_t width, const lane* packed,
) noexcept nogil:
    """The inverse of gather_row, rounded to the array's dtype; from double lanes to a half type by
    way of float."""
    cdef Py_ssize_t j, k, n
    cdef unsigned short[HALF_PIECE] bits
    cdef float[HALF_PIECE] values
    if storage == FLOAT32:
        scatter_stored[float, lane](<const float*> NULL, row, offset, width, packed)
        return
    if storage == FLOAT64:
        scatter_stored[double, lane](<const double*> NULL, row, offset, width, packed)
        return
    for j in range(0, width, 512):  # HALF_PIECE; Cython wants a literal step
        n = min(<Py_ssize_t> HALF_PIECE, width - j)
        for k in range(n):
            values[k] = <float> packed[j + k]
        narrow(storage, values, n, <char*> bits)
        for k in range(n):
            (<unsigned short*> (row + offset[j + k]))[0] = bits[k]


# ---------------------------------------------------------------- rows across memory
#
# Four or eight values of each feature side by side, one feature after another, as rows of one value
# of each: what the compiler knows to be such a group it takes apart with shuffles.

cdef inline void part_four(
    const lane* restrict values, Py_ssize_t n,
    lane* restrict a, lane* restrict b, lane* restrict c, lane* restrict d,
) noexcept nogil:
    cdef Py_ssize_t f
    for f in range(n):
        a[f] = values[4 * f]
        b[f] = values[4 * f + 1]
        c[f] = values[4 * f + 2]
        d[f] = values[4 * f + 3]


cdef inline void part_eight(
    const lane* restrict values, Py_ssize_t n,
    lane* restrict a, lane* restrict b, lane* restrict c, lane* restrict d,
    lane* restrict e, lane* restrict g, lane* restrict h, lane* restrict k,
) noexcept nogil:
    cdef Py_ssize_t f
    for f in range(n):
        a[f] = values[8 * f]
        b[f] = values[8 * f + 1]
        c[f] = values[8 * f + 2]
        d[f] = values[8 * f + 3]
        e[f] = values[8 * f + 4]
        g[f] = values[8 * f + 5]
        h[f] = values[8 * f + 6]
        k[f] = values[8 * f + 7]


cdef inline void join_group(
    const lane** rows, Py_ssize_t width, int n_rows, lane* restrict values,
) noexcept nogil:
    cdef Py_ssize_t f, k
    for f in range(width):
        for k in range(n_rows):
            values[n_rows * f + k] = rows[k][f]


cdef void part_rows(const lane* values, Py_ssize_t width, int n_rows, lane* rows) noexcept nogil:
    cdef lane* r = rows
    if n_rows == 4:
        part_four(values, width, r, r + width, r + 2 * width, r + 3 * width)
    else:
        part_eight(
            values, width, r, r + width, r + 2 * width, r + 3 * width, r + 4 * width,
            r + 5 * width, r + 6 * width, r + 7 * width,
        )


cdef void join_rows(char** rows, Py_ssize_t width, int n_rows, lane* values) noexcept nogil:
    if n_rows == 4:
        join_group(<const lane**> rows, width, 4, values)
    else:
        join_group(<const lane**> rows, width, 8, values)


# ---------------------------------------------------------------- columns side by side

cdef inline void load_adjacent(
    Storage storage, const char* from_, Py_ssize_t n, lane* to,
) noexcept nogil:
    """n adjacent elements; the lanes are native, float for half types."""
    if is_half(storage):
        widen(storage, from_, n, <float*> to)
    else:
        memcpy(to, from_, n * sizeof(lane))


cdef inline void store_adjacent(
    Storage storage, const lane* from_, Py_ssize_t n, bint stream, char* to,
) noexcept nogil:
    if is_half(storage):
        narrow(storage, <const float*> from_, n, to)
    elif stream:
        bn_stream(to, <const char*> from_, n * sizeof(lane))
    else:
        memcpy(to, from_, n * sizeof(lane))
