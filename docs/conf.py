"""Configuration of the documentation: `sphinx-build -W -b html docs docs/_build`, without a network."""

import fedmd_jax

project = "fedmd_jax"
author = "the fedmd_jax authors"
copyright = author
release = version = fedmd_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
# The notebooks are built from their .md sources.
exclude_patterns = ["_build", "jupyter_execute", ".jupyter_cache", "notebooks/*.ipynb"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_title = "fedmd_jax"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "repository_url": "https://github.com/fedmd-jax/fedmd_jax",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the sidebar has a search field
}

# Types are in the docstrings; the expanded aliases of JAX fill half a page.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
default_role = "py:obj"
maximum_signature_line_length = 80
napoleon_use_ivar = True

doctest_global_setup = """
import jax
import jax.numpy as jnp
import numpy as np
import fedmd_jax as fmd
"""

nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
suppress_warnings = ["misc.highlighting_failure"]  # shell cells of notebooks that were not executed
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
