"""What an evaluation knows of each image: a row of `per_image.parquet`, from which every score and picture follows.

Counts are exact integers, so sums over any images, in any order, are exact too.
"""

import pyarrow as pa


def record_schema(classes: int) -> pa.Schema:
    """The columns for C classes.

    name, split, breed, species: of the sample; breed and species are "" where they are not known.
    height, width: of the photo before it was resized, in pixels.
    confusion: int64 C*C counts at the network's size, row-major, row = truth, column = predicted.
    confusion_band: the same within a few pixels of the border between two classes of the truth.
    confusion_own: the same at the photo's own size; null where the masks of that size were not kept.
    loss_sum: cross-entropy summed over the valid pixels.
    doubt: how surely the model disagrees with the mask: the mean over the valid pixels of the likeliest class'
        probability minus that of the true class (0-1).
    predicted: PNG bytes (8 bit, class ids) of the prediction at the network's size; 255 in a letterbox' padding.
    """
    counts = pa.list_(pa.int64(), classes * classes)
    return pa.schema(
        [
            ("name", pa.string()),
            ("split", pa.string()),
            ("breed", pa.string()),
            ("species", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("confusion", counts),
            ("confusion_band", counts),
            ("confusion_own", counts),
            ("loss_sum", pa.float64()),
            ("doubt", pa.float64()),
            ("predicted", pa.binary()),
        ]
    )
