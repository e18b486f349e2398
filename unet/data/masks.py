"""What a mask's file says: the class of each pixel, by the one reading of its numbers that fits the classes.

The same ids can be stored as grey values, as indices of a palette of any order, as colours or in one channel, and
the format does not say which was meant. So every reading is compared with the values of the classes, and if two
would give different classes, nothing is guessed.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from PIL import Image

from unet.classes import COLOUR, IGNORE, UNKNOWN, Labels, Reading
from unet.data.pictures import Picture, Unusable
from unet.data.sources.description import spelled

CHANNELS: tuple[Reading, ...] = ("red", "green", "blue")
"""Readings that are used only if `dataset.yaml` names them: a colour's channels fit too easily."""
WORDS = {
    **{"index": "palette indices or stored numbers", "grey": "grey values", "colour": "colours"},
    **{"alpha": "alpha channel", "red": "red channel", "green": "green channel", "blue": "blue channel"},
}
SHOWN = 5
PHOTO = 4096
"""A file with more colours than this is not a mask."""


@dataclass(frozen=True)
class Codes:
    """A mask as one code a pixel.

    Attributes:
        pixels: of one band.
        used: int64 (K,), the codes that occur.
        readings: int64 (K,) each, what each code says.
    """

    pixels: Image.Image
    used: np.ndarray
    readings: dict[Reading, np.ndarray]


@dataclass(frozen=True)
class Mask:
    """A mask that was understood.

    Attributes:
        pixels: one code a pixel.
        table: uint8, the class id of each code, or `IGNORE`.
        present: the ids of the classes that it holds.
        reading: how it was read, where another way would have given other values.
        repairs: what was done.
    """

    pixels: Image.Image
    table: np.ndarray
    present: tuple[int, ...]
    reading: str
    repairs: tuple[str, ...]


def check_storage(mask: Picture) -> None:
    """Refuse a mask whose file may hold other values than those that were saved.

    Raises:
        Unusable: with the reason.
    """
    if mask.lossy:
        raise Unusable("lossy_mask", f"{mask.name} is {mask.lossy}: its values may have changed, so save masks as PNG")
    if mask.frames > 1:
        raise Unusable("several_frames", f"{mask.name} holds {mask.frames} pictures: save each mask as a single one")
    if mask.white_is_zero:
        raise Unusable(
            "inverted_mask", f"{mask.name} stores 0 for white, which programs read as 0 or as 1: save masks as PNG"
        )
    if len(mask.image.getbands()) > 1 and mask.white != 255:
        raise Unusable("colour_mask", f"{mask.name} has several channels, not of 8 bits: save masks as grey PNG")


def understand(mask: Picture, image: Image.Image, labels: Labels) -> Mask:
    """What a mask says; `image` is its picture, upright or as stored.

    Raises:
        Unusable: its values mean nothing, or two things.
    """
    codes, repairs = _codes(mask, image)
    reading = labels.masks or _choose(codes, labels)
    values = _read_by(codes, reading)
    ids = _ids(values, labels)
    if UNKNOWN in ids:
        raise _unknown(codes, values, ids, labels)
    if set(ids) == {IGNORE}:
        raise Unusable("nothing_labelled", "every pixel of the mask is ignored")
    table = np.full(codes.used.max() + 1, IGNORE, np.uint8)
    table[codes.used] = ids
    # Nobody mistakes numbers for colours, or colours for numbers.
    kinds = [(name, other) for name, other in _others(codes, reading) if "colour" not in (name, reading)]
    others = [name for name, other in kinds if (other != values).any()]
    if others:
        repairs.append(f"mask: read by its {WORDS[reading]}, not by its {' or '.join(WORDS[name] for name in others)}")
    present = tuple(sorted(set(ids) - {IGNORE}))
    return Mask(codes.pixels, table, present, reading if others else "", tuple(repairs))


