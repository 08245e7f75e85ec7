# The instruction set that every CPU of the family has.
include "kernels.pxi"
include "engine.pxi"
