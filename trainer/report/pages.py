"""What the pages share: templates, the JSON block that scripts read, and Plotly inside the page."""

from __future__ import annotations

import base64
import functools
import gzip
import json
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

#: Nothing may be fetched from anywhere; `blob:` and `data:` are for Plotly's "download plot as a picture".
SELF_CONTAINED = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


@functools.cache
def templates() -> Environment:
    """The pages' templates. Everything that is put into a page is escaped."""
    return Environment(
        loader=PackageLoader("qatapult.trainer.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def compressed_plotly() -> Markup:
    """Plotly's script, gzipped and in base64: 1.9 MB a page instead of 4.8 MB; the browser unpacks it."""
    from plotly.offline import get_plotlyjs

    packed = gzip.compress(get_plotlyjs().encode("utf-8"), compresslevel=6, mtime=0)
    return Markup(base64.b64encode(packed).decode("ascii"))


def json_block(value: Any) -> Markup:
    """JSON that may stand inside a `<script>` element, whatever text it holds."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