def _choose(codes: Codes, labels: Labels) -> Reading:
    """The reading that fits the classes, the first of those that give the same."""
    candidates = [name for name in codes.readings if name not in CHANNELS]
    fitting = [name for name in candidates if UNKNOWN not in _ids(codes.readings[name], labels)]
    if not fitting:
        return _unfitting(codes, labels)
    chosen = fitting[0]
    for other, values in _others(codes, chosen):
        differs = other in fitting and _ids(values, labels) != _ids(codes.readings[chosen], labels)
        if differs or _varies_beside(values, codes.readings[chosen]):
            shown = " and the ".join(f"{WORDS[name]} ({_some(codes.readings[name])})" for name in (chosen, other))
            settled = f": write `masks: {chosen}` or `masks: {other}` in {labels.described_in}, whichever is right"
            raise Unusable(
                "ambiguous_mask",
                f"both the {shown} of its mask may be meant" + (settled if labels.described_in else ""),
            )
    return chosen


def _others(codes: Codes, chosen: Reading) -> list[tuple[Reading, np.ndarray]]:
    """The other readings that could matter: a number that is the same everywhere does not, beside numbers that vary."""
    varies = _distinct_count(codes.readings[chosen]) > 1
    return [
        (name, values)
        for name, values in codes.readings.items()
        if name not in (chosen, *CHANNELS) and (not varies or _distinct_count(values) > 1)
    ]


def _varies_beside(values: np.ndarray, chosen: np.ndarray) -> bool:
    """Whether values differ where the chosen ones are equal."""
    return len(set(zip(chosen.tolist(), values.tolist(), strict=True))) > _distinct_count(chosen)


def _distinct_count(values: np.ndarray) -> int:
    return len(set(values.tolist()))  # for the few codes of a mask quicker than NumPy


def _read_by(codes: Codes, reading: Reading) -> np.ndarray:
    if reading not in codes.readings:
        remedy = ": save it with its palette, or as grey numbers" if reading == "index" else ""
        raise Unusable("colour_mask", f"its mask has no {WORDS[reading]}, which `masks: {reading}` asks for{remedy}")
    return codes.readings[reading]


def _ids(values: np.ndarray, labels: Labels) -> list[int]:
    return [labels.values.get(value, UNKNOWN) for value in values.tolist()]


def _unknown(codes: Codes, values: np.ndarray, ids: list[int], labels: Labels) -> Unusable:
    names = {i: info.name for i, info in enumerate(labels.classes)} | {IGNORE: "ignored"}
    known = ", ".join(f"{spelled(value)} ({names[i]})" for value, i in list(labels.values.items())[:12])
    unknown = np.array(ids) == UNKNOWN
    pixels = int(np.isin(np.asarray(codes.pixels), codes.used[unknown]).sum())
    words = f"the mask holds label {_some(values[unknown])} in {pixels:,} pixels; the known labels are {known}"
    return Unusable("unknown_label", words)


def _unfitting(codes: Codes, labels: Labels) -> Reading:
    """The reading whose unknown values are to be named, since none fits."""
    if "colour" in codes.readings and min(labels.values) >= COLOUR:
        return "colour"
    if "index" in codes.readings or "grey" in codes.readings:
        return next(iter(codes.readings))
    colours = _some(codes.readings["colour"])
    words = f"the mask is painted in colours ({colours}), but the values of the classes are numbers"
    if labels.described_in:
        words += f": give each class its colour in {labels.described_in}, such as `road: '#804080'`"
        varying = [name for name in CHANNELS if _distinct_count(codes.readings[name]) > 1]
        channels = [name for name in varying if UNKNOWN not in _ids(codes.readings[name], labels)]
        words += f", or write `masks: {channels[0]}` if that channel holds the numbers" if channels else ""
    raise Unusable("colour_mask", words)


def _some(values: np.ndarray) -> str:
    found = np.unique(values).tolist()
    return ", ".join(map(spelled, found[:SHOWN])) + (", …" if len(found) > SHOWN else "")


