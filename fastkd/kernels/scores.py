"""Scores of samples from the teacher's logits: two passes over each row in vectorised float32.

LLVM vectorises a loop only if its sums and maxima may be reordered. Fastmath flags allow that for sums of floats, but
numba does not set them for maxima; these are taken of integers with the same order. `exp` is a polynomial, since a call
into the C library prevents vectorisation. numba has no float16 on CPUs; it is converted to float32 with bit operations.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from fastkd.kernels.jit import njit
from fastkd.kernels.threads import run_in_threads

BLOCK_COLUMNS = 1024
"""Number of columns that are summed in float32. Their sums are added in float64, which bounds the error for large K."""

_FAST = {"reassoc", "contract", "nsz", "nnan"}
_ONE, _ZERO = np.float32(1), np.float32(0)
_FLOOR = np.float32(-87)  # exp of smaller values is not a normal float32; it is replaced by 1.6e-38
_LOG2_E, _LN_2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
_TO_INTEGER = np.float32(1.5 * 2**23)  # added to a small number, it leaves the nearest integer in the lowest bits
# exp(r) = 1 + r·(…) for |r| ≤ ln 2 / 2, by least relative error (Lawson's iteration): 1e-7
_EXP_1, _EXP_2, _EXP_3 = np.float32(0.9999997), np.float32(0.4999915), np.float32(0.16667636)
_EXP_4, _EXP_5 = np.float32(0.041897975), np.float32(0.0082903066)
_HALF_BIAS = np.float32(2.0**112)  # between the exponents of float16 and float32
_STD_FROM, _STD_TO, _MEAN_TO = 1e-15, 1e15, 1e3  # range in which float32 gives the std of a row to 1e-6


class Scores(NamedTuple):
    """Scores of each sample; p is the softmax of its logits.

    Attributes
    ----------
    cross_entropy : float32 [N]
        logsumexp(z) − z[y], the difficulty of MDSLR (§3.1).
    entropy : float32 [N]
        −Σ p·log p.
    margin : float32 [N]
        p[y] − the largest other p.
    least_confidence : float32 [N]
        1 − the largest p.
    el2n : float32 [N]
        ‖p − onehot(y)‖₂ (Paul et al., NeurIPS 2021), of a single teacher.
    std : float64 [N]
        Standard deviation of the logits with Bessel's correction, as torch.std; 0 only for constant rows.
    correct : bool [N]
        Whether the first largest logit belongs to the label.
    finite : bool [N]
        Whether all logits are finite. Otherwise the scores are NaN and `correct` is False.
    """

    cross_entropy: np.ndarray
    entropy: np.ndarray
    margin: np.ndarray
    least_confidence: np.ndarray
    el2n: np.ndarray
    std: np.ndarray
    correct: np.ndarray
    finite: np.ndarray


@njit(fastmath={"contract"})  # reassoc would undo the rounding to an integer
def _exp(x: np.float32) -> np.float32:
    """Return exp(x) for −87 ≤ x ≤ 0, exactly 1 at 0."""
    shifted = np.float32(x * _LOG2_E + _TO_INTEGER)
    r = x - (shifted - _TO_INTEGER) * _LN_2
    power = np.float32(_ONE + r * (_EXP_1 + r * (_EXP_2 + r * (_EXP_3 + r * (_EXP_4 + r * _EXP_5)))))
    # Shift the integer to the exponent bits.
    return np.int32(power.view(np.int32) + (shifted.view(np.int32) << np.int32(23))).view(np.float32)


@njit()
def _half(word: np.int16) -> np.float32:
    """Convert the bits of a float16. Inf and NaN become ±65536 and beyond, outside of the range of finite values."""
    return np.int32((np.int32(word) << np.int32(13)) & np.int32(-0x70000001)).view(np.float32) * _HALF_BIAS


@njit()
def _single(word: np.int32) -> np.float32:
    return np.int32(word).view(np.float32)


@njit()
def _sortable(word: np.int32, magnitude: np.int32) -> np.int32:
    """Convert the bits of a float to an integer with the same order, and back."""
    return np.int32(word ^ ((word >> np.int32(31)) & magnitude))


@njit(fastmath=_FAST)
def _load_half(word_K: np.ndarray, z_K: np.ndarray) -> tuple:
    """Unpack a row; return its maximum, minimum and sum, and whether it is finite."""
    magnitude, infinite = np.int32(0x7FFF), np.int32(0x7C00)
    high, low, total = np.int32(-magnitude - 1), magnitude, _ZERO
    for k in range(len(word_K)):
        word = np.int32(word_K[k])
        key = _sortable(word, magnitude)
        high = key if key > high else high
        low = key if key < low else low
        z_K[k] = _half(word)
        total += z_K[k]
    finite = high < infinite and low >= -infinite
    return _half(_sortable(high, magnitude)), _half(_sortable(low, magnitude)), total, finite


@njit(fastmath=_FAST)
def _load_single(word_K: np.ndarray, z_K: np.ndarray) -> tuple:
    """Unpack a float32 row, as `_load_half` does."""
    magnitude, infinite = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
    high, low, total = np.int32(-magnitude - 1), magnitude, _ZERO
    for k in range(len(word_K)):
        word = np.int32(word_K[k])
        key = _sortable(word, magnitude)
        high = key if key > high else high
        low = key if key < low else low
        z_K[k] = _single(word)
        total += z_K[k]
    finite = high < infinite and low >= -infinite
    return _single(_sortable(high, magnitude)), _single(_sortable(low, magnitude)), total, finite


@njit(fastmath=_FAST)
def _sums(z_k: np.ndarray, top: np.float32, mean: np.float32) -> tuple:
    """Return the sums over a block of columns.

    With d = z − top and e = exp(d): the number of d = 0; Σe, Σe², −Σe·d and the largest e of the others; Σ(z − mean)²
    of all. The top is excluded to preserve the precision of the others in confident rows.
    """
    tops, largest = np.int32(0), np.int32(0)
    rest, squared, weighted, spread = _ZERO, _ZERO, _ZERO, _ZERO
    for k in range(len(z_k)):
        z = z_k[k]
        spread += (z - mean) * (z - mean)
        d = z - top
        floored = d if d > _FLOOR else _FLOOR
        power = _exp(floored)
        e = power if d < _ZERO else _ZERO
        tops = np.int32(tops + np.int32(d == _ZERO))
        rest += e
        squared += e * e
        weighted -= e * floored
        bits = np.float32(e).view(np.int32)  # floats ≥ 0 sort like their bits
        largest = bits if bits > largest else largest
    return tops, rest, squared, weighted, np.int32(largest).view(np.float32), spread


@njit()
def _std_in_float64(z_K: np.ndarray) -> float:
    K, total, squares = len(z_K), 0.0, 0.0
    for k in range(K):
        total += z_K[k] / K
    for k in range(K):
        squares += (z_K[k] - total) ** 2
    return np.sqrt(squares / (K - 1))


@njit()
def _first_of(z_K: np.ndarray, y: int) -> bool:
    """Return whether no earlier value equals the one at y."""
    for k in range(y):  # noqa: SIM110
        if z_K[k] == z_K[y]:
            return False
    return True


@njit(nogil=True)
def _score(
    word_NK: np.ndarray,
    y_N: np.ndarray,
    ce_N: np.ndarray,
    entropy_N: np.ndarray,
    margin_N: np.ndarray,
    doubt_N: np.ndarray,
    el2n_N: np.ndarray,
    std_N: np.ndarray,
    correct_N: np.ndarray,
    finite_N: np.ndarray,
    start: int,
    stop: int,
) -> None:
    K = word_NK.shape[1]
    z_K = np.empty(K, np.float32)
    for i in range(start, stop):
        top, bottom, total, finite = (
            _load_half(word_NK[i], z_K) if word_NK.itemsize == 2 else _load_single(word_NK[i], z_K)
        )
        finite_N[i] = finite
        if not finite:
            ce_N[i] = entropy_N[i] = margin_N[i] = doubt_N[i] = el2n_N[i] = std_N[i] = np.nan
            correct_N[i] = False
            continue
        mean = np.float32(total / K)
        tops, rest, squared, weighted, second, spread = 0, 0.0, 0.0, 0.0, 0.0, 0.0
        for k in range(0, K, BLOCK_COLUMNS):
            part = _sums(z_K[k : k + BLOCK_COLUMNS], top, mean)
            tops += part[0]
            rest += part[1]
            squared += part[2]
            weighted += part[3]
            second = max(second, np.float64(part[4]))
            spread += part[5]
        if tops > 1:  # all but one of them belong to the rest
            rest += tops - 1
            squared += tops - 1
            second = 1.0
        whole = 1.0 + rest  # Σexp(z − top)
        log_whole = np.log1p(rest)
        d = np.float64(z_K[y_N[i]]) - np.float64(top)
        ce_N[i] = log_whole - d
        entropy_N[i] = log_whole + weighted / whole
        doubt_N[i] = rest / whole
        if d == 0.0:
            margin_N[i] = (1.0 - second) / whole
            el2n_N[i] = np.sqrt(rest * rest + squared) / whole
            correct_N[i] = tops == 1 or _first_of(z_K, y_N[i])
        else:
            label = np.exp(d)
            margin_N[i] = (label - 1.0) / whole
            el2n_N[i] = np.sqrt((whole - label) ** 2 + max(1.0 + squared - label * label, 0.0)) / whole
            correct_N[i] = False
        std = np.sqrt(spread / (K - 1))
        # The float32 mean has a relative error of about 1e-7, and std one of half its square over std.
        if not (_STD_FROM < std < _STD_TO and abs(np.float64(mean)) < _MEAN_TO * std):
            std = 0.0 if top == bottom else _std_in_float64(z_K)
        std_N[i] = std


def score_logits(z_NK: np.ndarray, y_N: np.ndarray) -> Scores:
    """Score every sample in one pass over the logits, without a copy of them.

    Parameters
    ----------
    z_NK : float32 or float16 [N, K]
        Logits, K ≥ 2; may be a memory map.
    y_N : integer [N]
        Labels in 0 … K−1.

    Returns
    -------
    Scores
        Each within 1e-5·max(1, |x|) of the float64 value, also for logits of ±1e4. The small scores of confident rows
        keep their relative precision.

    Raises
    ------
    ValueError
        Another dtype, K < 2, or invalid labels.

    Notes
    -----
    A row is summed by one thread, in an order given by K and the layout of the array. The result does not depend on the
    number of threads or on other rows.
    """
    z_NK, y_N = np.asarray(z_NK), np.asarray(y_N)
    if z_NK.ndim != 2 or z_NK.dtype not in (np.float16, np.float32):
        raise ValueError(f"expected float16 or float32 logits [N, K], got {z_NK.dtype} {list(z_NK.shape)}")
    N, K = z_NK.shape
    if K < 2:
        raise ValueError(f"scores need at least 2 classes, got {K}")
    if y_N.shape != (N,) or y_N.dtype.kind not in "iu" or (N and not (y_N.min() >= 0 and y_N.max() < K)):
        raise ValueError(f"expected {N} labels in 0 … {K - 1}")
    word_NK = z_NK.view(np.int16 if z_NK.dtype == np.float16 else np.int32)
    word_NK.flags.writeable = False  # one compilation for writable and read-only arrays
    ce_N, entropy_N, margin_N, doubt_N, el2n_N = (np.empty(N, np.float32) for _ in range(5))
    found = Scores(
        ce_N,
        entropy_N,
        margin_N,
        doubt_N,
        el2n_N,
        np.empty(N, np.float64),
        np.empty(N, np.bool_),
        np.empty(N, np.bool_),
    )
    kernel = partial(_score, word_NK, np.ascontiguousarray(y_N, np.int64), *found)
    run_in_threads(kernel, N, work=K)
    return found
