# Output: what a formula makes of one to three inputs, row by row or four at a time, and past the
# caches where that pays.  And the table of all kernels, which says what runs for a block.

cdef enum:                    # constants of output
    OUT_SHIFT
    OUT_COEF = OUT_SHIFT + 3
    OUT_BIAS = OUT_COEF + 3
    OUT_GATE_COEF
    OUT_GATE_BIAS
    OUT_SLOPE
    OUT_ONE
    OUT_SCALE
    OUT_BETA
    N_OUT


cdef inline vector combine(
    vector x, vector g, vector r, const vector* c, const formula* formula_tag,
    const activation* activation_tag,
) noexcept nogil:
    """One vector.  The bias comes before a residual and after gradients: that is where the digits
    are."""
    cdef vector d, z
    if formula is Gradient or formula is ScaledGradient or formula is Mixed:
        d = bn_plus(x, -c[OUT_SHIFT + X], c[OUT_ONE])
        if formula is ScaledGradient:
            g = g * c[OUT_SCALE]
        g = let_through[vector, activation](
            g, d, c[OUT_GATE_COEF], c[OUT_GATE_BIAS], c[OUT_SLOPE], activation_tag
        )
        z = (g - c[OUT_SHIFT + G]) * c[OUT_COEF + G]
        if formula is Mixed:
            z = z + (r - c[OUT_SHIFT + R]) * c[OUT_COEF + R]
        z = (z + d * c[OUT_COEF + X]) + c[OUT_BIAS]
    else:
        z = (x - c[OUT_SHIFT + X]) * c[OUT_COEF + X] + c[OUT_BIAS]
        if formula is Scaled:
            z = z * c[OUT_SCALE] + c[OUT_BETA]
        if formula is Added or formula is AddedOpened:
            z = z + r
        if formula is Affine or formula is Added or formula is Scaled:
            z = activate[vector, activation](z, c[OUT_SLOPE], activation_tag)
        else:
            z = gate[vector, activation](g, z, c[OUT_SLOPE], activation_tag)
    return z


cdef inline bint takes_second(const formula* formula_tag) noexcept nogil:
    return not (formula is Affine or formula is Added or formula is Scaled)


cdef inline bint takes_third(const formula* formula_tag) noexcept nogil:
    return formula is Added or formula is AddedOpened or formula is Mixed


cdef inline bint takes_constant(
    int constant, const formula* formula_tag, const activation* activation_tag,
) noexcept nogil:
    cdef bint gradient = formula is Gradient or formula is ScaledGradient or formula is Mixed
    if constant == OUT_SHIFT + G or constant == OUT_COEF + G:
        return gradient
    if constant == OUT_SHIFT + R or constant == OUT_COEF + R:
        return formula is Mixed
    if constant == OUT_GATE_COEF or constant == OUT_GATE_BIAS:
        return gradient and activation is not Identity
    return True


cdef struct Operands:         # of a row
    const char* at[3]         # x, dout and the third input
    const char* scale
    const char* beta
    bint brain                # of 16 bits: bfloat16

cdef struct Constants:
    const char* at[OUT_SLOPE]


cdef inline void point_operands(
    Operands* o, const Block* block, Py_ssize_t i, const formula* formula_tag,
) noexcept nogil:
    o.brain = block.brain
    o.at[X] = o.at[G] = o.at[R] = o.scale = o.beta = block.row[X][i]
    if takes_second(formula_tag):
        o.at[G] = block.row[G][i]
    if takes_third(formula_tag):
        o.at[R] = block.row[R][i]
    if formula is Scaled or formula is ScaledGradient:
        o.scale = block.row[S][i]
    if formula is Scaled:
        o.beta = block.row[B][i]


cdef inline void point_constants(
    Constants* constants, const Block* block, Py_ssize_t place,
) noexcept nogil:
    cdef int r
    for r in range(3):
        constants.at[OUT_SHIFT + r] = block.shift[r] + place
        constants.at[OUT_COEF + r] = block.coef[r] + place
    constants.at[OUT_BIAS] = block.bias + place
    constants.at[OUT_GATE_COEF] = block.gate_coef + place
    constants.at[OUT_GATE_BIAS] = block.gate_bias + place


