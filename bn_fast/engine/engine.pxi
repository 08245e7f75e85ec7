# The engine, read top down: each file uses only what stands above it.

cimport numpy as cnp
from cython.parallel cimport parallel, threadid
from libc.math cimport INFINITY, NAN, fabs, frexp, isfinite, ldexp, sqrt
from libc.stdlib cimport free, malloc
from libc.stdint cimport INTPTR_MAX
from libc.string cimport memcmp, memcpy, memset

from bn_fast._results cimport is_untouched, new_result

cdef extern from "_native.h" nogil:
    void bn_read_stack()
    int bn_startable(int n_threads)
    long long bn_now()
    int bn_coming(int n_threads)
    bint bn_patient
    void bn_note_wait(long long worked, long long waited)
    void bn_barrier(int n_threads, long long* since)
    int bn_team "omp_get_num_threads" ()

cnp.import_array()
bn_read_stack()

include "twofold.pxi"
include "kernels.pxi"
include "sums.pxi"
include "output.pxi"
include "storage.pxi"
include "layout.pxi"
include "schedule.pxi"
include "job.pxi"
include "settle.pxi"
include "cells.pxi"
include "ops.pxi"
include "rows.pxi"
include "filters.pxi"
include "reduce.pxi"
include "parameters.pxi"
include "apply.pxi"
include "sweep.pxi"
include "calls.pxi"
include "norms.pxi"
include "moments.pxi"
