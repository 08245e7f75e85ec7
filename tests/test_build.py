"""The build and the import: which package is tested, which kernels are chosen, what is packed."""

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from urllib.request import url2pathname

import numpy as np
import pytest

import bn_fast

INFO = bn_fast.build_info()
PACKAGE = Path(bn_fast.__file__).parent
ROOT = Path(__file__).resolve().parent.parent


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


def test_the_package_under_test_is_the_installed_one():
    """From the source folder only where that is the (editable) installation."""
    homes = []
    for dist in importlib.metadata.distributions(name="bn_fast"):
        origin = json.loads(dist.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            homes.append(Path(url2pathname(origin["url"].removeprefix("file:")), "bn_fast"))
        elif "site-packages" in str(dist.locate_file("")):
            homes.append(Path(dist.locate_file("bn_fast")))
    assert any(home.samefile(PACKAGE) for home in homes), (PACKAGE, homes)


def test_version_is_that_of_the_metadata():
    assert bn_fast.__version__ == importlib.metadata.version("bn_fast")


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


def test_instruction_set_that_the_cpu_lacks_is_refused_and_never_chosen():
    """Seen from a CPU that runs the baseline alone."""
    code = (
        "import sys, types, bn_fast._cpu as cpu; {modules}"
        " cpu.cpu_levels = lambda: ('base',);"
        " import bn_fast; print(bn_fast.build_info()['isa'])"
    )
    # The package is imported by its own submodule: forget all of it but _cpu, then import again.
    code = code.format(
        modules="[sys.modules.pop(m) for m in list(sys.modules)"
        " if m.split('.')[0] == 'bn_fast' and m != 'bn_fast._cpu'];"
    )
    assert python("-P", "-c", code).stdout.strip() == "base"
    if "v3" in INFO["isa_built"]:
        done = python("-P", "-c", code.replace("cpu.cpu_levels", "import os;"
                      " os.environ['BN_FAST_ISA'] = 'v3'; cpu.cpu_levels"))  # fmt: skip
        assert "BN_FAST_ISA must be one of base here" in done.stderr
        assert done.stderr.strip().endswith("got 'v3'")


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


def installed_files():
    """The package's files by the record of the wheel; None for an editable installation."""
    record = importlib.metadata.distribution("bn_fast").files or []
    files = {file.name for file in record if file.parts[0] == "bn_fast"}
    return files or None


@pytest.mark.skipif(installed_files() is None, reason="editable: there is no wheel to look into")
def test_wheel_has_no_sources():
    files = installed_files()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert "py.typed" in files
    assert {f"_core_{isa}{suffix}" for isa in INFO["isa_built"]} <= files
    assert not {name for name in files if name.endswith((".pyx", ".pxi", ".pxd", ".c", ".h"))}