cdef inline void fill_constants(
    const Block* block, Py_ssize_t place, vector* c, const formula* formula_tag,
    const activation* activation_tag, const extent* extent_tag,
) noexcept nogil:
    """What all elements have in common."""
    cdef Constants constants
    cdef int i
    c[OUT_SLOPE] = bn_like(c[0], block.slope)
    c[OUT_ONE] = bn_like(c[0], bn_one())
    point_constants(&constants, block, place)
    for i in range(OUT_SLOPE):
        if extent is OfRow and takes_constant(i, formula_tag, activation_tag):
            c[i] = fill[vector](constants.at[i], NULL)


cdef inline void load_constants(
    const Constants* constants, Py_ssize_t place, int n, bint part, vector* c,
    const formula* formula_tag, const activation* activation_tag,
) noexcept nogil:
    cdef int i
    for i in range(OUT_SLOPE):
        if takes_constant(i, formula_tag, activation_tag):
            c[i] = load[vector](constants.at[i], place, n, part, NULL)


cdef inline void load_scale(
    const Operands* o, Py_ssize_t place, int n, bint part, vector* c,
    const formula* formula_tag, const extent* extent_tag,
) noexcept nogil:
    """Scale and beta are the columns' where the other constants are the row's, and the other way
    round."""
    if extent is OfRow and (formula is Scaled or formula is ScaledGradient):
        c[OUT_SCALE] = load[vector](o.scale, place, n, part, NULL)
        c[OUT_BETA] = load[vector](o.beta, place, n, part, NULL)
    elif formula is Scaled:
        c[OUT_SCALE] = fill[vector](o.scale, NULL)
        c[OUT_BETA] = fill[vector](o.beta, NULL)


cdef inline vector output_at(
    const Operands* o, Py_ssize_t place, int n, bint part, const vector* c,
    const formula* formula_tag, const activation* activation_tag,
) noexcept nogil:
    cdef vector x = load_row[vector](o.at[X], place, n, part, o.brain, NULL), g = x, r = x
    if takes_second(formula_tag):
        g = load_row[vector](o.at[G], place, n, part, o.brain, NULL)
    if takes_third(formula_tag):
        r = load_row[vector](o.at[R], place, n, part, o.brain, NULL)
    return combine[vector, formula, activation](x, g, r, c, NULL, NULL)


cdef inline void store(
    char* to, vector v, int n, bint part, bint past, bint brain,
) noexcept nogil:
    if vector is bn_halves:
        if part:
            bn_store_halves_part(to, v, n, brain)
        elif past:
            bn_stream_halves(to, v, brain)
        else:
            bn_store_halves(to, v, brain)
    elif part:
        bn_store_part(to, v, n)
    elif past:
        bn_stream_vector(to, v)
    else:
        (<vector*> to)[0] = v


