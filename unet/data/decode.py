"""A sample's files as pixels at the network's size, repaired where that is safe, refused where it is not.

Decoding is here and nowhere else, so that every source gives the same pixels for the same bytes.
"""

import errno
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from unet.classes import Labels
from unet.config import Resize
from unet.data import synthetic
from unet.data.masks import check_storage, understand
from unet.data.pictures import Picture, Unusable, open_picture
from unet.data.resize import ignore_padding, to_square
from unet.data.sources import Sample
from unet.errors import first_line

NEAREST, BILINEAR = Image.Resampling.NEAREST, Image.Resampling.BILINEAR
ASKED = ("ambiguous_mask", "ambiguous_orientation")
"""The problems that a line in `dataset.yaml` solves for all samples."""


@dataclass(frozen=True)
class Decoded:
    """A sample at the network's size.

    Attributes:
        image: uint8 (S, S, 3).
        mask: uint8 (S, S) class ids and `IGNORE`.
        height, width: of the photo, in pixels.
        present: the ids of the classes in the mask at the photo's own size.
        reading: how the mask was read, where another way would have given other values.
        repairs: what was repaired.
        original_mask: PNG of the class ids at the photo's own size, if asked for.
    """

    image: np.ndarray
    mask: np.ndarray
    height: int
    width: int
    present: tuple[int, ...] = ()
    reading: str = ""
    repairs: tuple[str, ...] = ()
    original_mask: bytes = b""


def load(sample: Sample, labels: Labels, size: int, resize: Resize, original_mask: bool = False) -> Decoded:
    """Decode and resize a sample: the photo antialiased (Pillow's bilinear), the mask by nearest neighbour.

    Raises:
        Unusable: with the reason.
    """
    if sample.index >= 0:
        image, ids = synthetic.draw_pet(sample.index, size)
        drawn = tuple(np.unique(ids).tolist())
        return Decoded(image, ids, size, size, drawn, original_mask=_png(ids) if original_mask else b"")
    mask_file = _read(open_picture, sample.mask)
    check_storage(mask_file)
    photo_file = _read(open_picture, sample.image)
    photo, stored_mask, turned = _aligned(photo_file, mask_file, labels)
    if photo.size != stored_mask.size:
        raise Unusable("size_mismatch", f"the mask is {_by(stored_mask.size)}, its photo {_by(photo.size)}")
    mask = _read(understand, sample.mask, mask_file, stored_mask, labels)
    photo, repairs = _read(_in_rgb, sample.image, photo)
    # Looked up after resizing: there are fewer pixels then.
    ids = np.take(mask.table, to_square(mask.pixels, size, resize, NEAREST, fill=0))
    if resize == "letterbox":
        ids = ignore_padding(ids, stored_mask.height, stored_mask.width)
    kept = _png(np.take(mask.table, np.asarray(mask.pixels))) if original_mask else b""
    image = to_square(photo, size, resize, BILINEAR, fill=0)
    repairs = (*_named_otherwise(photo_file), *turned, *repairs, *mask.repairs)
    return Decoded(image, ids, photo.height, photo.width, mask.present, mask.reading, repairs, kept)


def photo(name: str, read: Callable[[str], bytes]) -> Image.Image:
    """A photo as it is displayed, in RGB, decoded as those of training are; `read` gives the bytes of `name`.

    Raises:
        Unusable: with the reason.
    """
    picture = _read(open_picture, name, name, read)
    return _read(_in_rgb, name, picture.upright)[0]


