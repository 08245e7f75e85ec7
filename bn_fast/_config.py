"""What was built, and what of it runs here."""

from typing import Any

import numpy as np

from ._core import cpu, isa, isa_available, isa_built
from ._memory import get_result_cache
from ._threads import get_num_threads

__version__ = cpu.version


def build_info() -> dict[str, Any]:
    """Return what this build of bn_fast is and what it uses on this machine.

    Returns
    -------
    dict
        ``version`` of bn_fast; ``isa``, the instruction set in use ("base", "v3" with AVX2, "v4"
        with AVX-512); ``isa_available``, those that BN_FAST_ISA may name here; ``isa_built``, those
        that were built; ``openmp``, False where every call runs on one thread; ``threads`` of a
        large call, as `get_num_threads`; ``result_cache`` in bytes, as `get_result_cache`;
        ``compiler`` and ``flags`` of the build; ``numpy`` in use; ``numpy_built``, the one compiled
        against.

    Examples
    --------
    >>> import bn_fast
    >>> info = bn_fast.build_info()
    >>> info["isa"] in info["isa_available"]
    True
    """
    return {
        "version": __version__,
        "isa": isa,
        "isa_available": isa_available,
        "isa_built": isa_built,
        "openmp": cpu.openmp,
        "threads": get_num_threads(),
        "result_cache": get_result_cache(),
        "compiler": cpu.compiler,
        "flags": cpu.flags,
        "numpy": np.__version__,
        "numpy_built": cpu.numpy_built,
    }


def show_config() -> None:
    """Print `build_info`, one line for each entry.

    Examples
    --------
    >>> import bn_fast
    >>> bn_fast.show_config()  # doctest: +ELLIPSIS
    version ...
    isa ...
    """
    for name, value in build_info().items():
        if name == "openmp":
            value = "yes" if value else "NO: built without it, every call runs on one thread"
        elif isinstance(value, tuple):
            value = ", ".join(value)
        print(f"{name:<14} {value}")
