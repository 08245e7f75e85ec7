version: str
compiler: str
flags: str
openmp: bool
isa_built: tuple[str, ...]
numpy_built: str

def cpu_levels() -> tuple[str, ...]: ...
def max_threads() -> int: ...
def pause() -> bool: ...
