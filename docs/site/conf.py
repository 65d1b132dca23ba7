"""The pages as a site, by `./dev docs`. Sphinx reads the repository's root, so pages link as on a forge."""

import os

project = "pbsattn"
author = "The pbsattn contributors"
copyright = author
extensions = ["myst_parser", "breathe", "sphinx.ext.autodoc", "autoapi.extension"]
root_doc = "docs/site/index"
include_patterns = ["*.md", "docs/**", "results/**", "examples/**", "integrations/**"]
html_theme = "furo"
html_title = "pbsattn"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}  # the site's first page, at its top
templates_path = ["."]
html_copy_source = False

myst_heading_anchors = 4
# What GitHub's Markdown has no name for.
suppress_warnings = ["misc.highlighting_failure"]

breathe_projects = {"pbsattn": os.environ["PBSATTN_DOXYGEN_XML"]}
breathe_default_project = "pbsattn"
breathe_domain_by_extension = {"h": "c", "hpp": "cpp"}
breathe_show_include = False

# The package is read, not imported: it needs neither PyTorch nor to be built.
autoapi_dirs = ["integrations/python/pbsattn"]
autoapi_generate_api_docs = False
autoapi_python_class_content = "class"


def show_as_written(app, what, name, obj, options, lines):
    """Shows docstrings as they are written: plain text, whose indentation means what it looks like."""
    if any(lines):
        lines[:] = [".. code-block:: text", "", *(f"   {line}" for line in lines), ""]


def setup(app):
    app.connect("autodoc-process-docstring", show_as_written)
