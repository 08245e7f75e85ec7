# Output: what a formula makes of one to three inputs, row by row or four at a time, and past the
# caches where that pays.  And the table of all kernels, which says what runs for a block.

cdef inline lane combine(
    lane x, lane g, lane r, lane k, lane m, lane n, lane a, lane b, lane e, lane c,
    lane gate_coef, lane gate_bias, lane slope, lane one, lane scale, lane beta,
    const formula* formula_tag, const activation* activation_tag,
) noexcept nogil:
    """One element.  The bias comes before a residual and after gradients: that is where the digits
    are."""
    cdef lane d, z
    if formula is Gradient or formula is ScaledGradient or formula is Mixed:
        d = plus(x, -k, one)
        if formula is ScaledGradient:
            g = g * scale
        z = (let_through(g, d, gate_coef, gate_bias, slope, activation_tag) - m) * b
        if formula is Mixed:
            z = z + (r - n) * e
        z = (z + d * a) + c
    else:
        z = (x - k) * a + c
        if formula is Scaled:
            z = z * scale + beta
        if formula is Added or formula is AddedOpened:
            z = z + r
        if formula is Affine or formula is Added or formula is Scaled:
            z = activate(z, slope, activation_tag)
        else:
            z = gate(g, z, slope, activation_tag)
    return z


cdef inline bint takes_second(const formula* formula_tag) noexcept nogil:
    return not (formula is Affine or formula is Added or formula is Scaled)


cdef inline bint takes_rows(const formula* formula_tag) noexcept nogil:
    """Whether norms have it, whose rows have constants of their own."""
    return (
        formula is Affine or formula is Scaled or formula is Gradient or formula is ScaledGradient
    )


cdef inline bint takes_third(const formula* formula_tag) noexcept nogil:
    return formula is Added or formula is AddedOpened or formula is Mixed


cdef inline void apply_four(
    const lane* restrict x0, const lane* restrict x1,
    const lane* restrict x2, const lane* restrict x3,
    const lane* restrict g0, const lane* restrict g1,
    const lane* restrict g2, const lane* restrict g3,
    const lane* restrict r0, const lane* restrict r1,
    const lane* restrict r2, const lane* restrict r3,
    lane* restrict y0, lane* restrict y1, lane* restrict y2, lane* restrict y3, Py_ssize_t width,
    const lane* restrict shift_x, const lane* restrict shift_g, const lane* restrict shift_r,
    const lane* restrict coef_x, const lane* restrict coef_g, const lane* restrict coef_r,
    const lane* restrict bias, const lane* restrict gate_coef, const lane* restrict gate_bias,
    lane slope, lane one, const lane* restrict scale, const lane* restrict beta,
    const formula* formula_tag, const activation* activation_tag, const extent* extent_tag,
) noexcept nogil:
    """Four rows at a time, so that the constants are loaded once for four; or, where each has its
    own, gamma and beta."""
    cdef Py_ssize_t j, k0, k1, k2, k3
    cdef lane s = 1, t = 0
    for j in range(width):
        if extent is OfColumn:
            k0 = k1 = k2 = k3 = j
        else:
            k0, k1, k2, k3 = 0, 1, 2, 3
            s = scale[j]
            t = beta[j]
        y0[j] = combine(
            x0[j], g0[j], r0[j], shift_x[k0], shift_g[k0], shift_r[k0], coef_x[k0], coef_g[k0],
            coef_r[k0], bias[k0], gate_coef[k0], gate_bias[k0], slope, one, s, t,
            formula_tag, activation_tag,
        )
        y1[j] = combine(
            x1[j], g1[j], r1[j], shift_x[k1], shift_g[k1], shift_r[k1], coef_x[k1], coef_g[k1],
            coef_r[k1], bias[k1], gate_coef[k1], gate_bias[k1], slope, one, s, t,
            formula_tag, activation_tag,
        )
        y2[j] = combine(
            x2[j], g2[j], r2[j], shift_x[k2], shift_g[k2], shift_r[k2], coef_x[k2], coef_g[k2],
            coef_r[k2], bias[k2], gate_coef[k2], gate_bias[k2], slope, one, s, t,
            formula_tag, activation_tag,
        )
        y3[j] = combine(
            x3[j], g3[j], r3[j], shift_x[k3], shift_g[k3], shift_r[k3], coef_x[k3], coef_g[k3],
            coef_r[k3], bias[k3], gate_coef[k3], gate_bias[k3], slope, one, s, t,
            formula_tag, activation_tag,
        )