def _codes(mask: Picture, image: Image.Image) -> tuple[Codes, list[str]]:
    """A mask's codes and their readings, and what was done to get them."""
    if image.mode == "P":
        used = np.flatnonzero(image.histogram())
        return Codes(image, used, {"index": used, **_readings(_palette(image, used))}), []
    if image.mode in ("1", "L"):
        image = image.convert("L") if image.mode == "1" else image
        used = np.flatnonzero(image.histogram())
        stored = np.rint(used * (min(mask.white, 255) / 255)).astype(np.int64)
        return Codes(image, used, {"index": stored, **_readings(_grey(used))}), []
    if image.mode.startswith("I"):
        used = np.unique(np.asarray(image)).astype(np.int64)
        stored = np.rint(used * (mask.white / 65535)).astype(np.int64) if mask.format == "PPM" else used
        return Codes(image, used, {"index": stored, "grey": used}), []
    if image.mode == "F":
        return _of_floats(image)
    if image.mode in ("LA", "RGB", "RGBA"):
        return _of_channels(image)
    raise Unusable("colour_mask", f"the mask holds {image.mode} pixels; it must hold one value per pixel")


def _of_floats(image: Image.Image) -> tuple[Codes, list[str]]:
    values = np.asarray(image)
    if not (
        np.isfinite(values).all() and (values == np.rint(values)).all() and 0 <= values.min() <= values.max() < 65536
    ):
        raise Unusable("colour_mask", "the mask holds numbers that are not whole numbers from 0 to 65535")
    values = values.astype(np.uint16)
    used = np.unique(values).astype(np.int64)
    return Codes(Image.fromarray(values), used, {"grey": used}), ["mask: floating-point to whole numbers"]


def _of_channels(image: Image.Image) -> tuple[Codes, list[str]]:
    """Of two to four channels of 8 bits: a code is the index of its colour among those that occur."""
    packed = np.asarray(image.convert("RGBA")).view(">u4")[..., 0].astype(np.uint32)
    colours, places = _distinct(packed)
    if len(colours) > PHOTO:
        raise Unusable("colour_mask", f"the mask holds {len(colours):,} colours, as a photo does")
    used = np.arange(len(colours))
    readings = _readings(colours.astype(">u4")[:, None].view(np.uint8).astype(np.int64))
    repairs = ["mask: alpha dropped"] if image.mode in ("LA", "RGBA") and "alpha" not in readings else []
    repairs += ["mask: RGB of equal channels to grey"] if image.mode != "LA" and "grey" in readings else []
    return Codes(Image.fromarray(places), used, readings), repairs


def _distinct(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct numbers of an array, uint32 (K,), and where among them each of its own stands, uint16."""
    # Neighbours are mostly equal, so only the first of each run is sorted.
    flat = packed.reshape(-1)
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    found, places = np.unique(flat[starts], return_inverse=True)
    lengths = np.diff(np.append(starts, len(flat)))
    return found, np.repeat(places.astype(np.uint16), lengths).reshape(packed.shape)


def _grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values, values, values, np.full_like(values, 255)], axis=1)


def _palette(image: Image.Image, used: np.ndarray) -> np.ndarray:
    """The colours of some of a palette's indices, int64 (K, 4), as Pillow shows them."""
    row = Image.new("P", (len(used), 1))
    row.putdata(used.tolist())
    row.putpalette(image.getpalette("RGBA") or [], "RGBA")
    row.info = image.info  # which may hold what of it is transparent
    return np.asarray(row.convert("RGBA"))[0].astype(np.int64)


def _readings(colours: np.ndarray) -> dict[Reading, np.ndarray]:
    """What colours, int64 (K, 4) of red, green, blue and alpha, can say."""
    red, green, blue, alpha = colours.T
    is_grey = (red == green).all() and (green == blue).all()
    found: dict[Reading, np.ndarray] = {"grey": red} if is_grey else {"red": red, "green": green, "blue": blue}
    found["colour"] = COLOUR + red * 2**16 + green * 2**8 + blue
    if (alpha != 255).any():
        found["alpha"] = alpha
    return {name: found[name] for name in get_args(Reading) if name in found}
