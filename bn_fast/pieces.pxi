# One visit alone: the pieces from which statistics and gradients over several arrays are put
# together.  stats are those of `forward`: mean, the mean's low part, inv_std, var.

def moments(
    cnp.ndarray x not None, int axis, int n_threads, cnp.ndarray weights=None, double total=0,
):
    """stats of x, as forward has them with eps = 0; x has at least one element.  weights and total
    are forward's too."""
    cdef Job job
    cdef cnp.ndarray stats = new_statistics(cnp.PyArray_DIMS(x)[axis])
    job.kind = FORWARD
    job.reduces = True
    job.applies = False
    job.activation = IDENTITY
    job.eps = 0
    job.exact_mean = True
    job.total = total
    set_statistics(&job, stats)
    execute(&job, x, None, None, axis, n_threads, None, None, None, None, weights)
    return stats


def backward_sums(
    cnp.ndarray dout not None, cnp.ndarray x not None, cnp.ndarray stats not None, int axis,
    int n_threads, bint normalized=False,
):
    """sum dout (x - mean), times inv_std if `normalized`, and sum dout as float64 (2, n_features),
    whatever x has to do with stats."""
    cdef Job job
    cdef Py_ssize_t f, n = cnp.PyArray_DIMS(x)[axis]
    cdef cnp.npy_intp shape[2]
    cdef cnp.ndarray sums, ones
    shape[0] = 2
    shape[1] = n
    sums = cnp.PyArray_ZEROS(2, shape, cnp.NPY_FLOAT64, 0)
    ones = cnp.PyArray_EMPTY(1, &shape[1], cnp.NPY_FLOAT64, 0)
    job.kind = BACKWARD
    job.reduces = True
    job.applies = False
    job.activation = IDENTITY
    job.eps = -1
    job.exact_mean = False
    set_statistics(&job, stats)
    if not normalized:
        job.multiplier = <double*> cnp.PyArray_DATA(ones)
        for f in range(n):
            (<double*> cnp.PyArray_DATA(ones))[f] = 1
    job.dgamma = <double*> cnp.PyArray_DATA(sums)
    job.dbeta = job.dgamma + n
    if cnp.PyArray_SIZE(x) > 0:
        execute(&job, x, dout, None, axis, n_threads, None, None)
    return sums


def backward_dx(
    cnp.ndarray dout not None, cnp.ndarray x not None, cnp.ndarray gamma not None,
    cnp.ndarray stats not None, cnp.ndarray sums not None, double total, int axis,
    cnp.ndarray out, int n_threads,
):
    """dx (in out, new if None) = gamma inv_std (dout - dbeta / total - x_hat dgamma / total), where
    sums, float64 (2, n_features), are dgamma and dbeta over all parts, and total counts them."""
    cdef Job job
    cdef Py_ssize_t n = cnp.PyArray_DIMS(x)[axis]
    if out is None:
        out = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    job.kind = BACKWARD
    job.reduces = False
    job.applies = True
    job.activation = IDENTITY
    job.eps = -1
    job.exact_mean = False
    job.total = total
    set_statistics(&job, stats)
    job.dgamma = <double*> cnp.PyArray_DATA(sums)
    job.dbeta = job.dgamma + n
    if cnp.PyArray_SIZE(x) > 0:
        execute(&job, x, dout, out, axis, n_threads, gamma, None)
    return out