cdef inline bint takes_parameters(const formula* formula_tag) noexcept nogil:
    """Whether gamma varies within a statistic."""
    return formula is Scaled or formula is ScaledGradient


cdef inline void apply_together(
    const Block* block, Py_ssize_t i, const lane* lane_tag, const formula* formula_tag,
    const activation* activation_tag, const extent* extent_tag,
) noexcept nogil:
    """Rows i to i + 3."""
    cdef Py_ssize_t first = 0 if extent is OfColumn else i
    cdef char** x = block.row[X] + i
    cdef char** y = block.row[Y] + i
    cdef char** g = block.row[G] + i if takes_second(formula_tag) else x
    cdef char** r = block.row[R] + i if takes_third(formula_tag) else x
    apply_four(
        <const lane*> x[0], <const lane*> x[1], <const lane*> x[2], <const lane*> x[3],
        <const lane*> g[0], <const lane*> g[1], <const lane*> g[2], <const lane*> g[3],
        <const lane*> r[0], <const lane*> r[1], <const lane*> r[2], <const lane*> r[3],
        <lane*> y[0], <lane*> y[1], <lane*> y[2], <lane*> y[3], block.width,
        <const lane*> block.shift[X] + first, <const lane*> block.shift[G] + first,
        <const lane*> block.shift[R] + first, <const lane*> block.coef[X] + first,
        <const lane*> block.coef[G] + first, <const lane*> block.coef[R] + first,
        <const lane*> block.bias + first, <const lane*> block.gate_coef + first,
        <const lane*> block.gate_bias + first, <lane> block.slope, <lane> bn_one(),
        <const lane*> (block.row[S][i] if takes_parameters(formula_tag) else block.shift[X]),
        <const lane*> (block.row[B][i] if formula is Scaled else block.shift[X]),
        formula_tag, activation_tag, extent_tag,
    )


