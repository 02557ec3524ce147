"""The chat page: page.html with its style, its scripts and facts about the server put in.

It is one file, since TorchServe serves none, and a page without a second request works behind any
key or proxy. Its Content-Security-Policy admits only these styles and scripts, by their SHA-256.
"""

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from handlers.original import MOST_TURNS

FOLDER = Path(__file__).parent
STYLE = re.compile(r'<link rel="stylesheet" href="([\w.]+)">')
SCRIPT = re.compile(r'<script src="([\w.]+)"></script>')
NOT_SETTINGS = {"context", "response", "stream"}  # keys that the page itself fills


def render_page(name: str, models: Sequence[str], description: Mapping[str, Any]) -> str:
    """The HTML of the page for the model `name`.

    `models` are the names of all models that have such a page. The settings that the page shows
    come from this model's OpenAPI `description`.
    """
    html = (FOLDER / "page.html").read_text(encoding="utf-8")
    html, styles = _put_in(html, STYLE, "style")
    html, scripts = _put_in(html, SCRIPT, "script")
    server = {
        "name": name,
        "models": list(models),
        "settings": _settings(description["components"]["schemas"]),
        "max_messages": MOST_TURNS,
    }
    html = html.replace("{style}", styles, 1).replace("{script}", scripts, 1)
    as_json = json.dumps(server).replace("<", "\\u003c")  # so that it cannot end its element
    return html.replace("{server}", as_json, 1)


def _put_in(html: str, reference: re.Pattern[str], tag: str) -> tuple[str, str]:
    """The HTML with the files that it refers to put in, and their hashes for the policy."""
    hashes = []

    def inline(match: re.Match[str]) -> str:
        content = "\n" + (FOLDER / match[1]).read_text(encoding="utf-8")
        digest = b64encode(sha256(content.encode()).digest()).decode()
        hashes.append(f"'sha256-{digest}'")
        return f"<{tag}>{content}</{tag}>"

    return reference.sub(inline, html), " ".join(hashes)


def _settings(schemas: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas of the settings that both APIs have, each under the first of its names.

    The defaults are those of OpenAI's API, which the page uses, except for `n`.
    """
    original, chat = [schemas[name]["properties"] for name in ("original", "chat")]
    settings = {"n": original["n"]}
    for name in original:
        if name not in NOT_SETTINGS and chat[name].get("x-setting", name) == name:
            settings.setdefault(name, chat[name])
    return settings
