"""One self-contained HTML file: template, style, script and data are in it, and nothing comes from the network."""

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from common.files import written_whole

HERE = Path(__file__).parent


def write_page(file: Path, name: str, title: str, data: dict[str, Any]) -> None:
    """Fill page.html with `pages/NAME.css`, `pages/NAME.js` and `data`, which the script reads as `data`."""
    parts = {
        "title": html.escape(title),
        "style": (HERE / f"{name}.css").read_text(encoding="utf-8"),
        "script": (HERE / f"{name}.js").read_text(encoding="utf-8"),
        # without "<" no text in the JSON can end the script element around it
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = (HERE / "page.html").read_text(encoding="utf-8")
    # all places are filled in one pass, so that {{data}} in a caption stays as it is
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)
    with written_whole(file) as part:
        part.write_text(page, encoding="utf-8")


def data_uri(image: Image.Image, format: str = "JPEG", **options: Any) -> str:
    """An image as a data URI, which an <img> of a page can show."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
