"""A hook of mkdocs: documents beside `docs/` (SECURITY.md, results of benchmarks, …) are pages of the site, too.

Pages link to them as files of the repository, `../SECURITY.md`; on the site they lie at `SECURITY.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("SECURITY.md", "CHANGELOG.md", "benchmarks/README.md", "benchmarks/results/*.md",
           "benchmarks/results/*.png", "examples/weights/README.md")  # fmt: skip


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            content = path.read_text(encoding="utf-8") if path.suffix == ".md" else path.read_bytes()
            files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return markdown.replace("](../", "](") if "/" not in page.file.src_uri else markdown
