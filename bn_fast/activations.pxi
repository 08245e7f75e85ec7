# Activations: what may follow the affine map of the second visit, each written once.
#
# An activation is a tag, a name, and a branch of each function that names the others.  The tags
# are types, so that Cython decides every `is` when it compiles: no loop asks.
#
#   (a) y = activate(z), z = (x - shift) scale + bias (+ residual), in the registers of one loop.
#   (b) Backward forms z again, by the same loop from x and the constants of forward: the same bits
#       and so the same gate, and nothing of x's size has to be kept.
#   (c) At z = 0 the slope is that from below, as in PyTorch.  NaN is not <= 0, so it comes through;
#       relu is no product with 0, so -inf and infinite gradients leave 0 there and not NaN.

cdef struct Identity:         # tags are pointers to these, always NULL
    char unused

cdef struct Relu:
    char unused

cdef struct LeakyRelu:
    char unused

ctypedef fused activation:
    Identity
    Relu
    LeakyRelu

cdef enum Activation:
    IDENTITY
    RELU
    LEAKY_RELU

activations = {"relu": RELU, "leaky_relu": LEAKY_RELU}


cdef inline real activate(real z, real slope, const activation* activation_tag) noexcept nogil:
    if activation is Relu:
        return 0 if z <= 0 else z
    elif activation is LeakyRelu:
        return slope * z if z <= 0 else z
    else:
        return z


cdef inline real gate(
    real g, real z, real slope, const activation* activation_tag,
) noexcept nogil:
    """What of a gradient with respect to activate(z) comes through to z."""
    if activation is Relu:
        return 0 if z <= 0 else g
    elif activation is LeakyRelu:
        return slope * g if z <= 0 else g
    else:
        return g


# ---------------------------------------------------------------- the loop's other tags

cdef struct Nothing:
    char unused

cdef struct Residual:
    char unused

ctypedef fused addend:
    Nothing
    Residual

cdef struct Forward:
    char unused

cdef struct Backward:
    char unused

ctypedef fused direction:
    Forward
    Backward

cdef struct Block:            # rows for the affine map; constants are columns of the rows' type
    char** x
    char** r                  # the residual, NULL for none
    char** g                  # dout, NULL in forward
    char** y
    Py_ssize_t n_rows
    Py_ssize_t width
    Py_ssize_t ahead
    bint along
    const char* shift
    const char* scale
    const char* bias
    Activation activation
    double slope

cdef struct Gradient:         # rows of x and dout, for their sums (y is NULL) or for dx
    char** x
    char** g
    char** y
    Py_ssize_t n_rows
    Py_ssize_t width
    Py_ssize_t ahead
    bint along
    const char* shift_x
    const char* shift_g
    const char* scale
    const char* slope
    const char* bias
    double* sum_1
    double* sum_2
    Activation activation     # that dout still has to come through, and its constants in forward
    const char* open_shift
    const char* open_scale
    const char* open_bias
    double open_slope


cdef void apply_rows(const Block* block, const real* type_tag) noexcept nogil:
    if block.activation == RELU:
        apply_activated[real, Relu](block, type_tag, NULL)
    elif block.activation == LEAKY_RELU:
        apply_activated[real, LeakyRelu](block, type_tag, NULL)
    else:
        apply_activated[real, Identity](block, type_tag, NULL)


cdef inline void apply_activated(
    const Block* block, const real* type_tag, const activation* activation_tag,
) noexcept nogil:
    if block.g != NULL:
        if activation is not Identity:
            apply_directed[real, activation, Backward](block, type_tag, activation_tag, NULL)
    else:
        apply_directed[real, activation, Forward](block, type_tag, activation_tag, NULL)


cdef inline void apply_directed(
    const Block* block, const real* type_tag, const activation* activation_tag,
    const direction* direction_tag,
) noexcept nogil:
    if block.r != NULL:
        apply_added[real, activation, direction, Residual](
            block, type_tag, activation_tag, direction_tag, NULL
        )
    else:
        apply_added[real, activation, direction, Nothing](
            block, type_tag, activation_tag, direction_tag, NULL
        )


cdef inline void apply_added(
    const Block* block, const real* type_tag, const activation* activation_tag,
    const direction* direction_tag, const addend* addend_tag,
) noexcept nogil:
    if block.along:
        apply_singly(block, 0, type_tag, addend_tag, activation_tag, direction_tag)
    elif block.ahead:
        apply_singly(block, 1, type_tag, addend_tag, activation_tag, direction_tag)
    else:
        apply_across(block, type_tag, addend_tag, activation_tag, direction_tag)


cdef void gradient_rows(const Gradient* block, const real* type_tag) noexcept nogil:
    if block.activation == RELU:
        gradient_activated[real, Relu](block, type_tag, NULL)
    elif block.activation == LEAKY_RELU:
        gradient_activated[real, LeakyRelu](block, type_tag, NULL)
    else:
        gradient_activated[real, Identity](block, type_tag, NULL)


cdef inline void gradient_activated(
    const Gradient* block, const real* type_tag, const activation* activation_tag,
) noexcept nogil:
    if block.y != NULL and block.along:
        grad_apply_singly(block, 0, type_tag, activation_tag)
    elif block.y != NULL and block.ahead:
        grad_apply_singly(block, 1, type_tag, activation_tag)
    elif block.y != NULL:
        grad_apply_across(block, type_tag, activation_tag)
    elif block.along:
        grad_stats_along(block, type_tag, activation_tag)
    else:
        grad_stats_across(block, type_tag, activation_tag)
