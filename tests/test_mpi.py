"""SyncBatchNorm in real processes; skipped without mpi4py and mpirun."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mpi4py", reason="needs mpi4py: pip install mpi4py mpich")
FOLDER = str(Path(sys.executable).parent)
MPIRUN = shutil.which("mpirun", path=FOLDER + os.pathsep + os.environ.get("PATH", ""))
# Open MPI refuses to run as root, or with more processes than cores, unless told.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def run_ranks(script, n_ranks):
    path = Path(__file__).with_name(script)
    done = subprocess.run(
        [MPIRUN, "-n", str(n_ranks), sys.executable, "-P", "-m", "mpi4py", str(path)],
        env=os.environ | OPEN_MPI | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Each says how many there are: with another MPI's mpirun, each would be alone.
    assert done.stdout.count(f"ok-{n_ranks}") == n_ranks, done.stdout


@pytest.mark.skipif(MPIRUN is None, reason="needs mpirun: pip install mpich")
@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_ranks_together_are_one_process(n_ranks):
    run_ranks("mpi_ranks.py", n_ranks)


@pytest.mark.skipif(MPIRUN is None, reason="needs mpirun: pip install mpich")
def test_training_on_two_ranks_has_the_losses_of_one_process():
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install scikit-learn")
    run_ranks("mpi_digits.py", 2)
