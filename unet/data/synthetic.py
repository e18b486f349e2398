"""Synthetic pets: pictures with exact trimaps, so the whole pipeline runs and learns without a download.

Every surface -- coat, wall, floor, cushion -- is painted by one function in colours of one distribution, so neither a
pixel's colour nor its texture gives its class away: only shape does. Masks follow the trimaps of Oxford-IIIT Pet
(https://www.robots.ox.ac.uk/~vgg/data/pets/): 0 pet, 1 background, 2 a thin band over the pet's boundary.

    image, mask = draw_pet(index=7, size=128)
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

PET, BACKGROUND, OUTLINE = 0, 1, 2

SMALLEST = 16  # px a side; the band is hardly a pixel wide there
SUPERSAMPLE = 2  # shapes are drawn this many times larger, then averaged down: smooth edges at little cost
BAND = 0.018  # half the outline's width in picture sides (2.3 px at 128), which brings its share near the real 0.11

# Pose: where the head sits, where the tail starts and heads (radians), and the limbs, far ones first, as
# (role, x0, y0, r0, x1, y1, r1): the hull of two circles. Facing right, y down, in units of half a torso.
POSES = {
    "standing": ((1.08, -0.62), (-0.95, -0.2, 3.4), (
        ("leg", -0.55, 0.1, 0.2, -0.6, 0.95, 0.08), ("leg", 0.72, 0.1, 0.2, 0.75, 0.95, 0.08),
        ("torso", -0.65, 0.0, 0.4, 0.6, 0.0, 0.45), ("chest", 0.68, 0.05, 0.26, 0.72, 0.12, 0.22),
        ("leg", -0.82, 0.1, 0.24, -0.85, 1.05, 0.09), ("leg", 0.5, 0.15, 0.2, 0.5, 1.05, 0.09),
        ("torso", 0.6, -0.1, 0.34, 0.98, -0.5, 0.28))),
    "sitting": ((0.25, -0.98), (-0.6, 0.8, 3.2), (
        ("torso", -0.35, 0.45, 0.5, 0.12, -0.45, 0.36), ("chest", 0.26, -0.35, 0.2, 0.32, 0.0, 0.18),
        ("leg", 0.38, -0.15, 0.18, 0.4, 0.9, 0.09), ("leg", 0.2, -0.1, 0.2, 0.2, 0.95, 0.09),
        ("torso", -0.4, 0.5, 0.38, -0.25, 0.6, 0.34), ("paw", -0.35, 0.92, 0.1, 0.1, 0.95, 0.1))),
    "facing": ((0.0, -0.78), (0.5, 0.85, -0.2), (
        ("torso", 0.0, -0.3, 0.36, 0.0, 0.45, 0.5), ("chest", 0.0, -0.35, 0.2, 0.0, 0.1, 0.22),
        ("torso", -0.42, 0.55, 0.3, -0.44, 0.7, 0.28), ("torso", 0.42, 0.55, 0.3, 0.44, 0.7, 0.28),
        ("paw", -0.6, 0.95, 0.1, -0.42, 0.97, 0.1), ("paw", 0.42, 0.97, 0.1, 0.6, 0.95, 0.1),
        ("leg", -0.19, 0.0, 0.2, -0.2, 0.98, 0.1), ("leg", 0.19, 0.0, 0.2, 0.2, 0.98, 0.1))),
    "lying": ((0.88, -0.4), (-1.15, 0.25, 3.1), (
        ("torso", -0.8, 0.05, 0.4, 0.55, 0.0, 0.42), ("chest", 0.66, 0.0, 0.28, 0.72, 0.12, 0.24),
        ("torso", -0.85, 0.12, 0.36, -0.7, 0.14, 0.34), ("paw", -0.7, 0.42, 0.1, -0.25, 0.44, 0.09),
        ("paw", 0.55, 0.3, 0.13, 1.3, 0.36, 0.1), ("paw", 0.5, 0.4, 0.13, 1.15, 0.44, 0.1))),
    "curled": ((0.78, 0.2), (-0.7, 0.5, -0.5), (
        ("torso", -0.4, 0.0, 0.62, 0.35, 0.05, 0.58), ("torso", -0.55, 0.15, 0.45, -0.35, 0.2, 0.4),
        ("paw", 0.2, 0.55, 0.1, 0.6, 0.55, 0.1))),
    "portrait": ((0.0, 0.0), None, (
        ("torso", 0.0, 0.12, 0.3, 0.05, 1.3, 0.62), ("chest", 0.02, 0.34, 0.14, 0.05, 1.3, 0.3))),
}  # fmt: skip
MARKINGS = ("", "", "muzzle chest paw", "muzzle chest paw tail", "ear muzzle paw tail", "ear head", "muzzle chest")
IRISES = ((0.75, 0.7, 0.25), (0.45, 0.65, 0.35), (0.4, 0.6, 0.8), (0.7, 0.45, 0.15))
DARK, PINK, WHITE = (0.1, 0.08, 0.08), (0.78, 0.5, 0.48), (0.95, 0.95, 0.95)


class BodyPart(NamedTuple):
    """One filled polygon. Its role decides whether the coat is marked there; a colour makes it an eye or a nose."""

    role: str
    points: np.ndarray  # (n, 2) float, x and y
    colour: tuple[float, float, float] | None = None  # RGB 0-1; None wears the coat


def species_of(index: int, seed: int = 0) -> str:
    """Return "cat" or "dog", whichever `draw_pet` draws for this index and seed."""
    return _species(_generator(index, seed))


def draw_pet(index: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw picture `index` of the endless set `seed`; the same arguments always give the same picture.

    Returns the RGB image, uint8 (size, size, 3), and its mask, uint8 (size, size) of PET, BACKGROUND and OUTLINE, all
    three present. Every size shows the same scene; below SMALLEST is a ValueError, as is a negative index or seed.
    """
    if size < SMALLEST:
        raise ValueError(f"A synthetic pet needs a size of at least {SMALLEST} pixels to show its outline, not {size}.")
    rng = _generator(index, seed)
    species = _species(rng)
    pet = _place(rng, *_animal(rng, species))
    while not _balanced(_trimap(pet, SMALLEST)):  # judged at one size, so that every size shows the same scene
        pet = _place(rng, *_animal(rng, species))
    coat, scene = _colours(rng)
    light = rng.uniform(-0.12, 0.12, 2)
    image = _background(rng, size, scene, light)
    image *= 1 - _shadow(rng, pet, size)
    return _photograph(rng, _paint(rng, image, pet, coat, light)), _trimap(pet, size)


