"""MkDocs hook: shows the repository's own pages in the guide, so that nothing is written twice.

Links between shown pages lead to each other; a link to any other file of the repository becomes
its name, since the guide does not hold it; a link to no file is left, and `--strict` refuses it.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
GUIDE = Path("docs/guide")
SHOWN = {
    "configs/README.md": "settings.md",
    "tapfm/encoders/README.md": "encoders.md",
    "tapfm/slide_encoders/README.md": "slide_encoders.md",
    "tapfm/adapt/README.md": "strategies.md",
    "tapfm/engine/README.md": "cards.md",
    "docs/when_to_adapt.md": "when_to_adapt.md",
    "docs/related.md": "related.md",
    "docs/decisions.md": "decisions.md",
}
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files, config):
    """Add the repository's pages to those of the guide."""
    for source, name in SHOWN.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Return a page with links as the guide has them."""
    sources = {name: source for source, name in SHOWN.items()}
    here = Path(sources.get(page.file.src_uri, GUIDE / page.file.src_uri)).parent

    def linked(found: re.Match) -> str:
        text, target = found.groups()
        path, mark, heading = target.partition("#")
        if not path or "://" in path:
            return found[0]
        file = (ROOT / here / path).resolve()
        if not file.is_relative_to(ROOT) or not file.exists():
            return found[0]
        name = file.relative_to(ROOT).as_posix()
        if Path(name).parent == GUIDE:
            return f"[{text}]({Path(name).name}{mark}{heading})"
        if name in SHOWN:
            return f"[{text}]({SHOWN[name]}{mark}{heading})"
        return text if text.strip("`") == name else f"{text} (`{name}`)"

    return LINK.sub(linked, markdown)
