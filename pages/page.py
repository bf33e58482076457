"""One self-contained HTML file: shell, style, script and data in it, nothing from the network."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from common.files import written_whole

HERE = Path(__file__).parent


def write_page(file: Path, name: str, title: str, data: dict[str, Any]) -> None:
    """Write the page `pages/NAME.css` and `pages/NAME.js` with `data`, which the script reads as `data`."""
    # no text in the JSON can end the script element that holds it
    safe = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (HERE / "page.html").read_text(encoding="utf-8")
    for key, value in (
        ("style", (HERE / f"{name}.css").read_text(encoding="utf-8")),
        ("script", (HERE / f"{name}.js").read_text(encoding="utf-8")),
        ("title", html.escape(title)),
        ("data", safe),  # last: what stands in it is filled in no more
    ):
        page = page.replace("{{" + key + "}}", value)
    with written_whole(file) as part:
        part.write_text(page, encoding="utf-8")


def read_page(file: Path) -> dict[str, Any]:
    """The data of a page that `write_page` wrote."""
    _, _, rest = file.read_text(encoding="utf-8").partition('<script type="application/json" id="data">')
    return json.loads(rest.partition("</script>")[0])


def data_uri(image: Image.Image, format: str = "JPEG", **options: Any) -> str:
    """An image as the address of itself."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
