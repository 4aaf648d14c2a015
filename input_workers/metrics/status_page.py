"""The live page: one HTML file, and the headers that keep it from loading anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import pathlib
import re

__all__ = ["status_page"]


def status_page() -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """Return the page, which asks for /status.json each second, and its headers: it may run and load what is in it only."""
    html = pathlib.Path(__file__).with_suffix(".html").read_text("utf-8")
    style, script = (_hash_of(html, tag) for tag in ("style", "script"))
    policy = (
        f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    return html.encode(), (("Content-Security-Policy", policy), ("Referrer-Policy", "no-referrer"))


def _hash_of(html: str, tag: str) -> str:
    """Return what a policy calls the text of an element."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
