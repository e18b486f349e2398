"""Pages of HTML that stand alone: one file, without scripts or anything from the network."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from unet.pages.numbers import ABSENT, percent, signed


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
    environment.globals["absent"] = ABSENT
    page = environment.get_template(template).render(content)
    # A file name that is not UTF-8 reaches Python as lone surrogates, which cannot be written to a file.
    return page.encode(errors="backslashreplace").decode()


def _rgb(colour: tuple[int, int, int]) -> str:
    return "rgb({:d} {:d} {:d})".format(*colour)


def _breakable(name: str) -> Markup:
    """A name as HTML that may break after its underscores."""
    return Markup(str(escape(name)).replace("_", "_<wbr>"))
