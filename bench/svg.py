"""A figure as SVG: cells, boxes, arrows and text, as bench/lesson.py draws them.

There is no background, and each colour has two tones: one for light pages, one for dark ones, which
the reader's browser chooses. A colour says what a thing is, in every figure the same:

    query   rows of Q                    result  what comes back of them: O, LSE
    kv      KV, in a slot or on its way  faint   whatever has no part in the thought

What has no colour named is drawn in ink. Units are pixels at the figure's full width; y grows
downwards. A text stands on its y. A box groups its lines with its frame, so that a test can tell
whether they fit.
"""

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH = 760
# On a light page, and on a dark one.
COLOURS = {
    "ink": ("#1f2328", "#e6edf3"),
    "faint": ("#656d76", "#9198a1"),
    "query": ("#0a5fb4", "#63aeff"),
    "kv": ("#ad4e00", "#f2a45c"),
    "result": ("#13774f", "#4ac492"),
}
LINE = 17  # from one line of a text to the next
HEAD = 8  # length of an arrow's head; it is as wide

# {} takes the colours. What is hollow has only a frame; what is solid is filled with its colour,
# other shapes with a tint of it.
STYLE = """
text {{ font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif;
       fill: currentColor }}
.small {{ font-size: 12px }}
.head {{ font-size: 14px; font-weight: 600 }}
.code {{ font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }}
rect, path {{ fill: currentColor; stroke: currentColor; fill-opacity: .14 }}
.solid {{ fill-opacity: .85 }}
.hollow, .line {{ fill: none }}
.line {{ stroke-width: 1.7 }}
.thin {{ stroke-width: 1; stroke-opacity: .55 }}
.dashed {{ stroke-dasharray: 4 3 }}
.tip {{ fill-opacity: 1; stroke: none }}
{}
@media (prefers-color-scheme: dark) {{
{}
}}
"""


def style() -> str:
    """The rules of every figure."""

    def rules(theme):
        inked, *others = COLOURS.items()
        first = f"svg {{ color: {inked[1][theme]} }}"
        return [
            first,
            *(f".{name} {{ color: {tones[theme]} }}" for name, tones in others),
        ]

    return STYLE.format(*("\n".join(rules(theme)) for theme in (0, 1)))


class Figure:
    """What is drawn stands in the order in which it was drawn. A look is the names of a colour and
    of what else STYLE has, with spaces between."""

    def __init__(self, title: str, description: str, height: int):
        self.title = title
        self.description = description
        self.height = height
        self.parts = []

    def text(self, x, y, said, look="", anchor="start"):
        """Lines of `said`. anchor: start, middle or end of each is at x."""
        at = "" if anchor == "start" else f' text-anchor="{anchor}"'
        named = f' class="{look}"' if look else ""
        for number, line in enumerate(said.split("\n")):
            place = f'x="{x:g}" y="{y + number * LINE:g}"'
            self.parts.append(f"<text {place}{at}{named}>{escape(line)}</text>")

    def box(self, x, y, width, height, said="", look="faint", letters="", code=""):
        """A frame, and in its middle lines of text and of code. letters: the look of the text."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"'
        self.parts.append(f'<g><rect {place} class="{look}"/>')
        lines = [(line, letters) for line in said.splitlines()]
        lines += [(line, "code") for line in code.splitlines()]
        first = y + (height - (len(lines) - 1) * LINE) / 2 + 4.5
        for number, (line, look_of_line) in enumerate(lines):
            at = x + width / 2, first + number * LINE
            self.text(*at, line, look_of_line, "middle")
        self.parts.append("</g>")

    def cells(self, places, width, height, look):
        """Rectangles of one size and look, as one path. places: (x, y) of each."""
        each = (f"M{x:g} {y:g}h{width:g}v{height:g}h{-width:g}z" for x, y in places)
        self.parts.append(f'<path class="{look}" d="{"".join(each)}"/>')

    def line(self, points, look):
        """Straight, from point to point."""
        first, *others = (f"{x:g} {y:g}" for x, y in points)
        path = "".join(f"L{point}" for point in others)
        self.parts.append(f'<path class="line {look}" d="M{first}{path}"/>')

    def curve(self, start, end, look):
        """From above to below, upright at both ends."""
        x, y = start
        end_x, end_y = end
        bend = (y + end_y) / 2
        path = f"M{x:g} {y:g}C{x:g} {bend:g} {end_x:g} {bend:g} {end_x:g} {end_y:g}"
        self.parts.append(f'<path class="line {look}" d="{path}"/>')

    def arrow(self, points, look):
        """Its last stretch is level or upright; its tip is at the last point."""
        *others, (last_x, last_y), (x, y) = points
        along_x = (x > last_x) - (x < last_x)
        along_y = (y > last_y) - (y < last_y)
        back_x = x - HEAD * along_x
        back_y = y - HEAD * along_y
        self.line([*others, (last_x, last_y), (back_x, back_y)], look)
        aside_x = HEAD / 2 * along_y
        aside_y = HEAD / 2 * along_x
        corners = (
            (x, y),
            (back_x + aside_x, back_y + aside_y),
            (back_x - aside_x, back_y - aside_y),
        )
        path = "L".join(f"{corner_x:g} {corner_y:g}" for corner_x, corner_y in corners)
        colour = look.split()[0]
        self.parts.append(f'<path class="tip {colour}" d="M{path}z"/>')

    def render(self) -> str:
        """The file."""
        size = (
            f'width="{WIDTH}" height="{self.height}" viewBox="0 0 {WIDTH} {self.height}"'
        )
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}',
            ' role="img" aria-labelledby="title desc">',
            f'<title id="title">{escape(self.title)}</title>',
            f'<desc id="desc">{escape(self.description)}</desc>',
            f"<style>{style()}</style>",
            *self.parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def write(self, path: Path):
        path.write_text(self.render(), encoding="utf-8")


if __name__ == "__main__":
    print(__doc__)
