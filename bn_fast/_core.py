"""Chooses, at import, the compiled kernels for this CPU: the best level that was built.

`core` is the chosen module, `isa` its name ("base"; "v3", x86-64-v3 with AVX2; "v4", x86-64-v4 with
AVX-512). The environment variable BN_FAST_ISA forces one. Only `cpu`, which is compiled for every
CPU, runs before the choice, and the other levels are never loaded.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

try:
    import bn_fast._cpu as cpu

    # An editable install of another checkout offers its modules to one that was not built.
    if os.path.dirname(cpu.__file__) != os.path.dirname(__file__):
        raise ModuleNotFoundError
except ModuleNotFoundError:
    _folder = os.path.dirname(os.path.abspath(__file__))
    raise ImportError(
        f"bn_fast was imported from {_folder}, which has no compiled modules for this Python: run"
        f" `pip install -e .` in {os.path.dirname(_folder)}, or start Python in another folder to"
        " use the bn_fast that is installed"
    ) from None

__all__ = ["core", "cpu", "isa", "isa_available", "isa_built"]

isa_built: tuple[str, ...] = cpu.isa_built
isa_available: tuple[str, ...] = tuple(name for name in cpu.cpu_levels() if name in isa_built)
isa: str = os.environ.get("BN_FAST_ISA") or isa_available[-1]
if isa not in isa_available:
    raise ImportError(
        f"BN_FAST_ISA must be one of {', '.join(isa_available)} here (built:"
        f" {', '.join(isa_built)}; this CPU runs: {', '.join(cpu.cpu_levels())}), got {isa!r}"
    )

if TYPE_CHECKING:
    from . import _core_base as core  # all levels have the same functions
else:
    core = import_module(f"bn_fast._core_{isa}")
