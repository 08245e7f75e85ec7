"""This build and this CPU. Compiled for the baseline alone: it decides what else may run here."""

cdef extern from "_native.h" nogil:
    const char* BN_COMPILER
    bint BN_OPENMP
    const char* BN_FAST_VERSION
    const char* BN_FAST_FLAGS
    const char* BN_FAST_ISA_BUILT
    const char* BN_FAST_NUMPY
    int omp_get_max_threads()
    bint bn_cpu_v3()
    bint bn_cpu_v4()
    bint bn_pause()

version = BN_FAST_VERSION.decode()
compiler = BN_COMPILER.decode()
flags = BN_FAST_FLAGS.decode()
openmp = <bint> BN_OPENMP
isa_built = tuple(BN_FAST_ISA_BUILT.decode().split())
numpy_built = BN_FAST_NUMPY.decode()


def cpu_levels():
    """Names of the instruction sets that this CPU and operating system run, weakest first."""
    levels = ("base",)
    if bn_cpu_v3():
        levels += ("v3",)
    if bn_cpu_v4():
        levels += ("v4",)
    return levels


def max_threads():
    """The size of OpenMP's next team as the calling thread would start it; 1 without OpenMP."""
    return omp_get_max_threads()


def pause():
    """End OpenMP's idle worker threads, so that a fork is safe; whether that could be done."""
    return bn_pause()
