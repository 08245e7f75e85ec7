cimport numpy as cnp

cdef cnp.ndarray new_result(cnp.ndarray x)
cdef bint is_untouched(cnp.ndarray array) noexcept
