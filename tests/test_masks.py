"""A mask's classes do not depend on how it is stored: each form is read rightly, or refused with what settles it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from unet.data.decode import load
from unet.data.masks import understand
from unet.data.pictures import Unusable, open_picture
from unet.data.sources import Sample
from unet.data.sources.description import Description

IDS = np.kron(np.random.default_rng(3).integers(0, 3, (6, 8)), np.ones((8, 8), int)).astype(np.uint8)
"""Class ids 0, 1 and 2 in blocks of 8 pixels, 48 high and 64 wide."""
TWO = np.where(IDS == 2, 2, 0).astype(np.uint8)
BITS = np.where(IDS == 2, 1, 0).astype(np.uint8)


def png(rows: np.ndarray, depth: int, kind: int = 0) -> bytes:
    """A PNG of numbers as they are stored, of depths and kinds that Pillow does not write."""
    stored = rows.astype(">u2").view(np.uint8) if depth == 16 else np.packbits(_bits(rows, depth), axis=1)
    width = rows.shape[1] if kind == 0 else rows.shape[1] // {2: 3, 4: 2}[kind]
    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in stored))
    parts = ((b"IHDR", header), (b"IDAT", lines), (b"IEND", b""))
    written = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def _bits(rows: np.ndarray, depth: int) -> np.ndarray:
    return np.unpackbits(rows[..., None], axis=2)[..., 8 - depth :].reshape(len(rows), -1)


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def palette(places: np.ndarray, *colours: tuple[int, int, int], **options) -> bytes:
    image = Image.fromarray(places)
    image.putpalette([channel for colour in colours for channel in colour])
    return saved(image, **options)


def grey(value: int) -> tuple[int, int, int]:
    return value, value, value


def channels(*bands: np.ndarray | int) -> bytes:
    full = [np.full_like(IDS, band) if isinstance(band, int) else band for band in bands]
    return saved(Image.fromarray(np.stack(full, axis=2)))


def read(folder, content: bytes, description: dict, photo: bytes = b"", name: str = "mask.png") -> np.ndarray:
    """The ids that a mask is read as, at its own size."""
    width, height = Image.open(io.BytesIO(content)).size
    (folder / name).write_bytes(content)
    (folder / "photo.png").write_bytes(photo or saved(Image.new("RGB", (width, height))))
    sample = Sample("a", "train", "", str(folder / "photo.png"), str(folder / name))
    labels = Description(**description).labels("dataset.yaml")
    decoded = load(sample, labels, 64, "stretch", original_mask=True)
    return np.asarray(Image.open(io.BytesIO(decoded.original_mask)))


THREE = {"classes": {"a": 0, "b": 1, "c": 2}}
BINARY = {"classes": {"other": 0, "object": 255}}
PAINTED = {"classes": {"a": "#000000", "b": "#800000", "c": "#008000"}}
COLOURS = ((0, 0, 0), (128, 0, 0), (0, 128, 0))
RED_AND_GREEN = np.array(COLOURS, np.uint8)[IDS]

READ = {
    "grey": (saved(Image.fromarray(IDS)), THREE, IDS),
    "16 bits": (saved(Image.fromarray(IDS.astype(np.uint16))), THREE, IDS),
    "floats": (saved(Image.fromarray(IDS.astype(np.float32)), "TIFF"), THREE, IDS),
    "coloured palette": (palette(IDS, *COLOURS), THREE, IDS),
    "grey palette in order": (palette(IDS, grey(0), grey(1), grey(2)), THREE, IDS),
    "palette, grey values fit": (palette(BITS, grey(0), grey(2)), {"classes": {"a": 0, "b": 2}}, BITS),
    "palette, indices fit": (palette(BITS, grey(0), grey(2)), {"classes": {"a": 0, "b": 1}}, BITS),
    "palette, said to be grey": (palette(BITS, grey(0), grey(2)), THREE | {"masks": "grey"}, TWO),
    "palette, said to be indices": (palette(BITS, grey(0), grey(2)), THREE | {"masks": "index"}, BITS),
    "palette of one colour only": (palette(IDS, *[(0, 0, 0)] * 3), THREE, IDS),
    "2 bits, stored numbers": (png(IDS, 2), THREE, IDS),
    "2 bits, grey values": (png(IDS, 2), {"classes": {"a": 0, "b": 85, "c": 170}}, IDS),
    "4 bits, stored numbers": (png(IDS, 4), THREE, IDS),
    "1 bit, stored numbers": (png(BITS, 1), {"classes": {"a": 0, "b": 1}}, BITS),
    "1 bit, grey values": (png(BITS, 1), BINARY, BITS),
    "PGM of four greys": (b"P5\n64 48\n3\n" + IDS.tobytes(), THREE, IDS),
    "PGM of a thousand": (b"P5\n64 48\n999\n" + IDS.astype(">u2").tobytes(), THREE, IDS),
    "opaque": (channels(255 * BITS, 255 * BITS, 255 * BITS, 255), BINARY, BITS),
    "opaque and black": (channels(0, 0, 0, 255), BINARY, 0 * BITS),
    "transparent where 0": (channels(IDS, IDS, IDS, 255 * (IDS > 0).astype(np.uint8)), THREE, IDS),
    "said to be alpha": (channels(255, 255, 255, 255 * BITS), BINARY | {"masks": "alpha"}, BITS),
    "said to be grey beside alpha": (channels(IDS, 255 * BITS[::-1]), THREE | {"masks": "grey"}, IDS),
    "only alpha fits": (channels(77 * BITS, 255 * BITS), BINARY, BITS),
    "said to be red": (channels(IDS, 0, 0, 255), THREE | {"masks": "red"}, IDS),
    "painted": (saved(Image.fromarray(RED_AND_GREEN)), PAINTED, IDS),
    "painted through a palette": (palette(2 - IDS, *COLOURS[::-1]), PAINTED, IDS),
}


@pytest.mark.parametrize("form", READ)
def test_ids_come_through_every_form(tmp_path, form):
    content, description, expected = READ[form]
    assert np.array_equal(read(tmp_path, content, description), expected)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("palette, grey values fit", ["mask: read by its grey values, not by its palette indices or stored numbers"]),
        ("1 bit, stored numbers", ["mask: read by its palette indices or stored numbers, not by its grey values"]),
        ("only alpha fits", ["mask: read by its alpha channel, not by its grey values"]),
        ("opaque", ["mask: alpha dropped", "mask: RGB of equal channels to grey"]),
        ("grey", []),
        ("coloured palette", []),
        ("painted", []),
        ("painted through a palette", []),
        ("said to be red", ["mask: alpha dropped"]),
    ],
)
def test_what_could_have_been_read_otherwise_is_said(tmp_path, form, said):
    content, description, _ = READ[form]
    (tmp_path / "mask.png").write_bytes(content)
    mask = open_picture(str(tmp_path / "mask.png"))
    assert list(understand(mask, mask.image, Description(**description).labels("")).repairs) == said


ASKED = "write `masks: {}` or `masks: {}` in dataset.yaml, whichever is right"
REFUSED = {
    "palette index or grey value": (palette(BITS, grey(0), grey(2)), THREE, ASKED.format("index", "grey")),
    "one colour of a palette": (palette(0 * BITS, grey(2)), THREE, ASKED.format("index", "grey")),
    "a bit or white": (png(BITS, 1), THREE | {"ignore": 255}, ASKED.format("index", "grey")),
    "object in alpha": (channels(255, 255, 255, 255 * BITS), BINARY, ASKED.format("grey", "alpha")),
    "alpha the other way round": (channels(255 - 255 * BITS, 255 * BITS), BINARY, ASKED.format("grey", "alpha")),
    "something else in alpha": (channels(IDS, 255 * BITS[::-1]), THREE, ASKED.format("grey", "alpha")),
    "cut out by alpha": (channels(90 * BITS, 40, IDS, 255 * BITS), BINARY, ASKED.format("alpha", "colour")),
    "numbers in red": (channels(IDS, 0, 0), THREE, r"or write `masks: red` if that channel holds the numbers"),
    "numbers in red and others": (
        channels(IDS, 7, 9 * BITS),
        THREE,
        "painted in colours .* give each class its colour",
    ),
    "unknown colour": (
        channels(IDS, 0, 0),
        PAINTED,
        "label #010000, #020000 in .* the known labels are #000000 .a., #800000",
    ),
    "said to be alpha, and has none": (channels(IDS, IDS, IDS), THREE | {"masks": "alpha"}, "has no alpha channel"),
    "said to be indices, which are unknown": (
        palette(IDS + 3, *COLOURS * 2),
        THREE | {"masks": "index"},
        "label 3, 4, 5 in",
    ),
    "unknown number": (
        saved(Image.fromarray(IDS + 1)),
        THREE,
        "label 3 in .* the known labels are 0 .a., 1 .b., 2 .c.",
    ),
    "fractions": (saved(Image.fromarray(IDS * np.float32(0.5)), "TIFF"), THREE, "not whole numbers"),
    "16 bits in several channels": (png(np.repeat(IDS, 2, axis=1), 16, 4), THREE, "not of 8 bits"),
    "white is 0 in a PBM": (b"P4\n64 48\n" + np.packbits(BITS, axis=1).tobytes(), BINARY, "stores 0 for white"),
    "white is 0 in a TIFF": (
        saved(Image.fromarray(255 - IDS), "TIFF", tiffinfo={262: 0}),
        THREE,
        "stores 0 for white",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_can_be_meant_in_two_ways_is_asked(tmp_path, form):
    content, description, words = REFUSED[form]
    with pytest.raises(Unusable, match=words) as error:
        read(tmp_path, content, description)
    assert "\n" not in str(error.value)


EXIF = Image.Exif()
EXIF[0x0131] = "some program"
LOSSY = {
    "JPEG": ("JPEG", {"quality": 100, "subsampling": 0}),
    "WebP": ("WEBP", {}),
    "WebP with EXIF": ("WEBP", {"exif": EXIF}),
    "animated WebP": ("WEBP", {"save_all": True, "append_images": [Image.new("L", (64, 48), 200)]}),
    "JPEG in TIFF": ("TIFF", {"compression": "jpeg"}),
    "JPEG 2000": ("JPEG2000", {"irreversible": True, "quality_layers": [30]}),
    "JPEG 2000 that leaves layers out": ("JPEG2000", {"irreversible": False, "quality_layers": [30]}),
    "AVIF": ("AVIF", {"quality": 90}),
}
LOSSLESS = {
    "WebP": ("WEBP", {"lossless": True}),
    "WebP with EXIF": ("WEBP", {"lossless": True, "exif": EXIF}),
    **{f"TIFF, {kind}": ("TIFF", {"compression": kind}) for kind in ("tiff_lzw", "tiff_deflate", "packbits", "zstd")},
    **{format: (format, {}) for format in ("TIFF", "PNG", "BMP", "GIF", "TGA", "PPM")},
}


@pytest.mark.parametrize("form", LOSSY)
def test_lossy_masks_are_refused_whatever_the_container(tmp_path, form):
    format, options = LOSSY[form]
    with pytest.raises(Unusable, match="save masks as PNG") as error:
        read(tmp_path, saved(Image.fromarray(TWO), format, **options), THREE)
    assert error.value.problem == "lossy_mask"


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_masks_are_read(tmp_path, form):
    format, options = LOSSLESS[form]
    content = saved(Image.fromarray(TWO), format, **options)
    assert np.array_equal(read(tmp_path, content, THREE | {"masks": "grey"}), TWO)  # GIF makes a palette of them


@pytest.mark.parametrize(("format", "options"), [("TIFF", {}), ("PNG", {}), ("GIF", {}), ("WEBP", {"lossless": True})])
def test_masks_of_several_pictures_are_refused(tmp_path, format, options):
    """Such as a TIFF with a class a page: of all but the first nothing would be seen."""
    pages = {"save_all": True, "append_images": [Image.new("L", (64, 48), 200)]}
    with pytest.raises(Unusable, match="holds 2 pictures") as error:
        read(tmp_path, saved(Image.fromarray(TWO), format, **pages, **options), THREE)
    assert error.value.problem == "several_frames"


STORED_AS = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
"""By EXIF orientation: Pillow's way from the displayed picture to the stored one."""


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("side", [48, 64])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("over", ["displayed", "stored"])
def test_masks_lie_over_their_photos_whatever_the_exif_says(tmp_path, over, orientation, side, format):
    """Photos 64 wide, and 48 or 64 high: sizes tell only where the turned picture has another shape."""
    displayed = Image.fromarray(np.where(np.indices((side, 64)).sum(0) < 50, 2, 0).astype(np.uint8))
    turn = STORED_AS[orientation]
    stored = displayed if turn is None else displayed.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = saved(stored.point(lambda value: 100 * value).convert("RGB"), format, exif=exif)
    (tmp_path / "photo.png").write_bytes(photo)
    (tmp_path / "mask.png").write_bytes(saved(displayed if over == "displayed" else stored))
    sample = Sample("a", "train", "", str(tmp_path / "photo.png"), str(tmp_path / "mask.png"))

    def aligned(**more) -> bool:
        decoded = load(sample, Description(**THREE, **more).labels("dataset.yaml"), 64, "stretch")
        return ((decoded.image[..., 0] > 100) == (decoded.mask == 2)).mean() > 0.95

    sizes_tell = orientation >= 5 and side != 64
    if orientation > 1 and not sizes_tell:
        with pytest.raises(Unusable, match=r"write `exif_orientation: applied` .* or `ignored` .* in dataset.yaml"):
            aligned()
    else:
        assert aligned()
    assert aligned(exif_orientation={"displayed": "applied", "stored": "ignored"}[over])
