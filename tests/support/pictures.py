"""What a picture shows, read from its pixels: a test that only looks for a file passes on a blank one."""

import numpy as np
from matplotlib.colors import to_rgb


def count_colour(picture: np.ndarray, colour: str, tolerance: float = 0.02) -> np.ndarray:
    """(height, width) booleans, true for the pixels of that colour.

    Args:
        picture: (height, width, 3 or 4), from matplotlib.image.imread.
    """
    return (np.abs(picture[..., :3] - to_rgb(colour)) < tolerance).all(-1)


def coloured_share(picture: np.ndarray) -> float:
    """Share of the pixels that are neither grey, nor black, nor white."""
    return float((np.ptp(picture[..., :3], axis=-1) > 0.1).mean())
