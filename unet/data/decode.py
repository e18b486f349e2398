"""A sample's files as pixels at the network's size, mended where that is safe, refused where it is not.

Decoding is here and nowhere else, so that every source gives the same pixels for the same bytes.
"""

import errno
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from unet.classes import IGNORE, UNKNOWN, Labels
from unet.config import Resize
from unet.data import synthetic
from unet.data.resize import ignore_padding, to_square
from unet.data.sources import Sample
from unet.data.sources.own import SUFFIXES
from unet.errors import first_line

NEAREST, BILINEAR = Image.Resampling.NEAREST, Image.Resampling.BILINEAR
# A photo of this many pixels is decoded without a warning; twice as many are refused (Pillow's own rule).
Image.MAX_IMAGE_PIXELS = 200_000_000


class Unusable(Exception):
    """A sample that cannot be used: `problem` is a short name, `detail` says it in words."""

    def __init__(self, problem: str, detail: str):
        super().__init__(detail)
        self.problem, self.detail = problem, detail


@dataclass(frozen=True)
class Decoded:
    """A sample at the network's size.

    Attributes:
        image: uint8 (S, S, 3).
        mask: uint8 (S, S) class ids and `IGNORE`.
        height, width: of the photo, in pixels.
        repairs: what was mended.
        original_mask: PNG of the class ids at the photo's own size, if asked for.
    """

    image: np.ndarray
    mask: np.ndarray
    height: int
    width: int
    repairs: tuple[str, ...] = ()
    original_mask: bytes = b""


def load(sample: Sample, labels: Labels, size: int, resize: Resize, original_mask: bool = False) -> Decoded:
    """Decode and resize a sample: the photo antialiased (Pillow's bilinear), the mask by nearest neighbour.

    Raises:
        Unusable: with the reason.
    """
    if sample.index >= 0:
        image, ids = synthetic.draw_pet(sample.index, size)
        return Decoded(image, ids, size, size, (), _png(ids) if original_mask else b"")
    mask, mask_repairs = _read(_mask, sample.mask)
    photo, repairs = _read(_photo, sample.image, mask.size)
    if photo.size != mask.size:
        raise Unusable("size_mismatch", f"the mask is {_by(mask.size)}, its photo {_by(photo.size)}")
    _check_labels(mask, labels)
    # Looked up after resizing: there are fewer pixels then.
    ids = np.take(labels.table, to_square(mask, size, resize, NEAREST, fill=0))
    if resize == "letterbox":
        ids = ignore_padding(ids, mask.height, mask.width)
    kept = _png(np.take(labels.table, np.asarray(mask))) if original_mask else b""
    image = to_square(photo, size, resize, BILINEAR, fill=0)
    return Decoded(image, ids, photo.height, photo.width, (*repairs, *mask_repairs), kept)


def photo(name: str, read: Callable[[str], bytes]) -> Image.Image:
    """A photo as it is displayed, in RGB, decoded as those of training are; `read` gives the bytes of `name`.

    Raises:
        Unusable: with the reason.
    """
    return _read(_photo, name, None, read)[0]


