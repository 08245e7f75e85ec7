"""Builds the compiled part of bn_fast; everything static stands in pyproject.toml.

The kernels are written once and compiled once per instruction set, as _core_base, _core_v3 and
_core_v4; bn_fast/_core.py chooses among them at import. Switches, read from the environment:

    BN_FAST_OPENMP=1    an error where OpenMP is missing (unset: build without it, and say so)
    BN_FAST_OPENMP=0    build without OpenMP
    BN_FAST_NATIVE=1    one kernel module, for exactly this CPU (-march=native)
    BN_FAST_DEBUG=1     -O0 -g, bounds checks
    BN_FAST_SANITIZE=1  AddressSanitizer and UndefinedBehaviorSanitizer; Python must be started with
                        their libraries preloaded, as .ci/common shows
    BN_FAST_COVERAGE=1  -O0, count how often each line of the Cython sources runs, for gcov
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError, LinkError, SetupError

# What each instruction set adds to the command line, and the macro that proves it took effect:
# a compiler that does not know the flag may warn and go on.
ISA_FLAGS = {
    "base": ([], None),
    "v3": (["-march=x86-64-v3"], "__AVX2__"),
    # By default gcc takes half of a register: backward sums at 5.9, not 9.0 Gelem/s (Zen 4).
    "v4": (["-march=x86-64-v4", "-mprefer-vector-width=512"], "__AVX512VL__"),
}

# -O3, because gcc 12 vectorizes none of the kernels at -O2; the next two let it vectorize sqrt and
# comparisons, and keep NaN and Inf; no contraction, because a fused multiply-add rounds once where
# the baseline rounds twice, and every instruction set must give the same bits. Nothing here
# reorders arithmetic or touches the state of the FPU.
FLAGS = {
    "unix": ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"],
    "msvc": ["/O2", "/fp:precise"],
}
# gcc's -O3 joins two turns of a kernel's row loop and then cannot vectorize its column loop, which
# makes sums 5 times slower; and what it inlines because it is called but once it optimizes with all
# around it: of x and dout sums took a quarter more instructions. Other compilers do not know these.
GCC_FLAGS = ["-fno-loop-unroll-and-jam", "-fno-inline-functions-called-once"]
DEBUG_FLAGS = {"unix": ["-O0", "-g"], "msvc": ["/Od", "/Zi"]}
PROBE = "int main(void) { return 0; }\n"
# Undefined behavior ends the process, as a bad address does; a test that goes on would pass.
SANITIZE_FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COVERAGE_FLAGS = ["-O0", "--coverage"]

# (compile, link); the second way is Apple's clang with Homebrew's libomp.
OPENMP_FLAGS = {
    "unix": [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])],
    "msvc": [(["/openmp"], [])],
}
OPENMP_PROBE = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"


def switch(name):
    """True, False or None (unset) of an environment variable that is 1 or 0."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SetupError(f"{name} must be 1, 0 or unset, got {value!r}")
    return None if value == "" else value == "1"


