"""How Sphinx makes the site: python -m sphinx -W docs docs/_build (pip install -e ".[docs]")."""

import sys
from unittest.mock import MagicMock

# The doors are described without the libraries that they lead to. (autodoc's own mock has no answer
# to decorators that make objects, and hides constructors.)
LIBRARIES = """
    autograd autograd.extend dask dask.array dask.delayed mpi4py sklearn sklearn.base sklearn.utils
    sklearn.utils.validation torch torch._compile torch.autograd torch.autograd.function
"""
for name in LIBRARIES.split():
    sys.modules[name] = MagicMock()
sys.modules["torch"].autograd.Function = object
for name in ("BaseEstimator", "OneToOneFeatureMixin", "TransformerMixin"):
    setattr(sys.modules["sklearn.base"], name, type(name, (), {}))

import bn_fast  # noqa: E402

project = "bn_fast"
author = "bn_fast developers"
release = version = bn_fast.__version__
copyright = "2026, bn_fast developers"

extensions = ["sphinx.ext.autosummary", "numpydoc", "myst_parser", "sphinx-mathjax-offline"]
exclude_patterns = ["_build", "templates"]
default_role = "obj"
highlight_language = "none"  # of what does not say
autodoc_typehints = "none"  # the docstrings say what types mean
autosummary_generate_overwrite = True
autodoc_preserve_defaults = True
numpydoc_show_class_members = False  # the template has them
templates_path = ["templates"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_title = f"bn_fast {release}"
html_show_sphinx = False
html_copy_source = False