def _read(read: Callable, path: str, *more):
    """What `read` makes of a file, or why it cannot be used."""
    name = Path(path).name
    try:
        return read(path, *more)
    except (Unusable, MemoryError):
        raise
    except PermissionError as error:
        raise Unusable("no_permission", f"{name} may not be read: {error.strerror}") from error
    except UnidentifiedImageError as error:  # its own words are of a buffer in memory
        raise Unusable("damaged", f"{name} cannot be decoded: it is no picture of a known kind") from error
    except Image.DecompressionBombError as error:
        raise Unusable("too_large", f"{name}: {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever their damaged input leads them to
        what = error.strerror if isinstance(error, OSError) and error.errno in errno.errorcode else first_line(error)
        raise Unusable("damaged", f"{name} cannot be decoded: {what}") from error


def _content(path: str) -> bytes:
    return Path(path).read_bytes()


def _photo(
    path: str, mask_size: tuple[int, int] | None, read: Callable[[str], bytes] = _content
) -> tuple[Image.Image, list[str]]:
    """An RGB photo, and what was done to make it one."""
    photo = _open(path, read)
    repairs = []
    suffix = path.rpartition(".")[2].lower()
    if Image.registered_extensions().get(f".{suffix}") not in (photo.format, None):
        repairs.append(f"{photo.format} named .{suffix}")
    if getattr(photo, "n_frames", 1) > 1:
        repairs.append(f"first of {photo.n_frames} frames")
    if is_turned(photo):
        upright = ImageOps.exif_transpose(photo)
        # A mask drawn over the stored pixels says so by its size.
        if upright.size == mask_size or photo.size != mask_size:
            repairs.append("turned upright as its EXIF says")
            photo = upright
        else:
            repairs.append("EXIF rotation not applied: the mask lies over the stored pixels")
    if photo.mode == "RGB":
        return photo, repairs
    if photo.mode in ("F", "I") or photo.mode.startswith("I;16"):
        photo, repair = _eight_bits(photo)
        return photo.convert("RGB"), [*repairs, repair]
    repairs.append(_MODES.get(photo.mode, f"{photo.mode} to RGB"))
    if photo.mode == "P" and "transparency" in photo.info:
        photo = photo.convert("RGBA")  # else Pillow warns about the transparency it drops
    return photo.convert("RGB"), repairs


_MODES = {
    **{"L": "grey to RGB", "1": "grey to RGB", "P": "palette to RGB"},
    **{"RGBA": "alpha dropped", "PA": "alpha dropped", "LA": "grey to RGB, alpha dropped"},
}


def is_turned(picture: Image.Image) -> bool:
    """Whether the EXIF says that the picture is to be turned or mirrored; an EXIF that cannot be read says nothing."""
    # Asking for the EXIF of each JPEG that has none would take a tenth of its decoding.
    if picture.format == "JPEG" and "exif" not in picture.info:
        return False
    try:
        return picture.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # whatever its damaged bytes lead Pillow to
        return False


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


def _mask(path: str) -> tuple[Image.Image, list[str]]:
    """A mask of one band, whose pixels are values (of a palette: the indices)."""
    mask, repairs = _open(path), []
    if mask.format in ("JPEG", "MPO"):
        raise Unusable("lossy_mask", f"{Path(path).name} is a JPEG, which changes values: save masks as PNG")
    if is_turned(mask):
        mask, repairs = ImageOps.exif_transpose(mask), ["mask: turned upright as its EXIF says"]
    if mask.mode in ("L", "P", "I;16", "I"):
        return mask, repairs
    if mask.mode == "1":
        return mask.convert("L").point(lambda value: value and 1), repairs
    if mask.mode == "LA":
        return mask.getchannel("L"), [*repairs, "mask: alpha dropped"]
    if mask.mode in ("RGB", "RGBA"):
        bands = [np.asarray(mask.getchannel(band)) for band in "RGB"]
        if all(np.array_equal(bands[0], band) for band in bands[1:]):
            return mask.getchannel("R"), [*repairs, "mask: RGB of equal channels to grey"]
    raise Unusable("colour_mask", f"the mask holds {mask.mode} pixels; it must hold one value a pixel")


def _check_labels(mask: Image.Image, labels: Labels) -> None:
    if mask.mode in ("L", "P"):
        values = [value for value, pixels in enumerate(mask.histogram()) if pixels]
    else:
        values = np.unique(np.asarray(mask)).tolist()
    ids = [labels.values.get(value, UNKNOWN) for value in values]
    if UNKNOWN in ids:
        unknown = [value for value, i in zip(values, ids, strict=True) if i == UNKNOWN]
        names = {i: info.name for i, info in enumerate(labels.classes)} | {IGNORE: "ignored"}
        known = ", ".join(f"{value} ({names[i]})" for value, i in list(labels.values.items())[:12])
        pixels = int(np.isin(np.asarray(mask), unknown).sum())
        shown = ", ".join(map(str, unknown[:5]))
        raise Unusable("unknown_label", f"the mask holds label {shown} in {pixels:,} pixels; known are {known}")
    if set(ids) == {IGNORE}:
        raise Unusable("nothing_labelled", "every pixel of the mask is ignored")


def _open(path: str, read: Callable[[str], bytes] = _content) -> Image.Image:
    content = read(path)
    if not content:
        raise Unusable("empty_file", f"{Path(path).name} is empty")
    image = Image.open(io.BytesIO(content), formats=_formats())
    image.load()
    return image


@cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of the kinds that samples may be of: others start programs, as EPS does Ghostscript."""
    known = Image.registered_extensions()
    return tuple(sorted({known[suffix] for suffix in SUFFIXES if suffix in known}))


def _png(ids: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(ids).save(content, "PNG")
    return content.getvalue()


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
