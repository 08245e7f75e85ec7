"""The build and the import: which package is tested, which kernels are chosen, what is packed."""

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest

import bn_fast

INFO = bn_fast.build_info()
PACKAGE = Path(bn_fast.__file__).parent


def python(*args, cwd=None, **env):
    """Run Python on the installed package (-P), never on the folder that it is started in."""
    keep = {name: value for name, value in os.environ.items() if name != "BN_FAST_ISA"}
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=keep | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# A checkout may have metadata of its own, from a build; the installer signs what it installed.
DIST = next(
    dist for dist in importlib.metadata.distributions(name="bn_fast") if dist.read_text("INSTALLER")
)
ORIGIN = json.loads(DIST.read_text("direct_url.json") or "{}")
EDITABLE = ORIGIN.get("dir_info", {}).get("editable", False)


def test_the_package_under_test_is_the_installed_one():
    """From the source folder only where that is the (editable) installation."""
    if EDITABLE:
        home = Path(url2pathname(urlsplit(ORIGIN["url"]).path), "bn_fast")
    else:
        home = Path(DIST.locate_file("bn_fast"))
    assert home.samefile(PACKAGE)


def test_version_is_that_of_the_metadata():
    assert bn_fast.__version__ == DIST.version


def test_build_info():
    assert INFO["isa"] in INFO["isa_available"]
    assert INFO["isa_available"][0] == INFO["isa_built"][0] == "base"
    assert set(INFO["isa_available"]) <= set(INFO["isa_built"])
    assert INFO["threads"] == bn_fast.get_num_threads()
    assert INFO["numpy"] == np.__version__
    assert INFO["openmp"] == ("openmp" in INFO["flags"])
    for name in ("version", "compiler", "flags", "numpy_built"):
        assert isinstance(INFO[name], str)
        assert INFO[name]


def test_no_flag_changes_arithmetic():
    for flag in INFO["flags"].split():
        assert "fast" not in flag
        assert flag not in ("-funsafe-math-optimizations", "-fassociative-math")
    if not INFO["compiler"].startswith("msvc"):
        assert "-ffp-contract=off" in INFO["flags"]


def test_show_config_prints_every_entry(capsys):
    bn_fast.show_config()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(INFO)


@pytest.mark.parametrize("isa", INFO["isa_available"])
def test_each_instruction_set_can_be_forced_and_only_it_is_loaded(isa):
    code = (
        "import sys, bn_fast; print(bn_fast.build_info()['isa'],"
        " *[name for name in sys.modules if name.startswith('bn_fast._core_')])"
    )
    assert python("-P", "-c", code, BN_FAST_ISA=isa).stdout.split() == [isa, f"bn_fast._core_{isa}"]


def test_the_best_instruction_set_is_chosen_by_itself():
    code = "import bn_fast; print(bn_fast.build_info()['isa'])"
    for env in ({}, {"BN_FAST_ISA": ""}):
        assert python("-P", "-c", code, **env).stdout.strip() == INFO["isa_available"][-1]


def test_unknown_instruction_set_is_a_clear_error():
    done = python("-P", "-c", "import bn_fast", BN_FAST_ISA="avx9")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    choices = ", ".join(INFO["isa_available"])
    assert last.startswith(f"ImportError: BN_FAST_ISA must be one of {choices} here")
    assert last.endswith("got 'avx9'")


# A CPU that runs the baseline alone: _cpu is loaded, taught so, and the rest is imported again.
OLD_CPU = """
import sys, bn_fast
for name in [name for name in sys.modules if name.startswith("bn_fast") and "_cpu" not in name]:
    del sys.modules[name]
sys.modules["bn_fast._cpu"].cpu_levels = lambda: ("base",)
import os
os.environ["BN_FAST_ISA"] = {forced!r}
import bn_fast
print(bn_fast.build_info()["isa"], "bn_fast._core_v3" in sys.modules)
"""


def test_instruction_set_that_the_cpu_lacks_is_never_chosen():
    done = python("-P", "-c", OLD_CPU.format(forced=""), BN_FAST_ISA="base")
    assert done.stdout.split() == ["base", "False"]


def test_instruction_set_that_the_cpu_lacks_is_refused():
    done = python("-P", "-c", OLD_CPU.format(forced="v3"), BN_FAST_ISA="base")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: BN_FAST_ISA must be one of base here (built: base")
    assert last.endswith("this CPU runs: base), got 'v3'")


def test_source_folder_that_was_not_built_says_what_to_do(tmp_path):
    folder = tmp_path / "checkout"
    (folder / "bn_fast").mkdir(parents=True)
    for source in PACKAGE.glob("*.py"):
        (folder / "bn_fast" / source.name).write_bytes(source.read_bytes())
    done = python("-c", "import bn_fast", cwd=folder)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: bn_fast was imported from {folder / 'bn_fast'}")
    assert f"`pip install -e .` in {folder}" in last


def test_import_and_call_leave_the_fpu_alone():
    """Linking with -ffast-math would flush subnormals to zero in every thread from then on."""
    code = (
        "import sys, numpy as np, bn_fast; tiny = sys.float_info.min;"
        " bn_fast.batchnorm_forward(np.ones((1 << 15, 32)), np.ones(32), np.ones(32));"
        " print(tiny / 4 != 0, np.float32(1e-38) / np.float32(8) != 0,"
        " (np.full(1000, tiny) / 4).all())"
    )
    assert python("-P", "-c", code).stdout.split() == ["True", "True", "True"]


def test_import_is_light():
    """NumPy aside, nothing heavy is imported, and never the reference."""
    code = (
        "import numpy, sys; before = set(sys.modules); import bn_fast;"
        " print(*sorted(set(sys.modules) - before))"
    )
    loaded = python("-P", "-c", code).stdout.split()
    assert loaded
    for name in ("bn_fast.reference", "torch", "importlib.metadata", "unittest", "subprocess"):
        assert name not in loaded


@pytest.mark.skipif(EDITABLE, reason="editable: there is no wheel to look into")
def test_wheel_has_no_sources():
    files = {file.name for file in DIST.files if file.parts[0] == "bn_fast"}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert "py.typed" in files
    assert {f"_core_{isa}{suffix}" for isa in INFO["isa_built"]} <= files
    assert not {name for name in files if name.endswith((".pyx", ".pxi", ".pxd", ".c", ".h"))}
