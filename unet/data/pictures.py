"""A picture's file: opened safely, and what its container says about its pixels that they alone do not show."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from unet.data.sources import SUFFIXES

# A photo of this many pixels is decoded without a warning; twice as many are refused (Pillow's own rule).
Image.MAX_IMAGE_PIXELS = 200_000_000

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation: what makes of the stored picture the displayed one."""
OPPOSITE = {6: 8, 8: 6}
"""The orientations that do not undo themselves."""
LOSSLESS = {"PNG", "GIF", "BMP", "DIB", "PPM", "TGA"}
LOSSLESS_TIFF = {1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 50000}
"""The TIFF compressions that keep values: none, three of CCITT, LZW, deflate twice, PackBits, LZMA, Zstandard."""


class Unusable(Exception):
    """A sample that cannot be used: `problem` is a short name, `detail` a description."""

    def __init__(self, problem: str, detail: str):
        super().__init__(detail)
        self.problem, self.detail = problem, detail


@dataclass(frozen=True)
class Picture:
    """A decoded file.

    Attributes:
        image: as it is stored, whatever its EXIF says.
        name: of the file.
        format: Pillow's name of it.
        frames: how many it holds; `image` is the first.
        orientation: what the EXIF says, 1 (upright) to 8.
        white: the number that is stored for white; if the decoder scales, `image` has 255 or 65535 instead.
        white_is_zero: 0 is stored for white.
        lossy: why its values may differ from those that were saved; empty if they cannot.
    """

    image: Image.Image
    name: str
    format: str
    frames: int
    orientation: int
    white: int
    white_is_zero: bool
    lossy: str

    @property
    def upright(self) -> Image.Image:
        """The picture as it is displayed."""
        return self.image.transpose(UPRIGHT[self.orientation]) if self.orientation > 1 else self.image


def file_content(path: str) -> bytes:
    return Path(path).read_bytes()


def open_picture(path: str, read: Callable[[str], bytes] = file_content) -> Picture:
    """The first frame of a file; `read` gives the bytes of `path`.

    Raises:
        Unusable: it is empty.
        Exception: whatever Pillow's decoders raise at what they cannot read.
    """
    content = read(path)
    if not content:
        raise Unusable("empty_file", f"{Path(path).name} is empty")
    image = Image.open(io.BytesIO(content), formats=_formats())
    white, white_is_zero = _white(image, content)
    turned = _orientation(image) if image.format == "TIFF" else 1  # Pillow turns it upright while it loads
    image.load()
    stored = image.transpose(UPRIGHT[OPPOSITE.get(turned, turned)]) if turned > 1 else image
    orientation = turned if image.format == "TIFF" else _orientation(image)
    kind, frames = image.format or "", getattr(image, "n_frames", 1)
    return Picture(stored, Path(path).name, kind, frames, orientation, white, white_is_zero, _lossy(image, content))


@cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of the formats that samples may have: others start programs, as EPS does Ghostscript."""
    known = Image.registered_extensions()
    return tuple(sorted({known[suffix] for suffix in SUFFIXES if suffix in known}))


def _orientation(picture: Image.Image) -> int:
    """What the EXIF says; an EXIF that cannot be read says nothing."""
    # Asking for the EXIF of each JPEG that has none would take a tenth of its decoding.
    if picture.format == "JPEG" and "exif" not in picture.info:
        return 1
    try:
        found = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever its damaged bytes lead Pillow to
        return 1
    return found if found in UPRIGHT else 1


def _white(image: ImageFile, content: bytes) -> tuple[int, bool]:
    """The number that is stored for white, and whether 0 is, before the pixels are loaded."""
    if image.format == "PNG":
        return 2 ** content[24] - 1, False
    if isinstance(image, TiffImageFile):
        bits, white_is_zero = image.tag_v2.get(258, (1,)), image.tag_v2.get(262) == 0
        return 2 ** max(bits) - 1, white_is_zero
    if image.format == "PPM" and image.mode != "F":
        scaled = image.tile[0].args
        white = scaled[1] if isinstance(scaled, tuple) else 65535 if image.mode == "I" else 255
        return (1, True) if image.mode == "1" else (white, False)
    return (1 if image.mode == "1" else 255), False


def _lossy(image: ImageFile, content: bytes) -> str:
    if image.format in LOSSLESS or (image.format == "WEBP" and b"VP8 " not in set(_chunks(content, 12))):
        return ""
    if isinstance(image, TiffImageFile):
        compression = image.tag_v2.get(259, 1)
        return "" if compression in LOSSLESS_TIFF else f"a TIFF with lossy compression ({compression})"
    return {
        "JPEG": "a JPEG",
        "MPO": "a JPEG",
        "WEBP": "a lossy WebP",
    }.get(image.format or "", f"{image.format}, which does not say whether it was saved lossily")


def _chunks(content: bytes, start: int) -> Iterator[bytes]:
    """The names of a WebP file's chunks, those inside the frames of an animation too."""
    while start + 8 <= len(content):
        name, size = content[start : start + 4], int.from_bytes(content[start + 4 : start + 8], "little")
        yield name
        # A frame's content begins after sixteen bytes with its position and duration; chunks have even lengths.
        start += 8 + (16 if name == b"ANMF" else size + size % 2)
