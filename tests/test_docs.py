"""Every example in a docstring of the package, and every Python block of the README, runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import bn_fast

README = Path(__file__).resolve().parent.parent / "README.md"
MODULES = ["bn_fast"] + [
    f"bn_fast.{module.name}"
    for module in pkgutil.iter_modules(bn_fast.__path__)
    # the command runs when it is imported; of the kernels only the chosen level may be
    if module.name != "__main__" and not module.name.startswith("_core_")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize(
    "name",
    [name for name in bn_fast.__all__ if callable(getattr(bn_fast, name))],
)
def test_public_function_has_an_example(name):
    assert ">>> " in getattr(bn_fast, name).__doc__


def test_readme_examples():
    """The blocks in their order, in one namespace, as a reader would type them."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        if block.startswith(">>> "):
            test = doctest.DocTestParser().get_doctest(block, names, "README", str(README), 0)
            assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
            names.update(test.globs)
        else:
            exec(block, names)
