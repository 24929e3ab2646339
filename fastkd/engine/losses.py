"""Losses as pure functions of logits, listed in `LOSSES`."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.errors import InputError
from fastkd.recipe import Loss

LossFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``loss(student_logits_BK, labels_B, teacher_logits_BK) -> loss_B``, the loss of each sample."""


def kd_loss(
    student_BK: Tensor,
    labels_B: Tensor,
    teacher_BK: Tensor,
    *,
    alpha: float,
    gamma: float,
    temperature: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return γ·CE + α·T²·KL(softmax(teacher/T) ‖ softmax(student/T)) of each sample (float32 [B]).

    Hinton, Vinyals & Dean, arXiv 1503.02531; weights as in MDSLR (ICLR 2025).

    Parameters
    ----------
    student_BK, teacher_BK : float32 tensor [B, K]
        Logits. Those of the teacher may be off by a constant per row. A class that the teacher masks with -inf has
        probability 0 and does not contribute.
    labels_B : int64 tensor [B]
    alpha, gamma : float
        Weights of the two terms.
    temperature : float
        T, which divides both logits.
    label_smoothing : float
        Label smoothing of CE.

    Examples
    --------
    >>> import torch
    >>> student, teacher = torch.zeros(2, 3), torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> kd_loss(student, torch.tensor([0, 1]), teacher, alpha=1.0, gamma=0.0, temperature=4.0)
    tensor([1.9726, 0.0000])
    """
    hard_B = F.cross_entropy(student_BK, labels_B, reduction="none", label_smoothing=label_smoothing)
    # 0 · -inf is NaN. A quarter of the smallest float can be divided and summed without overflow.
    teacher_BK = teacher_BK.clamp(min=torch.finfo(teacher_BK.dtype).min / 4)
    log_p = F.log_softmax(teacher_BK / temperature, dim=1)
    log_q = F.log_softmax(student_BK / temperature, dim=1)
    soft_B = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
    return gamma * hard_B + alpha * temperature**2 * soft_B


LOSSES: dict[str, Callable[..., Tensor]] = {"kd": kd_loss}
"""Losses with a teacher, by their name in recipes (``loss.name``).

Each is called as ``loss(student_BK, labels_B, teacher_BK, alpha=, gamma=, temperature=, label_smoothing=)``, may
ignore any of these settings, and returns the loss of each sample (float32 [B]). The teacher's logits are known up to a
constant per row, and may contain -inf (a masked class). With ``labels.reshape``, the default, they have the standard
deviation of their class.
"""


def loss_function(loss: Loss, *, has_teacher: bool) -> LossFn:
    """Return the loss of a recipe's section ``loss``; without a teacher, cross-entropy.

    Raises
    ------
    InputError
        `LOSSES` has no loss of this name.
    """
    if loss.name not in LOSSES:
        raise InputError(f"loss.name={loss.name!r}: unknown loss; known: {', '.join(LOSSES)}")
    if not has_teacher:
        return partial(supervised_loss, label_smoothing=loss.label_smoothing)
    settings = loss.model_dump(include={"alpha", "gamma", "temperature", "label_smoothing"})
    return partial(LOSSES[loss.name], **settings)


def supervised_loss(
    student_BK: Tensor, labels_B: Tensor, teacher_BK: Tensor | None, *, label_smoothing: float = 0.0
) -> Tensor:
    """Return the cross-entropy of each sample (float32 [B]), without a teacher."""
    return F.cross_entropy(student_BK, labels_B, reduction="none", label_smoothing=label_smoothing)


def stored_logits(stored: Sequence[Tensor], num_classes: int, temperature: float) -> Tensor:
    """Decode stored rows to teacher logits, up to a constant per row (float32 [B, K]).

    Parameters
    ----------
    stored : (logits_BK,) or (indices_Bk, logits_Bk, tail_B1)
        All logits; or the k largest logits, their classes, and the total probability of the other classes (the tail),
        which is distributed uniformly over them as in FKD (Shen & Xing, ECCV 2022).
    temperature : float
        T at which the tail was computed: softmax(· / T) of the result has this probability outside of the k classes.
    """
    if len(stored) == 1:
        return stored[0].float()
    indices_Bk, logits_Bk, tail_B1 = stored
    others = max(num_classes - indices_Bk.shape[1], 1)
    tail_B1 = tail_B1.float().clamp(1e-30, 1.0)
    log_p_Bk = F.log_softmax(logits_Bk.float() / temperature, dim=1) + torch.log1p(-tail_B1)
    log_p_BK = (tail_B1 / others).log().expand(-1, num_classes)
    return temperature * log_p_BK.scatter(1, indices_Bk.to(torch.int64), log_p_Bk)


def reshape_logits(z_BK: Tensor, labels_B: Tensor, class_std_K: Tensor) -> Tensor:
    """Rescale each row of logits to the σ of its class: z / std(z) · σ_y (MDSLR). Constant rows are returned unchanged.

    Equals `fastkd.kernels.reshape_rows` up to a constant per row, on the device.
    """
    std_B1 = z_BK.std(dim=1, keepdim=True)
    scale_B1 = class_std_K[labels_B].unsqueeze(1) / std_B1
    return z_BK * torch.where(std_B1 > 0, scale_B1, torch.ones_like(scale_B1))
