"""A sheet of pictures in columns, with enlarged details below."""

from __future__ import annotations

from typing import Dict, Sequence, Tuple

from PIL import Image, ImageDraw, ImageFont

CROPS = ((200, 60), (300, 330), (125, 340))  # left and top of details of the astronaut: face, helmet, badge
CROP_SIZE = 96


def side_by_side(
    columns: Dict[str, Image.Image],
    boxes: Sequence[Tuple[int, int]] = CROPS,
    size: int = CROP_SIZE,
    zoom: int = 4,
) -> Image.Image:
    """A column for each image: the whole, with frames, above the enlarged details in these frames."""
    width, header, gap = size * zoom, 28, 8
    first = next(iter(columns.values()))
    boxes = [box for box in boxes if box[0] + size <= first.width and box[1] + size <= first.height]
    height = round(first.height * width / first.width)
    sheet = Image.new(
        "RGB",
        (len(columns) * (width + gap) + gap, header + height + len(boxes) * (width + gap) + gap),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, (label, image) in enumerate(columns.items()):
        left = gap + column * (width + gap)
        draw.text((left, 4), label, fill="black", font=ImageFont.load_default(18))
        framed = image.copy()
        for box in boxes:
            ImageDraw.Draw(framed).rectangle((*box, box[0] + size, box[1] + size), outline="red", width=2)
        sheet.paste(framed.resize((width, height), Image.Resampling.LANCZOS), (left, header))
        for row, (x, y) in enumerate(boxes):
            detail = image.crop((x, y, x + size, y + size)).resize((width, width), Image.Resampling.NEAREST)
            sheet.paste(detail, (left, header + height + gap + row * (width + gap)))
    return sheet
