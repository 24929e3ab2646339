import io

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def jpeg():
    """Make the bytes of a JPEG file of noise."""

    def make(height=20, width=30, mode="RGB", seed=0, **save) -> bytes:
        shape = (height, width) if mode == "L" else (height, width, len(mode))
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels, mode).save(stream, "JPEG", **save) if mode == "CMYK" else Image.fromarray(pixels).save(
            stream, "JPEG", **save
        )
        return stream.getvalue()

    return make
