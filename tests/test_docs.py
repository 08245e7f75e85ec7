"""Every example in a docstring of the package, and every Python block of a page, runs."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bn_fast

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "docs/conventions.md", "docs/cs231n.md", "docs/derivations.md"]
MODULES = ["bn_fast"] + [
    module.name
    for module in pkgutil.walk_packages(bn_fast.__path__, "bn_fast.")
    # the command runs when it is imported; of the kernels only the chosen level may be
    if not module.name.startswith(("bn_fast.__main__", "bn_fast._core_"))
]


# Modules for the users of other libraries, which may be missing here.
DOORS = {
    "bn_fast.autograd": "autograd",
    "bn_fast.dask": "dask",
    "bn_fast.mpi": "mpi4py",
    "bn_fast.sklearn": "sklearn",
    "bn_fast.torch": "torch",
}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    if name.startswith("bn_fast._torch"):
        pytest.importorskip("torch")
    if name in DOORS:
        pytest.importorskip(DOORS[name])
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", DOORS)
def test_a_missing_library_is_one_sentence(name):
    code = f"import sys; sys.modules[{DOORS[name]!r}] = None; import {name}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(rf"ImportError: {name} needs .*: pip install [a-z0-9 -]+", last)


def test_the_package_imports_no_other_library():
    code = f"import sys, bn_fast; print(set(sys.modules) & {set(DOORS.values())})"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    "name",
    [name for name in bn_fast.__all__ if callable(getattr(bn_fast, name))],
)
def test_public_function_has_an_example(name):
    assert ">>> " in getattr(bn_fast, name).__doc__


@pytest.mark.parametrize("name", ["bn_fast", "bn_fast.reference", *DOORS])
def test_every_public_name_is_in_the_reference(name):
    """A line of docs/api.md each, of which Sphinx makes a page."""
    if name in DOORS:
        pytest.importorskip(DOORS[name])
    listed, module = set(), ""
    for line in (ROOT / "docs" / "api.md").read_text().splitlines():
        if line.startswith(".. currentmodule:: "):
            module = line.split()[-1]
        elif match := re.fullmatch(r"(?:   |.. data:: )([\w.]+)", line):
            listed.add(f"{module}.{match[1]}")
    public = {f"{name}.{each}" for each in importlib.import_module(name).__all__}
    assert public - {"bn_fast.__version__"} <= listed


@pytest.mark.parametrize("page", PAGES)
def test_page_examples(page):
    """The blocks in their order, in one namespace, as a reader would type them."""
    path = ROOT / page
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        if block.startswith(">>> "):
            test = doctest.DocTestParser().get_doctest(block, names, page, str(path), 0)
            assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
            names.update(test.globs)
        else:
            exec(block, names)


# What a user's editor and CI say of README's lines; both read the package as it is installed, an
# editable install too. (pip install -e ".[types]")
CHECKERS = {
    "mypy": ["mypy", "--strict", "--cache-dir=cache"],
    "basedpyright": ["basedpyright", f"--pythonpath={sys.executable}"],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_readme_is_typed(checker, tmp_path):
    pytest.importorskip(checker)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    # The last line alone is wrong: had they not found the package's types, it would be right.
    blocks += ["import bn_fast", "y: int = bn_fast.reference.batchnorm_forward(x, gamma, beta)"]
    script = "\n".join(blocks)
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    command = [sys.executable, "-m", *CHECKERS[checker], "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    lines = {int(n) for n in re.findall(r"script\.py:(\d+)", done.stdout)}
    assert lines == {script.count("\n") + 1}, done.stdout + done.stderr


@pytest.mark.parametrize("module", [bn_fast, bn_fast.reference])
def test_help_shows_a_short_signature(module):
    """Types by their names: three lines, where NumPy's ArrayLike written out takes nine."""
    for name in module.__all__:
        if inspect.isfunction(getattr(module, name)):
            signature = str(inspect.signature(getattr(module, name)))
            assert len(name + signature) < 3 * 120


def test_every_page_with_python_is_run():
    pages = [p for p in ROOT.glob("docs/*.md") if "```python" in p.read_text()]
    elsewhere = {"docs/recipes.md"}  # test_recipes.py
    assert {p.relative_to(ROOT).as_posix() for p in pages} <= set(PAGES) | elsewhere
