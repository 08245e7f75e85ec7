# AVX2 (x86-64-v3).
include "engine/engine.pxi"
