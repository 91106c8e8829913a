"""Pages of HTML that are one file: pictures as data URIs, no script, light and dark, in print."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 640  # pixels, to which larger pictures are reduced
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --text: #1c1f23; --page: #fff; --soft: #5a626b;
  --line: #d5dae0; --panel: #f5f7f9; --warn: #7a4b00; --warned: #fff4df; --accent: #0b62c4; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ea; --page: #15181b; --soft: #a3acb5;
  --line: #3a4149; --panel: #1f2429; --warn: #ffcf80; --warned: #3a2c12; --accent: #7db5f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1.25rem 3rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
p { max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; width: 15rem; max-width: 100%; }
figure img, figure svg { display: block; width: 100%; height: auto; background: #000; }
figure svg { background: var(--panel); } figure svg line { stroke: var(--soft); }
.coarse { image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td { overflow-wrap: anywhere; }
.warnings { background: var(--warned); border-left: 4px solid var(--warn); padding: .25rem 1rem; }
.warnings strong { color: var(--warn); }
pre { background: var(--panel); padding: .75rem; overflow-x: auto; font-size: .8rem; }
summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 3rem; border-top: 1px solid var(--line); }
@media print {
  :root { color-scheme: light; --text: #000; --page: #fff; --soft: #444; --line: #bbb;
    --panel: #f3f3f3; --warn: #7a4b00; --warned: #fff4df; --accent: #000; }
  body { max-width: none; padding: 0; font-size: 11pt; }
  figure, table, .warnings { break-inside: avoid; } h2, h3 { break-after: avoid; }
  figure { width: 11rem; } pre { white-space: pre-wrap; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
""".strip()


def escape(text: object) -> str:
    """Text, as HTML shows it."""
    return html.escape(str(text))


def page(title: str, body: Iterable[str]) -> str:
    """A whole page; `body` is HTML already, `title` is text."""
    parts = "\n".join(body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        f"{parts}\n</body>\n</html>\n"
    )


def section(title: str, parts: Iterable[str], name: str) -> str:
    """A section with a heading; `name` is its id. Nothing, where there are no parts."""
    inside = "\n".join(part for part in parts if part)
    if not inside:
        return ""
    return f'<section id="{escape(name)}">\n<h2>{escape(title)}</h2>\n{inside}\n</section>'


def table(rows: Iterable[Sequence[object]], heading: Sequence[object] = ()) -> str:
    """A table of texts, the first column of which names the rows."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heading)
    lines = [f"<thead><tr>{head}</tr></thead>"] if heading else []
    for name, *cells in rows:
        others = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{others}</tr>')
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def figure(content: str, caption: str) -> str:
    """A picture or drawing, HTML, over its caption, a text."""
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def picture(pixels: NDArray[np.uint8], text: str, coarse: bool = False) -> str:
    """An image element that holds its pixels as PNG.

    Args:
        pixels: (H, W) or (H, W, 3); sides above `SIDE` are reduced by whole numbers.
        text: says what it shows to those who do not see it.
        coarse: whether single pixels are to be seen.
    """
    image = Image.fromarray(pixels)
    factor = -(-max(image.size) // SIDE)
    if factor > 1:
        image = image.reduce(factor)
    file = io.BytesIO()
    image.save(file, format="png", optimize=True)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    kind = ' class="coarse"' if coarse else ""
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img{kind} alt="{escape(text)}" {size} src="data:image/png;base64,{data}">'


def curve(values: Sequence[float], limit: float, text: str) -> str:
    """A drawing of values at 1, 2, 3, … as bars, with a line at `limit`."""
    high = max(1.2 * limit, *values, 0.01)
    low = min(-0.5 * limit, *values)
    top, bottom, left, width = 8, 112, 34, 200

    def y(value: float) -> float:
        return round(bottom - (value - low) / (high - low) * (bottom - top), 1)

    def label(value: float, shown: str) -> str:
        return f'<text x="{left - 4}" y="{y(value) + 3}" text-anchor="end">{shown}</text>'

    step = (width - left) / len(values)
    bars = []
    for i, value in enumerate(values):
        x = round(left + (i + 0.2) * step, 1)
        first, last = sorted((y(value), y(0)))
        fill = "var(--warn)" if value > limit else "var(--accent)"
        bars.append(
            f'<rect x="{x}" y="{first}" width="{0.6 * step:.1f}" '
            f'height="{last - first:.1f}" style="fill:{fill}"/>'
            f'<text x="{x + 0.3 * step:.1f}" y="{bottom + 12}" text-anchor="middle">{i + 1}</text>'
        )
    lines = [
        f'<line x1="{left}" x2="{width}" y1="{y(v)}" y2="{y(v)}"{dash}/>'
        for v, dash in ((0, ""), (limit, ' stroke-dasharray="4 3"'))
    ]
    return (
        f'<svg viewBox="0 0 {width + 4} {bottom + 18}" role="img" aria-label="{escape(text)}" '
        'font-size="9" style="fill:var(--soft);stroke:none">'
        + "".join([*lines, *bars, label(0, "0"), label(limit, f"{limit:.2f}")])
        + "</svg>"
    )


def details(title: str, content: str) -> str:
    """What is shown when it is asked for; `content` is HTML."""
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def heat(values: NDArray, scale: float) -> NDArray[np.uint8]:
    """(H, W) from 0 to `scale` as colours (H, W, 3), dark to bright."""
    return _coloured(values / (scale or 1), "inferno")


def signed(values: NDArray, scale: float) -> NDArray[np.uint8]:
    """(H, W) from -scale to scale as colours (H, W, 3), white at 0."""
    return _coloured(values / (2 * scale or 1) + 0.5, "RdBu_r")


def _coloured(share, name):
    from matplotlib import colormaps

    colours: NDArray[np.float64] = np.asarray(colormaps[name](np.clip(share, 0, 1)))
    return np.rint(255 * colours[..., :3]).astype(np.uint8)


def flat(settings: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, value) in their order."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += flat(value, f"{name}.")
        else:
            rows.append((name, "" if value is None else str(value)))
    return rows
