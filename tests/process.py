"""Python in a process of its own, and what the system says of one."""

import os
import subprocess
import sys
import textwrap


def run(code, prefix=(), args=(), timeout=60, **env):
    """What `code` (or a script, a Path) prints; it must end well, and in time."""
    ours = "OMP_NUM_THREADS", "KMP_INIT_AT_FORK"  # the second is set by an import of joblib
    keep = {name: value for name, value in os.environ.items() if name not in ours}
    # -P: the installed package, never the folder that the tests were started in.
    code = ["-c", textwrap.dedent(code)] if isinstance(code, str) else [os.fspath(code)]
    done = subprocess.run(
        [*prefix, sys.executable, "-P", *code, *args],
        env=keep | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cgroup(folder, table, files):
    """The root of such files ("name=content" each) and the table of a process's cgroups."""
    root, listed = folder / "root", folder / "table"
    listed.write_text(table)
    for line in files.splitlines():
        name, content = line.split("=")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return str(root), str(listed)
