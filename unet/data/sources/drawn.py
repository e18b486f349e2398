"""Pets drawn by the program: `synthetic`, or `synthetic:N` for N of them."""

from unet.data import synthetic
from unet.data.sources import Sample, Source, canonical, split_of
from unet.errors import InputError

NAME = "synthetic"
SAMPLES = 2000
TEST_SHARE = 0.2


def is_drawn(source: str) -> bool:
    return source == NAME or source.startswith(f"{NAME}:")


def count_of(source: str) -> int:
    """How many `synthetic` or `synthetic:N` means.

    Raises:
        InputError: N is not a number of at least 10.
    """
    number = source.partition(":")[2] or str(SAMPLES)
    if not number.isdecimal() or int(number) < 10:
        raise InputError(f"{source}: write synthetic:N with the number of pets to draw, at least 10.")
    return int(number)


def drawn(source: str, val_fraction: float) -> Source:
    """The drawn pets, whatever the machine: by default 1,600 of trainval and 400 of test."""
    count = count_of(source)
    trainval, samples = count - round(count * TEST_SHARE), []
    for index in range(count):
        name = f"synthetic_{index:05d}"
        split = split_of(name, "trainval" if index < trainval else "test", val_fraction)
        samples.append(Sample(name, split, synthetic.species_of(index), index=index))
    return Source(source, canonical(samples))
