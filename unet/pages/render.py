"""Pages of HTML that stand alone: one file, without scripts or anything from the network."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def render(template: str, **content) -> str:
    """The page of a template under `unet/`, as text that encodes to UTF-8; values in it are escaped."""
    environment = Environment(
        loader=PackageLoader("unet", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "signed": signed, "rgb": _rgb, "breakable": _breakable}
    environment.filters["thousands"] = "{:,}".format
    page = environment.get_template(template).render(content)
    # A file name that is no UTF-8 reaches Python as lone surrogates, which no file can be written with.
    return page.encode(errors="backslashreplace").decode()


def percent(share: float) -> str:
    """Return a share such as 0.123 as "12.3 %"; rounding never makes some into none or nearly all into all."""
    if share in (0, 1):
        number = f"{100 * share:.0f}"
    else:
        number = f"{100 * share:.1f}"
        number = {"0.0": "<0.1", "100.0": ">99.9"}.get(number, number)
    return f"{number}\N{NO-BREAK SPACE}%"


def signed(number: float) -> str:
    return f"{number:.2f}".replace("-", "−")


def _rgb(colour: tuple[int, int, int]) -> str:
    return "rgb({:d} {:d} {:d})".format(*colour)


def _breakable(name: str) -> Markup:
    """A name as HTML that may break after its underscores."""
    return Markup(str(escape(name)).replace("_", "_<wbr>"))
