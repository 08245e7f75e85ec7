"""Runs each command of this folder once, so that none of them rots."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*command, cwd):
    """The output of a command that must succeed; cwd is not the repository, whose bn_fast hides
    the installed one."""
    line = [sys.executable, *map(str, command)]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """The output and the JSON of the benchmarks of two small cases."""
    folder = tmp_path_factory.mktemp("figures")
    shown = run(
        *("-m", "pytest", HERE / "test_forward_backward.py", "-p", "no:cacheprovider"),
        *("-k", "not torch and not jax and not numba and not float16", "--rounds", 2),
        *("--cases", "32x64-float32", "--cases", "128x33x7x7-float64"),
        *("--baseline", "reference", "--benchmark-json", folder / "figures.json"),
        cwd=folder,
    )
    return shown, folder / "figures.json"


def test_benchmarks(timed):
    shown, path = timed
    tables = shown[shown.index("32x64-float32 forward ") :].splitlines()
    assert max(map(len, tables)) <= 100
    rows = {line.split("  ")[1]: line.split() for line in tables[1 : tables.index("")]}
    assert list(rows) == ["copy", "floor", "reference", "bn_fast", "bn_fast out="]
    assert rows["reference"][-2:] == ["2", "1.00"]  # rounds, and the ratio to the baseline
    for one in json.loads(path.read_text())["benchmarks"]:
        assert len(one["stats"]["data"]) == 2
        assert min(one["stats"]["data"]) > 0


def test_table(timed, tmp_path):
    shown = run(HERE / "table.py", timed[1], cwd=tmp_path)
    assert "|  | floor | ~NumPy | fresh | out= | out= ÷ floor | best ~ ÷ out= |" in shown
    assert "| 128x33x7x7 |" in shown
    assert "- out= ÷ floor, smaller: " in shown
    assert "| residual, relu |" in shown
    brief = run(HERE / "table.py", timed[1], "--brief", cwd=tmp_path)
    rows = [line for line in brief.splitlines() if line.startswith(("| 32x64 ", "| 128x33x7x7 "))]
    assert [row.count("|") for row in rows] == [10, 10]
    assert max(map(len, brief.splitlines())) <= 100


def test_slices(tmp_path):
    """One case a slice: the second run goes on, the third has nothing left to do."""
    wanted = ["--cases", "32x64-float32", "--cases", "layer-1x288-float64", "--seconds", 0]
    wanted += ["-k", "bn_fast and forward", "--rounds", 1, "-p", "no:cacheprovider"]
    for n_done in (1, 2, 2):
        shown = run(HERE / "slices.py", "speed", *wanted, cwd=tmp_path)
        assert shown.splitlines()[-1].startswith(f"{n_done} of 2 cases: ")
    assert shown.splitlines() == ["2 of 2 cases: done"]
    assert len(list((tmp_path / "speed").iterdir())) == 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_plot(timed, tmp_path, dtype):
    pytest.importorskip("matplotlib")
    run(HERE / "plot.py", timed[1], "picture.png", "--dtype", dtype, cwd=tmp_path)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "instance", "rms"])
def test_train_digits(tmp_path, norm):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    shown = run(HERE / "train_digits.py", "--norm", norm, cwd=tmp_path)
    assert "FAILED" not in shown
    assert (tmp_path / "train_digits.png").exists()


def test_transformer_block(tmp_path):
    shown = run(HERE / "transformer_block.py", "--tokens", 32, 1, "--rounds", 2, cwd=tmp_path)
    assert shown.count("  ok") == 4
    assert "FAILED" not in shown


def test_doors(tmp_path):
    pytest.importorskip("rich")
    shown = run(HERE / "doors.py", "--quick", "--rounds", 1, cwd=tmp_path)
    assert "WRONG" not in shown


def test_mpi_cost(tmp_path):
    pytest.importorskip("mpi4py")
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("needs mpirun: pip install mpich")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # Open MPI asks
    command = [mpirun, "-n", "2", sys.executable, HERE / "mpi_cost.py", "--rounds", "1"]
    done = subprocess.run(
        command, env=os.environ | root, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ranks: 2" in done.stdout
    assert done.stdout.count("%") == 4


def test_behaviour(tmp_path):
    pytest.importorskip("rich")
    shown = run(HERE / "behaviour.py", "small", "fresh", "strides", "--rounds", 1, cwd=tmp_path)
    assert "every other column" in shown