def _read(read: Callable, path: str, *arguments):
    """What `read` makes of a file (without arguments: of its path), or why the file cannot be used."""
    name = Path(path).name
    try:
        return read(*(arguments or (path,)))
    except (Unusable, MemoryError):
        raise
    except PermissionError as error:
        raise Unusable("no_permission", f"{name} cannot be read: {error.strerror}") from error
    except UnidentifiedImageError as error:  # its own message names a buffer in memory
        raise Unusable("damaged", f"{name} cannot be decoded: it is not a picture of a known format") from error
    except Image.DecompressionBombError as error:
        raise Unusable("too_large", f"{name}: {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever their damaged input leads them to
        what = error.strerror if isinstance(error, OSError) and error.errno in errno.errorcode else first_line(error)
        raise Unusable("damaged", f"{name} cannot be decoded: {what}") from error


def _aligned(photo: Picture, mask: Picture, labels: Labels) -> tuple[Image.Image, Image.Image, list[str]]:
    """Photo and mask turned so that they lie over each other, as far as that can be known, and what was done.

    Masks are drawn over the photo as it is displayed or, by programs that know no EXIF, as it is stored.
    """
    if photo.orientation == mask.orientation == 1:
        return photo.image, mask.image, []
    applied = photo.upright, mask.upright
    over_stored = photo.image.size == mask.image.size
    if photo.orientation != mask.orientation and over_stored:
        over_displayed = applied[0].size == applied[1].size
        if over_displayed and labels.exif_orientation is None:
            raise _orientation_asked(photo, mask, labels)
        if not over_displayed or labels.exif_orientation == "ignored":
            return photo.image, mask.image, ["EXIF rotation not applied: the mask lies over the stored pixels"]
    words = "turned upright as its EXIF says"
    turned = [words] * (photo.orientation > 1) + [f"mask: {words}"] * (mask.orientation > 1)
    return *applied, turned


def _orientation_asked(photo: Picture, mask: Picture, labels: Labels) -> Unusable:
    turned = photo if photo.orientation > 1 else mask
    words = (
        f"{turned.name} has to be turned, as its EXIF says (orientation {turned.orientation}), and the sizes do not "
        "show whether the mask lies over the photo as displayed or as stored"
    )
    if labels.described_in:
        words += f": write `exif_orientation: applied` (displayed) or `ignored` (stored) in {labels.described_in}"
    return Unusable("ambiguous_orientation", words)


def _named_otherwise(photo: Picture) -> list[str]:
    """What is odd about a photo's file."""
    suffix = photo.name.rpartition(".")[2].lower()
    named = Image.registered_extensions().get(f".{suffix}") not in (photo.format, None)
    found = [f"{photo.format} named .{suffix}"] if named else []
    return found + ([f"first of {photo.frames} frames"] if photo.frames > 1 else [])


def _in_rgb(photo: Image.Image) -> tuple[Image.Image, list[str]]:
    """A photo in RGB, and what was done to make it so."""
    if photo.mode == "RGB":
        return photo, []
    if photo.mode in ("F", "I") or photo.mode.startswith("I;16"):
        photo, repair = _eight_bits(photo)
        return photo.convert("RGB"), [repair]
    repair = _MODES.get(photo.mode, f"{photo.mode} to RGB")
    if photo.mode == "P" and "transparency" in photo.info:
        photo = photo.convert("RGBA")  # else Pillow warns about the transparency it drops
    return photo.convert("RGB"), [repair]


_MODES = {
    **{"L": "grey to RGB", "1": "grey to RGB", "P": "palette to RGB"},
    **{"RGBA": "alpha dropped", "PA": "alpha dropped", "LA": "grey to RGB, alpha dropped"},
}


def _eight_bits(photo: Image.Image) -> tuple[Image.Image, str]:
    """A grey photo of more than 8 bits as one of 8, and the words for it."""
    values = np.asarray(photo)
    if photo.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise Unusable(
            "unsupported_depth", f"the photo holds {photo.mode} pixels from {values.min()} to {values.max()}"
        )
    if values.max() < 256:
        return Image.fromarray(values.astype(np.uint8)), "16-bit grey that holds 8 bits to RGB"
    return Image.fromarray((values >> 8).astype(np.uint8)), "16-bit grey to RGB"


def _png(ids: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(ids).save(content, "PNG")
    return content.getvalue()


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
