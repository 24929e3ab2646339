"""Conversion of float16 with bit operations: numba has no float16 on CPUs, and LLVM vectorises these."""

import numpy as np

from fastkd.kernels.jit import njit

_HALF_BIAS = np.float32(2.0**112)  # between the exponents of float16 and float32
_NORMAL = np.int32((127 - 14) << 23)  # bits of 2^-14, the smallest normal float16, as float32
_TO_SUBNORMAL = np.float32(0.5)  # its last bit is 2^-24, the smallest float16: adding it rounds to a multiple of that
_REBIAS = np.int32((127 - 15) << 23)
_HALF_BITS = np.int32(0x3F000000)  # of 0.5


@njit()
def from_half(word: np.int16) -> np.float32:
    """Convert the bits of a float16. Inf and NaN become ±65536 and beyond, outside of the range of finite values."""
    return np.int32((np.int32(word) << np.int32(13)) & np.int32(-0x70000001)).view(np.float32) * _HALF_BIAS


@njit()
def to_half(z: np.float32) -> np.int16:
    """Round a finite float32 of at most 65504 to the nearest float16, ties to even; return its bits."""
    bits = np.float32(z).view(np.int32)
    magnitude = np.int32(bits & np.int32(0x7FFFFFFF))
    odd = np.int32((magnitude >> np.int32(13)) & np.int32(1))
    normal = np.int32((magnitude - _REBIAS + np.int32(0xFFF) + odd) >> np.int32(13))
    small = np.int32(magnitude).view(np.float32) + _TO_SUBNORMAL
    subnormal = np.int32(np.float32(small).view(np.int32) - _HALF_BITS)
    word = normal if magnitude >= _NORMAL else subnormal
    return np.int16(word | ((bits >> np.int32(16)) & np.int32(-0x8000)))