def _generator(index: int, seed: int) -> np.random.Generator:
    # default_rng may change its bit generator between numpy releases, so this one is named.
    return np.random.Generator(np.random.PCG64((seed, index)))


def _species(rng) -> str:
    return "cat" if rng.random() < 0.5 else "dog"  # stays the first draw, the only one species_of repeats


def _balanced(mask) -> bool:
    pet, background = np.mean(mask == PET), np.mean(mask == BACKGROUND)
    return 0.03 < pet < 0.75 and background > 0.1 and pet + background < 1


# --- shapes ---------------------------------------------------------------------------------------------------------


def _oval(x, y, rx, ry, corner=1.0) -> np.ndarray:
    """A superellipse: corner 1 is an ellipse, towards 0 it becomes a box."""
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    unit = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.sign(unit) * np.abs(unit) ** corner * (rx, ry) + (x, y)


def _limb(x0, y0, r0, x1, y1, r1) -> np.ndarray:
    """The hull of two circles: a torso, a leg, or with a small r1 a pointed ear."""
    distance = np.hypot(x1 - x0, y1 - y0)
    if distance <= abs(r0 - r1):
        return _oval(x0, y0, r0, r0) if r0 > r1 else _oval(x1, y1, r1, r1)
    along, tangent = np.arctan2(y1 - y0, x1 - x0), np.arccos((r0 - r1) / distance)
    far = along + np.linspace(-tangent, tangent, 12)
    near = along + np.linspace(tangent, 2 * np.pi - tangent, 12)
    x = np.concatenate([x1 + r1 * np.cos(far), x0 + r0 * np.cos(near)])
    y = np.concatenate([y1 + r1 * np.sin(far), y0 + r0 * np.sin(near)])
    return np.stack([x, y], axis=1)


