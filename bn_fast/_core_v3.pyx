# AVX2 (x86-64-v3).
include "kernels.pxi"
include "engine.pxi"
