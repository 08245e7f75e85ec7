"""Runs each command of this folder once, so that none of them rots."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(command, *arguments, cwd):
    """The output of a command that must succeed; cwd is not the repository, whose bn_fast hides
    the installed one."""
    line = [sys.executable, HERE / command, *map(str, arguments)]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What compare.py writes about two small cases."""
    folder = tmp_path_factory.mktemp("figures")
    names = ("floor", "reference", "bn_fast", "bn_fast out=")
    shown = run(
        "compare.py",
        *("--cases", "32x64-float32", "128x33x7x7-float64"),
        *("--implementations", *names),
        *("--rounds", 1),
        *("--json", "figures.json"),
        cwd=folder,
    )
    assert "2 of 2: 128x33x7x7-float64" in shown
    record = json.loads((folder / "figures.json").read_text())
    for case in record["cases"]:
        assert set(case["implementations"]) == set(names)
        for figures in case["implementations"].values():
            assert figures["forward"]["median"] > 0
            assert figures["backward"]["median"] > 0
    return folder / "figures.json"


def test_table(figures, tmp_path):
    shown = run("table.py", figures, cwd=tmp_path)
    assert "| 32x64-float32 |" in shown


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_plot(figures, tmp_path, dtype):
    pytest.importorskip("matplotlib")
    run("plot.py", figures, "picture.png", "--dtype", dtype, cwd=tmp_path)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_train_digits(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    shown = run("train_digits.py", cwd=tmp_path)
    assert "FAILED" not in shown
    assert (tmp_path / "train_digits.png").exists()


def test_doors(tmp_path):
    pytest.importorskip("rich")
    shown = run("doors.py", "--quick", "--rounds", 1, cwd=tmp_path)
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
    shown = run("behaviour.py", "small", "fresh", "strides", "--rounds", 1, cwd=tmp_path)
    assert "every other column" in shown


@pytest.mark.parametrize("form", [[], ["--markdown"]])
def test_options(form, tmp_path):
    pytest.importorskip("rich")
    shown = run("options.py", "--quick", "--rounds", 1, *form, cwd=tmp_path)
    assert "WRONG" not in shown
    assert "bfloat16" in shown
