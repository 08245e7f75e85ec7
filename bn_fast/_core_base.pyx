# The instruction set that every CPU of the family has.
include "engine/engine.pxi"