def _turn(parts, angle=0.0, scale=1.0, shift=0.0) -> list[BodyPart]:
    """Scale, rotate by angle (radians), then shift."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return [part._replace(points=part.points * scale @ turn + shift) for part in parts]


def _tail(rng, cat, x, y, heading) -> list[BodyPart]:
    length, r0, r1 = (rng.uniform(0.9, 1.5), 0.12, 0.09) if cat else (rng.uniform(0.4, 1.1), 0.14, 0.05)
    turns = heading + rng.uniform(-0.4, 0.9) + rng.uniform(-0.6, 0.6) * np.arange(5)
    steps = np.stack([length / 5 * np.cos(turns), length / 5 * np.sin(turns), np.full(5, (r1 - r0) / 5)], axis=1)
    joints = np.cumsum([(x, y, r0), *steps], axis=0)
    return [BodyPart("tail", _limb(*start, *end)) for start, end in pairwise(joints)]


def _leg(rng, x0, y0, r0, x1, y1, r1) -> list[BodyPart]:
    knee = (x0 + x1) / 2 + rng.normal(0, 0.05), (y0 + y1) / 2 + 0.05, r1 * 1.2
    thigh, shin = _limb(x0, y0, r0, *knee), _limb(*knee, x1, y1, r1 * 0.9)
    return [BodyPart("leg", thigh), BodyPart("leg", shin), BodyPart("paw", _oval(x1 + r1 * 0.4, y1, r1 * 1.4, r1))]


def _animal(rng, species) -> tuple[list[BodyPart], list[BodyPart]]:
    """A whole animal of random pose and build, far parts first, and the parts a photographer would frame."""
    pose = rng.choice(list(POSES), p=(0.2, 0.17, 0.17, 0.16, 0.1, 0.2))
    place, tail, limbs = POSES[pose]
    cat, girth = species == "cat", rng.uniform(0.75, 1.2)
    body = _tail(rng, cat, *tail) if tail else []
    for role, *limb in limbs:
        x0, y0, r0, x1, y1, r1 = limb + rng.uniform(-0.05, 0.05, 6)
        if role == "leg":
            body += _leg(rng, x0, y0, r0, x1, y1, max(r1, 0.07))
        else:
            body.append(BodyPart(role, _limb(x0, y0, r0 * girth, x1, y1, r1 * girth)))
    # Only what hangs below the back grows with leg length, so the head stays on its neck.
    tall = rng.uniform(0.75, 1.1 if cat else 1.35)
    body = [part._replace(points=part.points * np.where(part.points > 0, (1, tall), 1)) for part in body]
    head = _head(rng, cat, yaw=rng.uniform(-0.7, 0.9), asleep=pose == "curled")
    head = _turn(head, rng.uniform(-0.3, 0.3), rng.uniform(0.34, 0.46), place + rng.normal(0, 0.05, 2))
    return body + head, head if pose == "portrait" else body + head


def _head(rng, cat, yaw, asleep) -> list[BodyPart]:
    """A head of radius 1 at the origin; yaw runs from -1 (nearly in profile) over 0 (at the camera) to 1."""
    snout = rng.uniform(0.05, 0.25) if cat else rng.uniform(0.25, 0.8)
    floppy, tip, spread = not cat and rng.random() < 0.65, rng.uniform(1.25, 1.6), rng.uniform(0.05, 0.3)
    iris, wide = (IRISES[rng.integers(len(IRISES))], 0.17) if cat else (DARK, 0.13)
    ears, eyes = [], []
    for side in (-1, 1):
        root, eye = side * 0.6 - yaw * 0.15, side * 0.42 + yaw * 0.4
        if floppy:
            ears.append(BodyPart("ear", _limb(root * 1.2, -0.5, 0.24, root + side * 0.4, tip - 1, 0.3)))
        else:
            ears.append(BodyPart("ear", _limb(root, -0.5, 0.4, root + side * spread, -tip, 0.05)))
            ears.append(BodyPart("ear", _limb(root, -0.6, 0.2, root + side * spread, -tip * 0.86, 0.03), PINK))
        lid = BodyPart("eye", _oval(eye, -0.1, wide, 0.04), DARK)
        ball = BodyPart("eye", _oval(eye, -0.12, wide, wide * 0.9), iris)
        pupil = BodyPart("eye", _oval(eye, -0.12, 0.06, wide * 0.8), DARK)
        glint = BodyPart("eye", _oval(eye + 0.05, -0.18, 0.035, 0.035), WHITE)
        if abs(eye) < 0.75:  # beyond, it is round the far side
            eyes += [lid] if asleep else [ball, pupil, glint]
    x, y = yaw * (0.45 + snout), 0.28 + 0.2 * snout
    skull = BodyPart("head", _oval(0, 0, 1, 0.88 if cat else 1))
    muzzle = BodyPart("muzzle", _limb(yaw * 0.4, 0.35, 0.36, x, y + 0.12, 0.28 if cat else 0.36))
    nose = BodyPart("nose", _oval(x, y, *(0.12, 0.09) if cat else (0.17, 0.12)), PINK if cat else DARK)
    mouth = BodyPart("mouth", _limb(x, y + 0.1, 0.025, x, y + 0.28, 0.025), DARK)
    tongue = [BodyPart("mouth", _oval(x, y + 0.42, 0.13, 0.2), PINK)] if not cat and rng.random() < 0.3 else []
    return [*([skull, muzzle, *ears] if floppy else [*ears, skull, muzzle]), *eyes, nose, mouth, *tongue]


def _place(rng, parts, framed) -> list[BodyPart]:
    """Mirror, squash, rotate and scale the animal into the unit picture, sometimes partly out of it."""
    points = np.concatenate([part.points for part in framed])
    low, high = points.min(axis=0), points.max(axis=0)
    extent = 0.25 + 0.9 * rng.beta(4, 1.2)
    room = max(1 - extent, 0) / 2 + 0.06
    squash = rng.choice((-1, 1)) * rng.uniform(0.8, 1.1), 1
    parts = _turn(parts, shift=-(low + high) / 2)
    parts = _turn(parts, scale=extent / (high - low).max() * np.array(squash))
    return _turn(parts, rng.normal(0, 0.12), shift=rng.uniform(0.5 - room, 0.5 + room, 2))


# --- masks and shading ----------------------------------------------------------------------------------------------


def _draw(shapes, size, mode="L") -> Image.Image:
    """Fill (points, colour) shapes one over the other."""
    image = Image.new(mode, (size * SUPERSAMPLE, size * SUPERSAMPLE))
    draw = ImageDraw.Draw(image)
    for points, fill in shapes:
        draw.polygon((points * (size * SUPERSAMPLE)).ravel().tolist(), fill=fill)
    return image.reduce(SUPERSAMPLE)


def _silhouette(parts, size) -> Image.Image:
    return _draw([(part.points, 255) for part in parts], size)


def _unit(image, blur=0.0) -> np.ndarray:
    """A blurred (Gaussian, standard deviation in pixels) 8-bit channel as float32 (size, size) in 0-1."""
    return np.asarray(image.filter(ImageFilter.GaussianBlur(blur)) if blur else image, np.float32) / 255


def _trimap(parts, size) -> np.ndarray:
    """Cut the blurred silhouette one standard deviation inside and outside its edge."""
    shape = _silhouette(parts, size).point(lambda value: 255 * (value > 127))
    soft = _unit(shape, blur=max(BAND * size, 0.6))
    mask = np.full((size, size), OUTLINE, np.uint8)
    # A 3x3 erosion keeps pet and background apart even where the blur spans less than a pixel.
    mask[(soft > 0.84) & (np.asarray(shape.filter(ImageFilter.MinFilter(3))) > 0)] = PET
    mask[(soft < 0.16) & (np.asarray(shape) == 0)] = BACKGROUND
    return mask


def _shadow(rng, parts, size) -> np.ndarray:
    moved = _turn(parts, shift=rng.uniform((-0.06, 0), (0.06, 0.05)))
    return _unit(_silhouette(moved, size), blur=size * rng.uniform(0.02, 0.06)) * rng.uniform(0.1, 0.5)


def _paint(rng, image, parts, colours, light) -> np.ndarray:
    """Lay parts over the image, in a coat of three colours rounded by the light; float32 RGB (3, size, size)."""
    size = image.shape[-1]
    furry = [part for part in parts if not part.colour]
    tones = []
    for part in furry:
        # A smaller, brighter copy pushed towards the light turns, once blurred, into a rounded body.
        middle, level = part.points.mean(axis=0), int(rng.integers(120, 137))
        inner = middle + (part.points - middle) * 0.72 + light * np.ptp(part.points, axis=0)
        tones += [(part.points, level - 26), (inner, level + 16)]
    coat = _coat(rng, size, *colours[:2])
    marked = MARKINGS[rng.integers(len(MARKINGS))].split()
    marks = [(part.points, 255 * (part.role in marked)) for part in furry]
    if any(fill for _, fill in marks):
        coat += (_coat(rng, size, *colours[1:]) - coat) * _unit(_draw(marks, size), blur=size * 0.012)
    coat *= 2 * _unit(_draw(tones, size), blur=size * 0.016)
    image = image + (coat - image) * _unit(_silhouette(furry, size))
    details = [(part.points, (*(int(255 * c) for c in part.colour), 230)) for part in parts if part.colour]
    if details:
        *paint, cover = map(_unit, _draw(details, size, "RGBA").split())
        image += (np.stack(paint) - image) * cover
    return image


# --- surfaces -------------------------------------------------------------------------------------------------------


def _noise(rng, size, bumps) -> np.ndarray:
    """Smooth noise in 0-1, float32 (size, size), about `bumps` across."""
    grid = Image.fromarray(rng.random((int(bumps) + 4,) * 2, np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC, box=(1.5, 1.5, 1.5 + bumps, 1.5 + bumps)))


def _strands(rng, size) -> np.ndarray:
    """Fine noise drawn out in one direction, like hair, grass or grain: float32 (size, size) in 0-1."""
    across, angle = rng.uniform(30, 80), rng.uniform(0, np.pi)
    along = across / rng.uniform(1, 6)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * [[along], [across]]
    affine = np.column_stack([turn / size, 64 - turn.sum(axis=1) / 2]).ravel()  # picture centre to grid centre
    grid = Image.fromarray(rng.random((128, 128), np.float32))
    return np.asarray(grid.transform((size, size), Image.Transform.AFFINE, affine.tolist(), Image.Resampling.BILINEAR))


def _coat(rng, size, first, second) -> np.ndarray:
    """Any surface: two colours mixed by a pattern, roughened by strands and clouds; float32 RGB (3, size, size)."""
    pattern = rng.choice(("plain", "stripes", "blotches"))
    mix = 0.4 * _noise(rng, size, rng.uniform(2, 5))
    if pattern == "blotches":
        edge, level = rng.uniform(3, 10), rng.uniform(0.5, 0.65)
        mix = np.clip((_noise(rng, size, np.exp(rng.uniform(1, 3))) - level) * edge + 0.5 * mix, 0, 1)
    elif pattern == "stripes":  # from one slow wave, which is a gradient, to a tabby's
        angle, waves, edge = rng.uniform(0, np.pi), np.exp(rng.uniform(-1, 2.6)), rng.uniform(0.4, 0.9)
        axis = np.arange(size, dtype=np.float32) * np.float32(2 * np.pi * waves / size)
        slope = axis * np.float32(np.cos(angle)) + (axis * np.float32(np.sin(angle)))[:, None]
        mix = np.clip(0.5 + edge * np.sin(slope + 12 * mix), 0, 1)
    rough = 1 + rng.uniform(0.1, 0.5) * (_strands(rng, size) - 0.5)
    rough += rng.uniform(0.1, 0.4) * (_noise(rng, size, rng.uniform(5, 14)) - 0.5)
    return (first + (second - first) * mix) * rough


def _colours(rng) -> tuple[np.ndarray, np.ndarray]:
    """Three coat and eight scene colours, float32 RGB (n, 3, 1, 1), redrawn until animal and scene tell apart."""
    while True:
        warm = rng.uniform((0.95, 0.66, 0.4), (1.1, 0.84, 0.8), (11, 3))
        tinted = np.where(rng.random((11, 1)) < 0.7, warm, rng.uniform(0.78, 1.05, (11, 3)))
        colours = (tinted * rng.uniform(0.12, 0.95, (11, 1))).astype(np.float32)
        coat, scene = colours[:3], colours[3:]
        if np.abs(coat[0] - scene).mean(axis=1).min() > 0.06 and abs(coat[0].mean() - scene[:2].mean()) > 0.15:
            return coat[..., None, None], scene[..., None, None]


def _background(rng, size, colours, light) -> np.ndarray:
    """Wall and floor, then things of no pet's shape in the same coats; float32 RGB (3, size, size)."""
    image = _coat(rng, size, *colours[:2])
    if rng.random() < 0.7:
        level, slope = rng.uniform(0.3, 0.85), rng.normal(0, 0.08)
        floor = np.array([[-1, level - slope], [2, level + slope], [2, 3], [-1, 3]])
        image = _paint(rng, image, [BodyPart("floor", floor)], colours[1:4], light)
    for index in range(rng.integers(4)):
        x, y = rng.uniform(0, 1, 2)
        lean, fall = rng.normal(0, (0.3, 0.8))
        wide, high = rng.uniform(0.06, 0.3, 2)
        cushion = _oval(x, y, wide, high, corner=rng.choice((1.0, 0.5, 0.15)))
        post = _limb(x, y, 0.06, x + lean, y + fall, 0.04)
        thing = post if rng.random() < 0.25 else cushion
        image = _paint(rng, image, [BodyPart("thing", thing)], colours[3 + index :][:3], light)
    return image


def _photograph(rng, image) -> np.ndarray:
    """Uneven light, tint, vignette, lens blur and sensor noise; returns uint8 (size, size, 3)."""
    size = image.shape[-1]
    axis = np.arange(size, dtype=np.float32) / size - 0.5
    bowl = rng.uniform(0, 0.6) * axis**2
    across, down = (rng.uniform(-0.4, 0.4) * axis - bowl for _ in range(2))
    gain = rng.uniform(0.75, 1.25) * rng.normal(1, 0.05, (3, 1, 1)).astype(np.float32)
    image = image * ((1 + across + down[:, None]) * gain)
    sharp = Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0).copy())
    soft = sharp.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.001, 0.005)))
    # Sensor noise lives in pixels, so it comes last: every draw before it is the same at every size.
    noise = rng.standard_normal((size, size, 3), np.float32) * rng.uniform(1, 7)
    return np.clip(np.asarray(soft) + noise, 0, 255).astype(np.uint8)