cdef inline void apply_row(
    const Operands* o, const Constants* constants, Py_ssize_t place, Py_ssize_t end, char* y,
    bint past, vector* c, const formula* formula_tag, const activation* activation_tag,
    const extent* extent_tag,
) noexcept nogil:
    """A row from one place to another.  Whole lines may go past the caches."""
    cdef int left
    while place + BN_VECTOR <= end:
        if extent is OfColumn:
            load_constants[vector, formula, activation](constants, place, 0, False, c, NULL, NULL)
        load_scale[vector, formula, extent](o, place, 0, False, c, NULL, NULL)
        store[vector](
            y + in_row[vector](place, NULL),
            output_at[vector, formula, activation](o, place, 0, False, c, NULL, NULL), 0, False,
            past, o.brain,
        )
        place += BN_VECTOR
    if place < end and not past:
        left = <int> ((end - place) // size_of_lane[vector](NULL))
        if extent is OfColumn:
            load_constants[vector, formula, activation](constants, place, left, True, c, NULL, NULL)
        load_scale[vector, formula, extent](o, place, left, True, c, NULL, NULL)
        store[vector](
            y + in_row[vector](place, NULL),
            output_at[vector, formula, activation](o, place, left, True, c, NULL, NULL), left,
            True, False, o.brain,
        )


cdef struct Stream:           # the end of what is written past the caches, in a line
    char* start               # of the line
    char* buffer              # its bytes
    Py_ssize_t begin          # of which these are filled
    Py_ssize_t end


cdef inline void open_stream(Stream* stream, char* memory) noexcept nogil:
    """Nothing is filled; of two lines of memory one is the buffer."""
    memset(stream, 0, sizeof(stream[0]))
    stream.buffer = memory + (LINE_BYTES - <size_t> memory % LINE_BYTES) % LINE_BYTES
    stream.start = stream.buffer


cdef inline void flush(Stream* stream) noexcept nogil:
    """Write what is filled; a line that is not whole by way of the caches."""
    bn_stream(
        stream.start + stream.begin, stream.buffer + stream.begin, stream.end - stream.begin
    )


cdef inline void go_on_at(Stream* stream, char* place) noexcept nogil:
    """What comes next need not begin where the last ended."""
    if place == stream.start + stream.end:
        return
    flush(stream)
    stream.begin = stream.end = <size_t> place % LINE_BYTES
    stream.start = place - stream.begin


cdef inline char* place_of(Stream* stream, char* y, Py_ssize_t* n_bytes) noexcept nogil:
    """Where to write the next bytes, and of n how many: to y whole lines, else to the buffer."""
    go_on_at(stream, y)
    if stream.end == 0 and n_bytes[0] >= LINE_BYTES:
        n_bytes[0] = n_bytes[0] // LINE_BYTES * LINE_BYTES
        return y
    n_bytes[0] = min(n_bytes[0], LINE_BYTES - stream.end)
    return stream.buffer + stream.end


cdef inline void go_on(Stream* stream, Py_ssize_t n_bytes, bint past) noexcept nogil:
    if past:
        stream.start += n_bytes
        return
    stream.end += n_bytes
    if stream.end == LINE_BYTES:
        flush(stream)
        stream.start += LINE_BYTES
        stream.begin = stream.end = 0


cdef inline void prefetch_next(
    const Block* block, Py_ssize_t i, Py_ssize_t place, Py_ssize_t n_bytes,
    const formula* formula_tag,
) noexcept nogil:
    """Of the inputs' rows that come next."""
    cdef Py_ssize_t next = i + block.ahead
    bn_prefetch(block.row[X][next] + place, n_bytes)
    if takes_second(formula_tag):
        bn_prefetch(block.row[G][next] + place, n_bytes)
    if takes_third(formula_tag):
        bn_prefetch(block.row[R][next] + place, n_bytes)


cdef void apply_singly(
    const Block* block, const vector* vector_tag, const formula* formula_tag,
    const activation* activation_tag,
) noexcept nogil:
    """Row by row, where they come from beyond L2.  The hardware's prefetchers lose the thread among
    four rows of every array, if they lie in one page: (12544, 160) backward's output, one thread,
    770 us by fours, 460 by ones (AMD EPYC, Zen 4, 2026-11).

    Past the caches straight from registers, but for the lines that two rows share: (1024, 4096) on
    two threads by way of a buffer of four lines 813 and 1594 us, so 731 and 1352; (16384, 1024)
    3.6 and 8.1 ms, 3.4 and 6.9.
    """
    cdef Py_ssize_t size = size_of_lane[vector](NULL)
    cdef Py_ssize_t i, place, end, at, n, n_bytes = block.width * size
    cdef Py_ssize_t step = STRIP * size if block.ahead else n_bytes
    cdef char[2 * LINE_BYTES] memory
    cdef Stream stream
    cdef Operands o
    cdef Constants constants
    cdef vector[N_OUT] c
    cdef char* y
    cdef char* to
    open_stream(&stream, memory)
    point_constants(&constants, block, 0)
    fill_constants[vector, formula, activation, OfColumn](block, 0, c, NULL, NULL, NULL)
    for i in range(block.n_rows):
        point_operands(&o, block, i, formula_tag)
        place = 0
        while place < n_bytes:
            n = min(step, n_bytes - place)
            at = in_row[vector](place, NULL)
            if block.ahead:
                prefetch_next(block, i, at, in_row[vector](n, NULL), formula_tag)
            y = block.row[Y][i]
            if not block.stream:
                apply_row[vector, formula, activation, OfColumn](
                    &o, &constants, place, place + n, y, False, c, NULL, NULL, NULL
                )
                place += n
                continue
            n = in_row[vector](n, NULL)
            to = place_of(&stream, y + at, &n)
            end = place + in_lanes[vector](n, NULL)
            if to == y + at:
                apply_row[vector, formula, activation, OfColumn](
                    &o, &constants, place, end, y, True, c, NULL, NULL, NULL
                )
            else:
                apply_row[vector, formula, activation, OfColumn](
                    &o, &constants, place, end, to - at, False, c, NULL, NULL, NULL
                )
            go_on(&stream, n, to == y + at)
            place = end
    if block.stream:
        flush(&stream)


cdef inline void apply_fours(
    const Operands* o, const Constants* constants, Py_ssize_t place, int n, bint part,
    char** y, vector* c, const formula* formula_tag, const activation* activation_tag,
    const extent* extent_tag,
) noexcept nogil:
    """A vector of each of four rows, of which constants are loaded once; all are made before the
    first is stored, as a load waits for a store to the same place of another page."""
    cdef vector[4] made
    cdef int k
    if extent is OfColumn:
        load_constants[vector, formula, activation](constants, place, n, part, c, NULL, NULL)
    else:
        load_scale[vector, formula, extent](o, place, n, part, c, NULL, NULL)
    for k in range(4):
        if extent is OfRow and k:
            c[k * N_OUT + OUT_SCALE] = c[OUT_SCALE]
            c[k * N_OUT + OUT_BETA] = c[OUT_BETA]
        made[k] = output_at[vector, formula, activation](
            &o[k], place, n, part, c + (k * N_OUT if extent is OfRow else 0), NULL, NULL
        )
    for k in range(4):
        store[vector](y[k] + place, made[k], n, part, False, False)


cdef void apply_by_fours(
    const Block* block, Py_ssize_t i, const vector* vector_tag, const formula* formula_tag,
    const activation* activation_tag, const extent* extent_tag,
) noexcept nogil:
    """Four rows, so that the constants are loaded once for four; or gamma and beta, which rows with
    constants of their own have in common."""
    cdef Py_ssize_t size = size_of_lane[vector](NULL)
    cdef Py_ssize_t place = 0, n_bytes = block.width * size
    cdef Operands[4] o
    cdef Constants constants
    cdef vector[4 * N_OUT] c
    cdef char* y[4]
    cdef int k, left
    point_constants(&constants, block, 0)
    for k in range(4):
        point_operands(&o[k], block, i + k, formula_tag)
        fill_constants[vector, formula, activation, extent](
            block, (i + k) * size, c + k * N_OUT, NULL, NULL, NULL
        )
        y[k] = block.row[Y][i + k]
    while place + BN_VECTOR <= n_bytes:
        apply_fours[vector, formula, activation, extent](
            o, &constants, place, 0, False, y, c, NULL, NULL, NULL
        )
        place += BN_VECTOR
    left = <int> ((n_bytes - place) // size)
    if left:
        apply_fours[vector, formula, activation, extent](
            o, &constants, place, left, True, y, c, NULL, NULL, NULL
        )


cdef void apply_runs(
    const Block* block, const vector* vector_tag, const formula* formula_tag,
    const activation* activation_tag,
) noexcept nogil:
    """Rows of one feature, or of some that take turns.  Of runs the output alone is prefetched, see
    prefetch_output_bytes."""
    cdef Py_ssize_t n_bytes = block.width * size_of_lane[vector](NULL)
    cdef Py_ssize_t i, turn = 0
    cdef bint ahead = block.ahead and not (formula is Gradient or formula is Mixed)
    cdef Operands o
    cdef Constants constants
    cdef vector[N_OUT] c
    for i in range(block.n_rows):
        point_operands(&o, block, i, formula_tag)
        fill_constants[vector, formula, activation, OfRow](
            block, turn * block.turn_bytes, c, NULL, NULL, NULL
        )
        turn = turn + 1 if turn + 1 < block.turns else 0
        if ahead and i + 1 < block.n_rows:
            bn_prefetch(block.row[Y][i + 1], in_row[vector](n_bytes, NULL))
        apply_row[vector, formula, activation, OfRow](
            &o, &constants, 0, n_bytes, block.row[Y][i], False, c, NULL, NULL, NULL
        )


cdef void apply_by_row(
    const Block* block, const vector* vector_tag, const formula* formula_tag,
) noexcept nogil:
    """Rows with constants of their own; four at a time where gamma and beta are the same."""
    cdef Py_ssize_t size = size_of_lane[vector](NULL)
    cdef Py_ssize_t i = 0
    cdef bint scaled = formula is Scaled or formula is ScaledGradient
    cdef Operands o
    cdef Constants constants
    cdef vector[N_OUT] c
    point_constants(&constants, block, 0)
    while i < block.n_rows:
        if i + 4 <= block.n_rows and (not scaled or block.row[S][i] == block.row[S][i + 3]):
            apply_by_fours[vector, formula, Identity, OfRow](block, i, NULL, NULL, NULL, NULL)
            i += 4
            continue
        point_operands(&o, block, i, formula_tag)
        fill_constants[vector, formula, Identity, OfRow](block, i * size, c, NULL, NULL, NULL)
        apply_row[vector, formula, Identity, OfRow](
            &o, &constants, 0, block.width * size, block.row[Y][i], False, c, NULL, NULL, NULL
        )
        i += 1


cdef inline void apply_to_buffer(
    const Operands* o, const Constants* constants, Py_ssize_t place, Py_ssize_t end, char* y,
    Stream* stream, vector* c, const formula* formula_tag, const activation* activation_tag,
) noexcept nogil:
    """Less than a line of a row, which it may have in common with the next one."""
    go_on_at(stream, y + place)
    apply_row[vector, formula, activation, OfRow](
        o, constants, in_lanes[vector](place, NULL), in_lanes[vector](end, NULL),
        stream.buffer + stream.end - place, False, c, NULL, NULL, NULL,
    )
    go_on(stream, end - place, False)


cdef void stream_rows(
    const Block* block, const vector* vector_tag, const formula* formula_tag,
    const activation* activation_tag,
) noexcept nogil:
    """Either past the caches, where four rows at a time take 1.4 times as long."""
    cdef Py_ssize_t i, start, end, turn = 0
    cdef Py_ssize_t n_bytes = in_row[vector](block.width * size_of_lane[vector](NULL), NULL)
    cdef char[2 * LINE_BYTES] memory
    cdef Stream stream
    cdef Operands o
    cdef Constants constants
    cdef vector[N_OUT] c
    cdef char* y
    open_stream(&stream, memory)
    for i in range(block.n_rows):
        y = block.row[Y][i]
        point_operands(&o, block, i, formula_tag)
        fill_constants[vector, formula, activation, OfRow](
            block, turn * block.turn_bytes, c, NULL, NULL, NULL
        )
        turn = turn + 1 if turn + 1 < block.turns else 0
        start = min(n_bytes, <Py_ssize_t> ((LINE_BYTES - <size_t> y % LINE_BYTES) % LINE_BYTES))
        end = start + (n_bytes - start) // LINE_BYTES * LINE_BYTES
        if start:
            apply_to_buffer[vector, formula, activation](
                &o, &constants, 0, start, y, &stream, c, NULL, NULL
            )
        apply_row[vector, formula, activation, OfRow](
            &o, &constants, in_lanes[vector](start, NULL), in_lanes[vector](end, NULL), y, True, c,
            NULL, NULL, NULL,
        )
        if end < n_bytes:
            apply_to_buffer[vector, formula, activation](
                &o, &constants, end, n_bytes, y, &stream, c, NULL, NULL
            )
    flush(&stream)


cdef void apply_formula(
    const Block* block, const vector* vector_tag, const formula* formula_tag,
    const activation* activation_tag,
) noexcept nogil:
    cdef Py_ssize_t i
    if block.walk != ACROSS and block.stream:
        stream_rows[vector, formula, activation](block, NULL, NULL, NULL)
    elif block.walk == ALONG:
        apply_runs[vector, formula, activation](block, NULL, NULL, NULL)
    elif block.walk == ACROSS and (block.singly or formula is Scaled):
        apply_singly[vector, formula, activation](block, NULL, NULL, NULL)
    elif vector is not bn_halves:
        if block.walk == ACROSS:
            for i in range(0, block.n_rows, 4):  # APPLY_ROWS
                apply_by_fours[vector, formula, activation, OfColumn](
                    block, i, NULL, NULL, NULL, NULL
                )
        elif activation is Identity and not takes_third(formula_tag):
            apply_by_row[vector, formula](block, NULL, NULL)


# ---------------------------------------------------------------- the table
#
# A row for each activation, of kernels for each kind of vectors; what there is none for comes by
# way of a buffer of lanes.

ctypedef void (*Kernel)(const Block*, const void*, const void*) noexcept nogil
ctypedef bint (*IsOpen)(double, double, const void*) noexcept nogil

cdef struct Kernels:
    bint scales               # what of dout comes through is not dout itself or 0
    IsOpen is_open
    Kernel sum_squares
    Kernel sum_products
    Kernel apply[N_FORMULAS]

cdef Kernels[N_ACTIVATIONS][N_KINDS] kernels


cdef void fill_kernels(Kernels* row, const vector* vector_tag, const activation* activation_tag):
    row.scales = activation is LeakyRelu
    row.is_open = <IsOpen> is_open[activation]
    row.sum_squares = <Kernel> sum_squares[vector]
    row.sum_products = <Kernel> sum_products[vector, activation]
    row.apply[AFFINE] = <Kernel> apply_formula[vector, Affine, activation]
    row.apply[GRADIENT] = <Kernel> apply_formula[vector, Gradient, activation]
    if vector is not bn_halves:
        row.apply[ADDED] = <Kernel> apply_formula[vector, Added, activation]
        if activation is Identity:
            row.apply[MIXED] = <Kernel> apply_formula[vector, Mixed, activation]
            row.apply[SCALED] = <Kernel> apply_formula[vector, Scaled, activation]
            row.apply[SCALED_GRADIENT] = <Kernel> apply_formula[vector, ScaledGradient, activation]
        else:
            row.apply[OPENED] = <Kernel> apply_formula[vector, Opened, activation]
            row.apply[ADDED_OPENED] = <Kernel> apply_formula[vector, AddedOpened, activation]


cdef void fill_kinds(Kernels* row, const activation* activation_tag):
    memset(row, 0, N_KINDS * sizeof(Kernels))
    fill_kernels[bn_floats, activation](&row[FLOATS], NULL, NULL)
    fill_kernels[bn_doubles, activation](&row[DOUBLES], NULL, NULL)
    if activation is Identity:
        fill_kernels[bn_halves, activation](&row[HALVES], NULL, NULL)


fill_kinds[Identity](kernels[IDENTITY], NULL)
fill_kinds[Relu](kernels[RELU], NULL)
fill_kinds[LeakyRelu](kernels[LEAKY_RELU], NULL)


cdef void reduce_block(const Block* block, bint products) noexcept nogil:
    """Add a block to the sums of its columns."""
    cdef const Kernels* kind = &kernels[block.activation][block.kind]
    if products:
        kind.sum_products(block, NULL, NULL)
    else:
        kind.sum_squares(block, NULL, NULL)


cdef void apply_block(const Block* block) noexcept nogil:
    """y_ij by the block's formula."""
    kernels[block.activation][block.kind].apply[block.formula](block, NULL, NULL)
