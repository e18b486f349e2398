"""Numbers as people read them: in the terminal, in figures and on pages."""

ABSENT = "–"
"""What stands for a value that could not be measured."""


def score(value: float | None, sign: str = "", digits: int = 4) -> str:
    """A score or loss such as "0.8413"; `sign` "+" shows that of a difference."""
    return ABSENT if value is None else f"{value:{sign}.{digits}f}"


def signed(number: float) -> str:
    """A number that may be negative, with a real minus sign: "−0.25"."""
    return score(number, digits=2).replace("-", "−")


def percent(share: float, digits: int = 1) -> str:
    """A share such as 0.123 as "12.3 %"; rounding never makes some into none or nearly all into all."""
    number = f"{100 * share:.{0 if share in (0, 1) else digits}f}"
    if 0 < share < 1:
        least = 10.0**-digits
        none, every = f"{0:.{digits}f}", f"{100:.{digits}f}"
        number = {none: f"<{least:.{digits}f}", every: f">{100 - least:.{digits}f}"}.get(number, number)
    return f"{number}\N{NO-BREAK SPACE}%"


def brief(count: float) -> str:
    """A number of pixels in at most three digits: "999", "1.2 k", "52 M"."""
    units = ["", " k", " M", " G"]
    # 999.5 would print as 1000, so it already belongs to the next unit.
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.{1 if units[0] and count < 9.95 else 0}f}{units[0]}"


def cell_text(pixels: int, row_total: int) -> tuple[str, str]:
    """A cell of a confusion matrix: its share of the row and its pixels, such as ("91.2 %", "1.2 M")."""
    return (percent(pixels / row_total), brief(pixels)) if row_total else (ABSENT, "")


def images(count: int) -> str:
    """Return "1 image" or "3,669 images"."""
    return f"{count:,} image{'s' * (count != 1)}"


def speed(images_per_second: float) -> str:
    return f"{images_per_second:.1f} images/s"


def duration(seconds: float) -> str:
    """Hours, where there are any, minutes and seconds: "1:02:03", "2:03"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def gigabytes(size: float) -> str:
    """Bytes as "1.2 GB"."""
    return f"{size / 1e9:.1f} GB"