class BuildExt(build_ext):
    """Probe the real compiler, set each module's flags, then compile."""

    def finalize_options(self):
        super().finalize_options()
        # By its date, a module built with other switches or another compiler is up to date.
        self.force = True
        if self.parallel is None:
            self.parallel = True

    def build_extensions(self):
        from Cython.Build import cythonize

        family = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        debug = bool(switch("BN_FAST_DEBUG"))
        openmp_compile, openmp_link = self.find_openmp(family)
        flags = FLAGS[family] + (DEBUG_FLAGS[family] if debug else [])
        if family == "unix" and self.works(PROBE, GCC_FLAGS):
            flags = flags + GCC_FLAGS
        instruments = []
        if switch("BN_FAST_SANITIZE"):
            instruments += SANITIZE_FLAGS
        if counted := bool(switch("BN_FAST_COVERAGE")):
            instruments += COVERAGE_FLAGS
        if instruments and not self.works(PROBE, instruments, instruments):
            raise SetupError(f"this compiler or its libraries lack {' '.join(instruments)}")
        flags = flags + instruments
        native = ["-march=native"] if switch("BN_FAST_NATIVE") else []
        if native and not self.works(PROBE, native):
            raise SetupError("BN_FAST_NATIVE=1, but this compiler refuses -march=native")
        # gcc before 13.3 lets AVX-512's vectors begin between lines of the stack that
        # detect_stack_use_after_return takes (PR 110027), and crashes.
        if native and switch("BN_FAST_SANITIZE") and self.works(PROBE, ["-mno-avx512f"]):
            native = [*native, "-mno-avx512f"]
        isas = ["base"] if native else [isa for isa in ISA_FLAGS if self.has_isa(isa)]

        self.extensions = [ext for ext in self.extensions if ext.isa is None or ext.isa in isas]
        for ext in self.extensions:
            ext.extra_compile_args = flags + openmp_compile
            ext.extra_link_args = openmp_link + instruments
            if ext.isa is not None:
                ext.extra_compile_args = ext.extra_compile_args + native + ISA_FLAGS[ext.isa][0]
            else:
                record = {
                    "BN_FAST_VERSION": self.distribution.get_version(),
                    "BN_FAST_FLAGS": " ".join(flags + native + openmp_compile),
                    "BN_FAST_ISA_BUILT": " ".join(isas),
                    "BN_FAST_NUMPY": numpy.__version__,
                }
                ext.define_macros += [(name, f'"{value}"') for name, value in record.items()]

        directives = {
            "language_level": 3,
            "boundscheck": debug,
            "wraparound": False,
            "initializedcheck": debug,
            "cdivision": True,
            # No module writes to a global after its import: a call's state is its Job, on its own
            # stack, and its scratch, which only its own threads see. (_threads.py's two settings
            # are single references, read once a call, and no result depends on them.)
            "freethreading_compatible": True,
            "autotestdict": False,  # Cython's __test__ is no doctest and stands in no stub
        }
        # Into the build folder, so that neither the source folder nor a wheel ever holds a .c.
        translated = cythonize(
            self.extensions,
            build_dir=self.build_temp,
            compiler_directives=directives,
            emit_linenums=counted,
            force=True,
        )
        sources = {ext.name: ext.sources for ext in translated}
        for ext in self.extensions:
            ext.sources = sources[ext.name]
        super().build_extensions()

    def find_openmp(self, family):
        """The flags for OpenMP: two lists, empty for a serial build."""
        wanted = switch("BN_FAST_OPENMP")
        if wanted is False:
            return [], []
        for compile_args, link_args in OPENMP_FLAGS[family]:
            if self.works(OPENMP_PROBE, compile_args, link_args):
                return compile_args, link_args
        if wanted:
            raise SetupError("BN_FAST_OPENMP=1, but this compiler cannot build with OpenMP")
        print(
            "\n*** bn_fast: NO OPENMP: this compiler cannot build with it, so bn_fast will run on"
            " ONE THREAD. (BN_FAST_OPENMP=1 makes this an error.) ***\n",
            file=sys.stderr,
        )
        return [], []

    def has_isa(self, isa):
        """Whether the compiler builds for this instruction set."""
        flags, macro = ISA_FLAGS[isa]
        if macro is None:
            return True
        probe = f"#if !defined(__x86_64__) || !defined({macro})\n#error\n#endif\n"
        return self.works(probe + "int main(void) { return 0; }\n", flags)

    def works(self, code, compile_args, link_args=()):
        """Whether a program compiles and links; it is not run (it may be for another machine)."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(code)
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=list(compile_args)
                )
                self.compiler.link_executable(
                    objects, "probe", output_dir=folder, extra_postargs=list(link_args)
                )
            except (CompileError, LinkError):
                return False
        return True


class Sdist(sdist):
    """Add the files that setuptools does not find by itself (a MANIFEST.in in four lines)."""

    def make_distribution(self):
        patterns = ["C*.md", ".ci/*", "bn_fast/**/*.p*", "bn_fast/*.h", "docs/*.*",
                    "docs/templates/**/*.rst", "tests/**/*.py", "benchmarks/*.py",
                    "benchmarks/*.c"]  # fmt: skip
        found = {path.as_posix() for pattern in patterns for path in Path().glob(pattern)}
        self.filelist.extend(sorted(found))
        self.filelist.remove_duplicates()
        super().make_distribution()


def extension(name, isa=None):
    """One compiled module; `isa` is None for the one that must run on every CPU."""
    module = Extension(
        f"bn_fast.{name}",
        [f"bn_fast/{name}.pyx"],
        include_dirs=["bn_fast", numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    )
    module.isa = isa
    return module


setup(
    ext_modules=[
        extension("_cpu"),
        extension("_results"),
        *(extension(f"_core_{isa}", isa) for isa in ISA_FLAGS),
    ],
    cmdclass={"build_ext": BuildExt, "sdist": Sdist},
)
