"""Labelled grids of images: what a person looks at to compare steps, seeds, weights or methods."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Row = tuple[str, Sequence[tuple[str, Image.Image]]]
"""A label, and cells of (caption, image)."""

_INK, _PAPER, _FADED = (32, 32, 36), (255, 255, 255), (110, 110, 118)


def contact_sheet(rows: Sequence[Row], cell: int = 128, label_width: int | None = None) -> Image.Image:
    """One picture of all `rows`: the label at the left, each image above its caption.

    **Arguments**: `cell` is the side of an image's square in pixels (images keep their proportions); `label_width` in
    pixels is measured from the labels unless given. Captions that do not fit are wrapped to two lines, then cut.
    """
    if not any(cells for _, cells in rows):
        raise ValueError("a contact sheet needs at least one image")
    gap, text = max(4, cell // 24), max(10, min(16, cell // 10))
    font = ImageFont.load_default(text)
    captions = [[_wrap(caption, font, cell) for caption, _ in cells] for _, cells in rows]
    line = round(text * 1.3)
    heights = [cell + gap + line * max((len(lines) for lines in row), default=0) for row in captions]
    if label_width is None:
        label_width = min(2 * cell, max((round(font.getlength(label)) for label, _ in rows), default=0))
    left = gap + label_width + (gap if label_width else 0)
    width = left + max(len(cells) for _, cells in rows) * (cell + gap)
    sheet = Image.new("RGB", (width, gap + sum(heights) + gap * len(rows)), _PAPER)
    draw, y = ImageDraw.Draw(sheet), gap
    for (label, cells), lines, height in zip(rows, captions, heights, strict=True):
        draw.text((gap, y + cell // 2), "\n".join(_wrap(label, font, label_width, 3)), _INK, font, anchor="lm")
        for x, ((_, image), caption) in enumerate(zip(cells, lines, strict=True)):
            place = left + x * (cell + gap), y
            sheet.paste(_fit(image, cell), place)
            draw.text((place[0], y + cell + gap // 2), "\n".join(caption), _FADED, font)
        y += height + gap
    return sheet


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """The image in the middle of a square of `cell` pixels."""
    scale = cell / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    square = Image.new("RGB", (cell, cell), (240, 240, 242))
    middle = (cell - size[0]) // 2, (cell - size[1]) // 2
    square.paste(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), middle)
    return square


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, most: int = 2) -> list[str]:
    """`text` in at most `most` lines of `width` pixels; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + "…"]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.rstrip("…")
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
