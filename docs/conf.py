"""The site: docs/*.md, README.md as its first page, and the docstrings; `make docs` builds it, strictly."""

import re
from pathlib import Path

import dcn_plugin

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

project = "dcn_plugin"
author = copyright = "dcn_plugin contributors"
version = release = dcn_plugin.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = f"dcn_plugin {version}"
myst_heading_anchors = 4
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"

# Every reference must resolve, but for those to other projects: their indices are not downloaded.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|mmengine|mmcv|mmdet|collections)\..*"),
    (r"py:class", r"Tensor|nn\.\w+|optional|ConfigType|dict tuple"),
]

# Files elsewhere in the project that are pages here.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
INCLUDE = re.compile(r"```\{include\} (\S+)\n```\n")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:]+)(#[^)]*)?\)")


def site_links(text: str, folder: Path) -> str:
    """The text of a file in `folder` with its links as a page in docs/ must write them.

    Folders and documents that are no pages have nothing to link to: of their links the label is left.
    """

    def rewrite(match):
        image, label, target, anchor = match.groups()
        path = (folder / target).resolve()
        page = PAGES.get(str(path.relative_to(ROOT)))
        if page is None and path.is_relative_to(DOCS):
            page = path.relative_to(DOCS)
        if page is None and (path.is_dir() or (path.exists() and path.suffix == ".md")):
            return label
        return f"{image}[{label}]({page or f'../{path.relative_to(ROOT)}'}{anchor or ''})"

    return LINK.sub(rewrite, text)


def read_source(app, page, source):
    if "/" not in page:
        text = site_links(source[0], DOCS)
        source[0] = INCLUDE.sub(lambda match: site_links((DOCS / match[1]).read_text(), ROOT), text)


def setup(app):
    app.connect("source-read", read_source)
