# AVX-512 (x86-64-v4).
include "engine/engine.pxi"
