# What a call knows: its arrays, what was asked for, and values of each feature.

# One value for each feature.  The engine's own come first: each of them may have a column too, as a
# constant of the kernels.  A new constant is a name here, and a line where it is computed.
cdef enum:
    SHIFT_X = 0               # y = the sum of (input - shift) coef, + bias
    FACTOR_X                  # what wide lanes multiply x and dout by
    COEF_X
    BIAS
    WIDE                      # 1 where the output has to be computed in wide lanes
    SHIFT_G
    FACTOR_G
    COEF_G
    GAMMA
    BETA
    MEAN_G                    # mean of dout, and what float64 leaves of it
    MEAN_G_LOW
    MEAN_GX                   # mean of dout x_hat
    SPREAD                    # of the values of dout from which its shift was guessed
    RETRY                     # 1 where the sums have to be had again, in wide lanes
    N_PLAIN
    GATE_SHIFT = N_PLAIN      # what forward had as SHIFT_X and the four after it
    GATE_FACTOR
    GATE_COEF
    GATE_BIAS
    GATE_WIDE
    N_GATED
    SHIFT_R = N_GATED         # constants of the second order: see set_second_constants
    MIX_X
    MIX_G
    MIX_R
    MIX_BIAS
    N_OWN
    MEAN = N_OWN              # given with the call, or its results
    MEAN_LOW                  # mean + mean_low is the mean to twice the digits
    INV_STD
    VAR
    DGAMMA
    DBETA
    MULTIPLIER                # of the second sum: inv_std for dgamma, ones for sum dout (x - mean)
    MEAN_R                    # means of ddx
    MEAN_R_LOW
    PRODUCT_GR                # mean (ddx - its mean) (dout - its mean) inv_std
    ALONG_R                   # mean ddx x_hat
    ALONG_G                   # mean dout x_hat
    DDGAMMA
    DDBETA
    TOTAL                     # as the job's total, where that differs between features
    N_VALUES

cdef struct Parameter:        # gamma or beta as the caller gave it; data is NULL where unused
    const char* data
    Py_ssize_t stride
    Py_ssize_t period         # after so many features it begins anew
    bint single

cdef struct Varying:          # gamma and beta that vary within a statistic, in the native lanes
    char* gamma               # NULL: there are none
    char* beta
    cnp.npy_intp[MAX_DIMS] stride  # along x's axes, of either
    Py_ssize_t size           # how many there are
    double* totals            # of their gradients: [unit][dbeta, dgamma][size]
    double* lows              # the low parts of these; NULL where no unit has several folds
    Py_ssize_t unit           # features whose sums are made together, 0: none are wanted

cdef struct Operation

cdef struct Job:
    const Operation* op
    void* array[N_ROLES]      # what the call has brought (NULL: none), borrowed from it
    unsigned long long features  # a mask of the axes that name them
    bint by_row               # runs are rows, where they are long enough
    Varying varying
    long long worked          # of the first thread, since the last barrier, in ns,
    long long done_at         # and when it was done
    bint reduces              # the two visits that a call needs
    bint applies
    Schedule schedule
    bint exact_mean           # the mean is that of x itself, so sum (x - mean) = 0
    int activation
    double negative_slope
    Py_ssize_t n_features
    Py_ssize_t cells          # neighbors that share a statistic, see cells.pxi,
    double* shared            # (4, n_features / cells): those that they share; NULL: not wanted
    double total              # values per feature, M, of all parts; with weights their sum, W
    double eps                # negative where it is not known
    Parameter gamma_given
    Parameter beta_given
    double* value[N_VALUES]
    bint given[N_VALUES]      # arrays that the call has brought
    char* rounded[2]          # dgamma and dbeta as the parameters' lanes; NULL: not wanted
    double* sums              # [chunk][sum 1, its low part, sum 2, its low part][feature]
    Py_ssize_t stride         # of the engine's own arrays, from one to the next
    Py_ssize_t own_features   # threads have arrays of their own, for so many; 0: they share them
    Py_ssize_t width          # of the widest row of columns
    Py_ssize_t scratch_bytes
    char* scratch
    Plan* reduce              # of either visit; not here, as threads have copies of this
    Plan* apply


cdef inline double total_of(const Job* job, Py_ssize_t f) noexcept nogil:
    return job.total if job.value[TOTAL] == NULL else job.value[TOTAL][f]


cdef inline int n_own_values(const Job* job) noexcept nogil:
    if not job.given[MEAN]:  # nobody wants the statistics
        return VAR + 1
    return N_OWN if job.given[DDGAMMA] else N_GATED if job.reduce.gate != NONE else N_PLAIN


cpdef inline Py_ssize_t pitch(Py_ssize_t n) noexcept nogil:
    """How far apart arrays of n doubles lie, or columns of n elements: not whole pages, or an
    element of each and of the rows, which are, would share the eight ways of one set of L1.
    (256, 256) on two threads 13.8 and 21.4 us, 12.5 and 19.7 so.
    """
    return n if n < 128 else n + (200 - n % 128) % 128  # nine lines beyond a quarter of a page


cdef void lay_out(Job* job, double* values, Py_ssize_t stride, Py_ssize_t first) noexcept nogil:
    """Let the engine's own arrays begin at feature `first`, `stride` apart.

    A swept tile's are its own and stay in cache: for (16, 65536) they are as large as the data.
    """
    cdef int v
    values -= first
    job.stride = stride
    for v in range(n_own_values(job)):
        if not job.given[v]:
            job.value[v] = values
            values += stride
    job.sums = values
    if job.cells > 1:
        job.value[MULTIPLIER] = job.value[INV_STD]


cdef void store_values(
    const double* restrict values, Py_ssize_t n, Storage lanes, char* to,
) noexcept nogil:
    cdef Py_ssize_t f
    cdef float* restrict narrow = <float*> to
    if lanes == FLOAT64:
        memcpy(to, values, n * sizeof(double))
        return
    for f in range(n):
        narrow[f] = <float> values[f]


cdef inline void store_gradients(const Job* job, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """A tile's, by who has its sums in cache: (16, 65536) backward on sixteen threads 364 to 256 us
    (Intel with 2 MiB of L2, 2026-11-26)."""
    cdef Storage lanes = lanes_of(job.reduce.storage)
    cdef int k
    for k in range(2):
        if job.rounded[k] != NULL:
            store_values(
                job.value[DGAMMA + k] + first, n, lanes, job.rounded[k] + first * size_of(lanes)
            )


cdef void read_parameter(
    const Parameter* given, Py_ssize_t first, Py_ssize_t n, double* restrict values,
) noexcept nogil:
    cdef Py_ssize_t f, left
    cdef const char* data
    if first >= given.period:
        first = first % given.period
    left = given.period - first
    if n > left:
        read_parameter(given, first, left, values)
        read_parameter(given, first + left, n - left, values + left)
        return
    data = given.data + first * given.stride
    if given.stride == 0:  # steps that the compiler can vectorize
        for f in range(n):
            values[f] = (<const float*> data)[0] if given.single else (<const double*> data)[0]
    elif given.single and given.stride == sizeof(float):
        for f in range(n):
            values[f] = (<const float*> data)[f]
    elif given.single:
        for f in range(n):
            values[f] = (<const float*> (data + f * given.stride))[0]
    else:
        for f in range(n):
            values[f] = (<const double*> (data + f * given.stride))[0]
