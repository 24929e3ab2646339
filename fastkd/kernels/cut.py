"""Cutting drawn views from decoded images that are kept in memory."""

import numpy as np

from fastkd.kernels.jit import njit
from fastkd.kernels.views import COVER_BOTTOM, COVER_LEFT, COVER_RIGHT, COVER_TOP, DOWN, MIRRORED, RIGHT

_1, _2, _3 = np.uint64(1), np.uint64(2), np.uint64(3)


@njit(nogil=True)
def _cut(
    images_NHWC: np.ndarray, positions_B: np.ndarray, rows_BP: np.ndarray, cover_C: np.ndarray, out_BHWC: np.ndarray
) -> None:
    # Flat unsigned indices: numba checks signed ones for negative values, which takes four times as long.
    H, W = images_NHWC.shape[1], images_NHWC.shape[2]
    for b in range(len(positions_B)):
        row, source, target = rows_BP[b], images_NHWC[positions_B[b]].reshape(-1), out_BHWC[b].reshape(-1)
        down, right = int(row[DOWN]), int(row[RIGHT])
        begin, end = max(0, -right), min(W, W - right)  # columns, before mirroring, that lie within the image
        if down or right:
            target[:] = 0
        for y in range(max(0, -down), min(H, H - down) if begin < end else 0):
            s = np.uint64(3 * ((y + down) * W + begin + right))
            if row[MIRRORED]:
                t = np.uint64(3 * (y * W + W - 1 - begin))
                for _ in range(end - begin):
                    target[t], target[t + _1], target[t + _2] = source[s], source[s + _1], source[s + _2]
                    s += _3
                    t -= _3
            else:
                t = np.uint64(3 * (y * W + begin))
                for k in range(np.uint64(3 * (end - begin))):
                    target[t + k] = source[s + k]
        for y in range(row[COVER_TOP], row[COVER_BOTTOM]):
            for x in range(row[COVER_LEFT], row[COVER_RIGHT]):
                for c in range(3):
                    out_BHWC[b, y, x, c] = cover_C[c]


def cut_views(
    images_NHWC: np.ndarray, positions_B: np.ndarray, rows_BP: np.ndarray, cover_C: np.ndarray, out_BHWC: np.ndarray
) -> None:
    """Shift, mirror and cover images of the output's size, in the calling thread.

    Parameters
    ----------
    images_NHWC : uint8 [N, H, W, 3]
        Decoded images.
    positions_B : int64 [B]
        The image of each view; not checked.
    rows_BP : int32 [B, 11]
        Rows of `draw_views`. The box is ignored: it is the whole image.
    cover_C : uint8 [3]
        Colour of the covers.
    out_BHWC : uint8 [B, H, W, 3]
        Buffer for the views.
    """
    _cut(images_NHWC, positions_B, rows_BP, cover_C, out_BHWC)
