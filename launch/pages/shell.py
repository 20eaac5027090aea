"""One self-contained HTML file: its head, its Content-Security-Policy, and data that cannot become markup.

Decides what a page may do: run the scripts that it was written with, named by their SHA-256, and nothing else; no
network, no frame, no form. Must not know what a page shows.

Invariants: data reaches the page as JSON in a block that is not a script, with every `<`, `>` and `&` escaped, so no
text in it can close the block; the page's scripts put text into the document by `textContent` only.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

_ASSETS = files("trace_rl.launch.pages") / "assets"
_ESCAPED = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def asset(name: str) -> str:
    """The text of a file that ships with the pages."""
    return (_ASSETS / name).read_text(encoding="utf-8")


def page(
    title: str,
    body: str,
    styles: Sequence[str],
    scripts: Sequence[str],
    data: Mapping[str, Any],
    allowed: Sequence[str] = (),
    library: str = "",
) -> str:
    """The whole page.

    Args:
        body: markup that is ours; nothing that a run has written.
        styles: style sheets in order.
        scripts: classic scripts in order, which share one scope; they read what `data` holds with `pageData()`.
        allowed: further directives of the policy, for what a library of the page cannot do without.
        library: a large script that is carried compressed and runs when the page calls `runLibrary()`.

    Raises:
        ValueError: a style or script would close its own element.
    """
    for text in (*styles, *scripts):
        if "</script" in text.lower() or "</style" in text.lower() or "<!--" in text:
            raise ValueError("a style or script of the page holds an end tag or a comment of HTML, which would cut it")
    everything_that_runs = [*([library] if library else []), *scripts]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy(styles, everything_that_runs, allowed)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            *(f"<style>{text}</style>" for text in styles),
            "</head>",
            "<body>",
            body,
            f'<script type="application/json" id="data">{escaped_json(data)}</script>',
            *([f'<script type="text/plain" id="library">{_compressed(library)}</script>'] if library else []),
            *(f"<script>{text}</script>" for text in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def _compressed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def policy(styles: Sequence[str], scripts: Sequence[str], allowed: Sequence[str] = ()) -> str:
    """The Content-Security-Policy: these styles and scripts, and nothing from anywhere."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hashes(scripts)}",
            f"style-src {_hashes(styles)}",
            "base-uri 'none'",
            "form-action 'none'",
            *allowed,
        ]
    )


def _hashes(texts: Sequence[str]) -> str:
    return " ".join(map(_hash, texts)) or "'none'"


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def escaped_json(data: Any) -> str:
    """JSON that holds no character of markup.

    Raises:
        ValueError: a number is not finite, which is no JSON.
    """
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPED)
