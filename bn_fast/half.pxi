# Arrays stored in 16 bits.
#
# A half type is storage only: rows come through the buffer as float32 and go back through it, so
# that kernels and statistics never meet one.  To them such an array is one of float32 whose `real`
# is float and whose rows are never DIRECT.  Reading 2 bytes where float32 reads 4, with the buffer
# in L1, is what makes it faster than float32 where memory is the limit.

cdef extern from "_half.h" nogil:
    void bn_widen_float16(const unsigned short* from_, float* to, Py_ssize_t n)
    void bn_narrow_float16(const float* from_, unsigned short* to, Py_ssize_t n)
    void bn_widen_bfloat16(const unsigned short* from_, float* to, Py_ssize_t n)
    void bn_narrow_bfloat16(const float* from_, unsigned short* to, Py_ssize_t n)

cdef enum Storage:
    NATIVE                    # as the kernels compute, float32 or float64
    FLOAT16
    BFLOAT16

cdef enum:
    HALF_PIECE = 512          # elements gathered or scattered at a time


cdef inline Storage storage_of(cnp.ndarray array) noexcept:
    """Only ml_dtypes' bfloat16 passes the checks besides NumPy's own types."""
    if cnp.PyArray_ITEMSIZE(array) != 2:
        return NATIVE
    return FLOAT16 if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT16 else BFLOAT16


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


cdef void gather_half_row(
    Storage storage, const char* row, const Py_ssize_t* offset, Py_ssize_t width, lane* packed,
) noexcept nogil:
    """packed[j] = the element `offset[j]` bytes into the row (see gather_row)."""
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


cdef void scatter_half_row(
    Storage storage, char* row, const Py_ssize_t* offset, Py_ssize_t width, const lane* packed,
) noexcept nogil:
    """The inverse, rounded; from double lanes by way of float."""
    cdef Py_ssize_t j, k, n
    cdef unsigned short[HALF_PIECE] bits
    cdef float[HALF_PIECE] values
    for j in range(0, width, 512):  # HALF_PIECE; Cython wants a literal step
        n = min(<Py_ssize_t> HALF_PIECE, width - j)
        for k in range(n):
            values[k] = <float> packed[j + k]
        narrow(storage, values, n, <char*> bits)
        for k in range(n):
            (<unsigned short*> (row + offset[j + k]))[0] = bits[k]
