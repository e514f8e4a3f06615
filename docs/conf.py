"""Sphinx's settings: `make docs`."""

import os
import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from torch_sinkhorn_attn import __version__

project = "torch_sinkhorn_attn"
author = "The torch_sinkhorn_attn authors"
project_copyright = author
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_dmath_double_inline = True
html_math_renderer = "mathml"  # browsers draw it by themselves: nothing is fetched
myst_heading_anchors = 3
exclude_patterns = ["_build", "_extra", "_figures", "jupyter_execute", "figures", "interactive", "requirements.txt"]
suppress_warnings = ["myst.header", "misc.copy_overwrite"]

# Notebooks are executed anew, without a network; an error in one ends the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # kernels start beside the notebook, and read examples/

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "torch_sinkhorn_attn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1769aa", "color-brand-content": "#1769aa"},
    "dark_css_variables": {"color-brand-primary": "#6cb4ee", "color-brand-content": "#6cb4ee"},
}
html_extra_path = ["_extra"]
default_role = "literal"
_HERE = Path(__file__).parent
_SOURCE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?!docs/)[^)]*\)")


def _without_links_to_sources(app: Sphinx, page: str, text: list[str]) -> None:
    """Links to files of the repository lead nowhere from a site: their words stay."""
    if "/" not in page:  # notebooks stand deeper, and their links lead to pages
        text[0] = _SOURCE.sub(r"\1", text[0])


def _as_written(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text: bars and stars are characters, but for the markers of lists and fields."""
    for i, line in enumerate(lines):
        parts = line.split("`")  # what stands in backticks stays
        parts[::2] = [x.replace("|", r"\|").replace("*", r"\*") for x in parts[::2]]
        lines[i] = "`".join(parts)


def _formula(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    translator.body.append(f'<div class="formula">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    shutil.copytree(_HERE / "interactive", _HERE / "_extra" / "interactive", dirs_exist_ok=True)  # as it is
    app.connect("source-read", _without_links_to_sources)
    app.connect("autodoc-process-docstring", _as_written, priority=100)  # before napoleon
