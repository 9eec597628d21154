"""The page itself: its files put into one, so that it is one request, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from importlib.resources import files

_STYLE, _SCRIPT = "/*style*/", "/*script*/"
_SCRIPTS = ("view.js", "app.js")


@lru_cache(maxsize=1)
def page() -> tuple[str, dict[str, str]]:
    """HTML, and headers: scripts and styles other than its own do not run, and nothing is loaded from elsewhere."""
    style = _read("style.css")
    script = "".join(_read(name) for name in _SCRIPTS)
    html = _read("index.html").replace(_STYLE, style).replace(_SCRIPT, script)
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return html, headers


def _read(name: str) -> str:
    return (files(__package__) / "static" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
