import numpy as np
from PIL import ImageFont

from kontext_jax.evaluation.sheets import SheetRow, draw_sheet, enlarged_error, wrap


def solid(value: int, side: int = 32) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def test_images_are_drawn_in_their_columns():
    rows = [
        SheetRow([solid(10), solid(20)], "two contexts", [solid(30)], solid(40)),
        SheetRow([], "none", [solid(50, 16)], solid(60)),
    ]
    sheet = draw_sheet(rows, cell=64, text_width=100)
    assert sheet.shape == (26 + 2 * 72, 8 + 4 * 72 + 108, 3)
    middle = 26 + 32
    assert [sheet[middle, x, 0] for x in (40, 112, 292, 364)] == [10, 20, 30, 40]
    assert [sheet[middle + 72, x, 0] for x in (40, 112, 292, 364)] == [255, 255, 50, 60]


def test_the_target_column_is_drawn_if_any_row_has_a_target():
    without = SheetRow([solid(10)], "a", [solid(30)], None)
    sheet = draw_sheet([without, SheetRow([solid(10)], "b", [solid(30)], solid(40))], cell=64)
    assert sheet.shape[1] == 8 + 3 * 72 + 248
    assert [sheet[26 + 32 + row, -40, 0] for row in (0, 72)] == [255, 40]
    assert draw_sheet([without], cell=64).shape[1] == 8 + 2 * 72 + 248


def test_instructions_are_drawn_and_wrapped():
    font = ImageFont.load_default(size=15)
    lines = wrap("change the background of the picture to sand", font, 120)
    assert len(lines) > 1 and all(font.getlength(line) <= 120 for line in lines)
    assert " ".join(lines) == "change the background of the picture to sand"
    row = SheetRow([solid(255)], "make it night", [solid(255)], solid(255))
    assert (draw_sheet([row])[26:] < 100).any()


def test_errors_are_enlarged_around_grey():
    image, reference = solid(100), solid(90)
    reference[0] = 250
    error = enlarged_error(image, reference)
    assert error[1, 0, 0] == 128 + 4 * 10 and error[0, 0, 0] == 0
    assert error.dtype == np.uint8