cdef void apply_across(
    const Block* block, const lane* lane_tag, const formula* formula_tag,
    const activation* activation_tag,
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(0, block.n_rows, 4):  # APPLY_ROWS
        apply_together(block, i, lane_tag, formula_tag, activation_tag, <const OfColumn*> NULL)


cdef inline void apply_row(
    const lane* restrict x, const lane* restrict g, const lane* restrict r, lane* restrict y,
    Py_ssize_t width, const lane* restrict shift_x, const lane* restrict shift_g,
    const lane* restrict shift_r, const lane* restrict coef_x, const lane* restrict coef_g,
    const lane* restrict coef_r, const lane* restrict bias, const lane* restrict gate_coef,
    const lane* restrict gate_bias, lane slope, lane one,
    const lane* restrict scale, const lane* restrict beta, bint past,
    const formula* formula_tag, const activation* activation_tag, const extent* extent_tag,
) noexcept nogil:
    """Scale and beta are the columns' where the constants are the row's, and the other way round.
    Whole lines may go past the caches, from the registers that they are made in.
    """
    cdef Py_ssize_t first = 0, j, k, own, step = PAST if past else width
    cdef lane factor = 1, term = 0
    cdef lane[PAST] lines
    cdef lane* to
    while first < width:
        if past:
            to = lines
        else:
            to = y
        for j in range(first, first + step):
            k = j if extent is OfColumn else 0
            if formula is Scaled or formula is ScaledGradient:
                own = 0 if extent is OfColumn else j
                factor = scale[own]
                term = beta[own]
            to[j - first] = combine(
                x[j], g[j], r[j], shift_x[k], shift_g[k], shift_r[k], coef_x[k], coef_g[k],
                coef_r[k], bias[k], gate_coef[k], gate_bias[k], slope, one, factor, term,
                formula_tag, activation_tag,
            )
        if past:
            bn_stream_lines(<char*> (y + first), <char*> lines, sizeof(lines) // LINE_BYTES)
        first += step


# ---------------------------------------------------------------- past the caches

cdef struct Stream:           # the end of what is written past the caches, in a line
    char* start               # of the line
    char* buffer              # its bytes
    Py_ssize_t begin          # of which these are filled
    Py_ssize_t end


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


cdef inline lane* place_of(Stream* stream, lane* y, Py_ssize_t* n) noexcept nogil:
    """Where to write the next elements, and of n how many: to y whole lines, else to the buffer."""
    cdef Py_ssize_t line = LINE_BYTES // sizeof(lane)
    go_on_at(stream, <char*> y)
    if stream.end == 0 and n[0] >= PAST:
        n[0] = n[0] // PAST * PAST
        return y
    n[0] = min(n[0], line - stream.end // <Py_ssize_t> sizeof(lane))
    return <lane*> (stream.buffer + stream.end)


cdef inline void go_on(Stream* stream, Py_ssize_t n_bytes, bint past) noexcept nogil:
    if past:
        stream.start += n_bytes
        return
    stream.end += n_bytes
    if stream.end == LINE_BYTES:
        flush(stream)
        stream.start += LINE_BYTES
        stream.begin = stream.end = 0


# ---------------------------------------------------------------- row by row

cdef inline void prefetch_next(
    const Block* block, Py_ssize_t i, Py_ssize_t strip, const lane* lane_tag,
    const formula* formula_tag, const extent* extent_tag,
) noexcept nogil:
    """Of the inputs' rows that come next; of runs the output alone, see prefetch_output_bytes."""
    cdef Py_ssize_t width = block.width, next = i + block.ahead
    if extent is OfColumn:
        prefetch_strip(block.row[X][next], strip, width, lane_tag)
        if takes_second(formula_tag):
            prefetch_strip(block.row[G][next], strip, width, lane_tag)
        if takes_third(formula_tag):
            prefetch_strip(block.row[R][next], strip, width, lane_tag)
    elif not (formula is Gradient or formula is Mixed):
        if i + 1 < block.n_rows:
            prefetch_strip(block.row[Y][i + 1], strip, width, lane_tag)


cdef inline void apply_part(
    const Block* block, Py_ssize_t i, Py_ssize_t strip, Py_ssize_t n, Py_ssize_t first, lane* y,
    bint past, const formula* formula_tag, const activation* activation_tag,
    const extent* extent_tag,
) noexcept nogil:
    """n elements of row i, from element `strip` on; their constants, from `first` on."""
    cdef const lane* x = <const lane*> block.row[X][i] + strip
    cdef const lane* g = <const lane*> block.row[G][i] + strip if takes_second(formula_tag) else x
    cdef const lane* r = <const lane*> block.row[R][i] + strip if takes_third(formula_tag) else x
    apply_row(
        x, g, r, y, n,
        <const lane*> block.shift[X] + first, <const lane*> block.shift[G] + first,
        <const lane*> block.shift[R] + first, <const lane*> block.coef[X] + first,
        <const lane*> block.coef[G] + first, <const lane*> block.coef[R] + first,
        <const lane*> block.bias + first, <const lane*> block.gate_coef + first,
        <const lane*> block.gate_bias + first, <lane> block.slope, <lane> bn_one(),
        <const lane*> (block.row[S][i] if takes_parameters(formula_tag) else block.shift[X]),
        <const lane*> (block.row[B][i] if formula is Scaled else block.shift[X]), past,
        formula_tag, activation_tag, extent_tag,
    )


cdef void apply_singly(
    const Block* block, const lane* lane_tag, const formula* formula_tag,
    const activation* activation_tag, const extent* extent_tag,
) noexcept nogil:
    """The same row by row: where a row is one feature's, all with the same constants; and where the
    rows come from beyond L2.  The hardware's prefetchers lose the thread among four rows of every
    array, if they lie in one page: (12544, 160) backward's output, one thread, 770 us by fours, 460
    by ones (AMD EPYC, Zen 4, 2026-11).

    Past the caches straight from registers, but for the lines that two rows share: (1024, 4096) on
    two threads by way of a buffer of four lines 813 and 1594 us, so 731 and 1352; (16384, 1024)
    3.6 and 8.1 ms, 3.4 and 6.9.
    """
    cdef Py_ssize_t i, strip, n, first, width = block.width
    cdef Py_ssize_t step = STRIP if block.ahead else width
    cdef char[2 * LINE_BYTES] memory
    cdef Stream stream
    cdef lane* y
    cdef lane* to
    memset(&stream, 0, sizeof(stream))
    stream.buffer = memory + (LINE_BYTES - <size_t> memory % LINE_BYTES) % LINE_BYTES
    stream.start = stream.buffer
    for i in range(block.n_rows):
        strip = 0
        while strip < width:
            if block.ahead:
                prefetch_next(block, i, strip, lane_tag, formula_tag, extent_tag)
            n = min(step, width - strip)
            first = strip if extent is OfColumn else i % block.turns * LANES
            y = <lane*> block.row[Y][i] + strip
            to = place_of(&stream, y, &n) if block.stream else y
            if block.stream and to == y:
                apply_part(
                    block, i, strip, n, first, y, True, formula_tag, activation_tag, extent_tag
                )
            else:
                apply_part(
                    block, i, strip, n, first, to, False, formula_tag, activation_tag, extent_tag
                )
            if block.stream:
                go_on(&stream, n * sizeof(lane), to == y)
            strip += n
    if block.stream:
        flush(&stream)


cdef void apply_by_row(
    const Block* block, const lane* lane_tag, const formula* formula_tag,
) noexcept nogil:
    """Rows with constants of their own; four at a time where gamma and beta are the same."""
    cdef Py_ssize_t i = 0
    cdef bint scaled = takes_parameters(formula_tag)
    while i < block.n_rows:
        if i + 4 <= block.n_rows and (not scaled or block.row[S][i] == block.row[S][i + 3]):
            apply_together(
                block, i, lane_tag, formula_tag, <const Identity*> NULL, <const OfRow*> NULL
            )
            i += 4
            continue
        apply_part(
            block, i, 0, block.width, i, <lane*> block.row[Y][i], False, formula_tag,
            <const Identity*> NULL, <const OfRow*> NULL,
        )
        i += 1


cdef void apply_formula(
    const Block* block, const lane* lane_tag, const formula* formula_tag,
    const activation* activation_tag,
) noexcept nogil:
    if block.walk == BY_ROW:
        if activation is Identity and takes_rows(formula_tag):
            apply_by_row(block, lane_tag, formula_tag)
    elif block.walk == ALONG:
        apply_singly(block, lane_tag, formula_tag, activation_tag, <const OfRow*> NULL)
    elif block.singly or formula is Scaled:
        apply_singly(block, lane_tag, formula_tag, activation_tag, <const OfColumn*> NULL)
    else:
        apply_across(block, lane_tag, formula_tag, activation_tag)


# ---------------------------------------------------------------- the table
#
# A row for each activation, of kernels for float and for double lanes.

ctypedef void (*Kernel)(const Block*, const void*, const void*) noexcept nogil
ctypedef bint (*IsOpen)(double, double, const void*) noexcept nogil

cdef struct Kernels:
    bint scales               # what of dout comes through is not dout itself or 0
    IsOpen is_open
    Kernel sum_products
    Kernel apply[N_FORMULAS]

cdef Kernels[N_ACTIVATIONS][2] kernels


cdef void fill_kernels(Kernels* row, const lane* lane_tag, const activation* activation_tag):
    row.scales = activation is LeakyRelu
    row.is_open = <IsOpen> is_open[activation]
    row.sum_products = <Kernel> sum_products_walked[lane, activation]
    row.apply[AFFINE] = <Kernel> apply_formula[lane, Affine, activation]
    row.apply[ADDED] = <Kernel> apply_formula[lane, Added, activation]
    row.apply[GRADIENT] = <Kernel> apply_formula[lane, Gradient, activation]
    if activation is Identity:
        row.apply[MIXED] = <Kernel> apply_formula[lane, Mixed, activation]
        row.apply[SCALED] = <Kernel> apply_formula[lane, Scaled, activation]
        row.apply[SCALED_GRADIENT] = <Kernel> apply_formula[lane, ScaledGradient, activation]
    else:
        row.apply[OPENED] = <Kernel> apply_formula[lane, Opened, activation]
        row.apply[ADDED_OPENED] = <Kernel> apply_formula[lane, AddedOpened, activation]


cdef void fill_lanes(Kernels* row, const activation* activation_tag):
    fill_kernels[float, activation](&row[0], NULL, NULL)
    fill_kernels[double, activation](&row[1], NULL, NULL)


fill_lanes[Identity](kernels[IDENTITY], NULL)
fill_lanes[Relu](kernels[RELU], NULL)
fill_lanes[LeakyRelu](kernels[LEAKY_RELU], NULL)


cdef void reduce_block(const Block* block, bint products, const lane* lane_tag) noexcept nogil:
    """Add a block to the sums of its columns."""
    if products:
        kernels[block.activation][lane is double].sum_products(block, NULL, NULL)
    elif block.walk == ACROSS:
        sum_squares_across(block, lane_tag)
    elif block.walk == ALONG:
        sum_squares_along(block, lane_tag)
    else:
        sum_squares_by_row(block, lane_tag)


cdef void apply_block(const Block* block, const lane* lane_tag) noexcept nogil:
    """y_ij by the block's formula."""
    kernels[block.activation][lane is double].apply[block.formula](block, NULL, NULL)
