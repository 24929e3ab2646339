"""Losses as pure functions of logits: one ``NAME_loss`` for each line of the table `fastkd.recipe.tables.LOSSES`.

Each is called as ``loss(student_BK, labels_B, teacher_BK, **settings)`` with the settings of its line, and returns the
loss of each sample (float32 [B]); training minimises their mean. It may assume of the teacher's logits:

- They are known up to a constant per row, and may contain -inf (a masked class, which has probability 0).
- With ``labels.reshape``, the default, a row has the standard deviation of its class.
- With ``labels.topk``, softmax(· / T) has the teacher's probabilities of the k largest, and the others share the rest
  evenly. z-scores and other temperatures than T are those of these logits, not of the teacher's.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.recipe import Loss
from fastkd.recipe.tables import LOSSES

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
    log_p = F.log_softmax(_scaled(teacher_BK, temperature), dim=1)
    log_q = F.log_softmax(student_BK / temperature, dim=1)
    return gamma * hard_B + alpha * temperature**2 * _kl(log_p, log_q)


def standardised_loss(
    student_BK: Tensor,
    labels_B: Tensor,
    teacher_BK: Tensor,
    *,
    alpha: float,
    gamma: float,
    temperature: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return γ·CE + α·T²·KL(softmax(Z(teacher)/T) ‖ softmax(Z(student)/T)), Z(x) = (x − mean x) / std(x) (float32 [B]).

    Logit standardisation: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv 2403.01427,
    algorithms 1 and 2. Mean and std are those of a row; std divides by K, as in the paper. The student learns the
    relations of the teacher's logits, not their scale, so that ``labels.reshape`` only changes the rounding. The
    authors use T = 2, α = 9, γ = 0.1 for CIFAR-100.

    The authors' code divides by K − 1 and adds 1e-7 to std: its softmax at T is that of T·√(K / (K − 1)) here.

    Parameters
    ----------
    student_BK, teacher_BK : float32 tensor [B, K]
        Logits. Mean and std of both are computed over the classes that the teacher does not mask. A row whose std is
        not above the rounding of float32 is only centred.
    labels_B : int64 tensor [B]
    alpha, gamma : float
        Weights of the two terms.
    temperature : float
        T, the base temperature.
    label_smoothing : float
        Label smoothing of CE.
    """
    hard_B = F.cross_entropy(student_BK, labels_B, reduction="none", label_smoothing=label_smoothing)
    known_BK = ~torch.isneginf(teacher_BK)
    log_p = F.log_softmax(_scaled(_z_scores(teacher_BK, known_BK), temperature), dim=1)
    log_q = F.log_softmax(_z_scores(student_BK, known_BK) / temperature, dim=1)
    return gamma * hard_B + alpha * temperature**2 * _kl(log_p, log_q)


def dkd_loss(
    student_BK: Tensor,
    labels_B: Tensor,
    teacher_BK: Tensor,
    *,
    gamma: float,
    temperature: float,
    dkd_alpha: float,
    dkd_beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return γ·CE + T²·(α·TCKD + β·NCKD) of each sample (float32 [B]).

    Decoupled knowledge distillation: Zhao et al., CVPR 2022, arXiv 2203.08679. With p and q the softmax of teacher and
    student at T, and t the target class:

    - TCKD = KL([p_t, 1 − p_t] ‖ [q_t, 1 − q_t]),
    - NCKD = KL(p̂ ‖ q̂), where p̂ and q̂ are the softmax over the K − 1 other classes alone.

    KL(p ‖ q) = TCKD + (1 − p_t)·NCKD: the loss of `kd_loss` has the weight 1 − p_t in place of β. The authors use
    γ = α = 1; β = 2, 6 or 8 and T = 4 for CIFAR-100; β = 0.5 and T = 1 for ResNet-34 → ResNet-18 on ImageNet.

    The authors' code increases the weight of the teacher's terms linearly over the first epochs (20 for CIFAR-100, 1
    for ImageNet), which is not done here, and excludes the target by subtracting 1000 from its logit.

    Parameters
    ----------
    student_BK, teacher_BK : float32 tensor [B, K]
        Logits. A class that the teacher masks has probability 0. For K = 2 NCKD is 0.
    labels_B : int64 tensor [B]
    gamma : float
        Weight of CE.
    temperature : float
        T, which divides both logits.
    dkd_alpha, dkd_beta : float
        α and β.
    label_smoothing : float
        Label smoothing of CE.
    """
    hard_B = F.cross_entropy(student_BK, labels_B, reduction="none", label_smoothing=label_smoothing)
    teacher_BK, student_BK = _scaled(teacher_BK, temperature), student_BK / temperature
    tckd_B = _kl(_target_or_not(teacher_BK, labels_B), _target_or_not(student_BK, labels_B))
    log_p, log_q = (F.log_softmax(_others(z, labels_B), dim=1) for z in (teacher_BK, student_BK))
    return gamma * hard_B + temperature**2 * (dkd_alpha * tckd_B + dkd_beta * _kl(log_p, log_q))


def dist_loss(
    student_BK: Tensor,
    labels_B: Tensor,
    teacher_BK: Tensor,
    *,
    gamma: float,
    temperature: float,
    dist_beta: float,
    dist_gamma: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return γ·CE + T²·(β·(1 − ρ of the sample) + γ'·mean over classes (1 − ρ of the class)) (float32 [B]).

    DIST: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536. ρ is Pearson's
    correlation of the probabilities of teacher and student: of a sample over the K classes (L_inter), and of a class
    over the B samples (L_intra). L_intra is a property of the batch: it is the same number in the loss of each sample,
    and the mean of the result is the authors' loss. The authors use γ = 1, β = γ' = 2; T = 4 for CIFAR-100 and T = 1
    for ImageNet.

    The batch is what one call sees: a microbatch of ``train.accumulate``, and the part of one process. With these,
    L_intra is the mean of the parts' correlations, not the correlation over the whole batch, so the loss depends on
    the number of parts. A part of a single sample has ρ = 0 and no gradient in L_intra.

    As in the authors' code, and unlike in the paper, T² multiplies both terms, and 1e-8 is added to the product of the
    norms in ρ: classes whose probabilities have deviations of a norm below about 1e-4 contribute little.

    Parameters
    ----------
    student_BK, teacher_BK : float32 tensor [B, K]
        Logits. A class that the teacher masks has probability 0. Constant rows and columns have ρ = 0.
    labels_B : int64 tensor [B]
    gamma : float
        Weight of CE.
    temperature : float
        T, which divides both logits.
    dist_beta, dist_gamma : float
        β and γ'.
    label_smoothing : float
        Label smoothing of CE.
    """
    hard_B = F.cross_entropy(student_BK, labels_B, reduction="none", label_smoothing=label_smoothing)
    p_BK = F.softmax(_scaled(teacher_BK, temperature), dim=1)
    q_BK = F.softmax(student_BK / temperature, dim=1)
    inter_B = 1 - _correlation(q_BK, p_BK, dim=1)
    intra = (1 - _correlation(q_BK, p_BK, dim=0)).mean()
    return gamma * hard_B + temperature**2 * (dist_beta * inter_B + dist_gamma * intra)


def nkd_loss(
    student_BK: Tensor,
    labels_B: Tensor,
    teacher_BK: Tensor,
    *,
    alpha: float,
    gamma: float,
    temperature: float,
    nkd_gamma: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return γ·CE + α·(−p_t·log q_t − γ'·T²·Σ p̂·log q̂) of each sample (float32 [B]).

    Normalised knowledge distillation: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation",
    ICCV 2023, arXiv 2303.13005. p_t and q_t are the probabilities of the target class at temperature 1; p̂ and q̂ are
    the softmax at T over the K − 1 other classes alone. The result is a cross-entropy: it is not 0 if student and
    teacher agree. The authors use γ = α = 1; γ' = 1.5, T = 1 for ImageNet (their λ is T).

    This is the formula of the authors' code, ``mmcls/models/dis_losses/nkd.py`` in yzd-v/cls_KD.

    Parameters
    ----------
    student_BK, teacher_BK : float32 tensor [B, K]
        Logits. A class that the teacher masks has probability 0. For K = 2 the sum is 0.
    labels_B : int64 tensor [B]
    alpha, gamma : float
        Weights of the teacher's term and of CE.
    temperature : float
        T, which divides both logits in the sum.
    nkd_gamma : float
        γ'.
    label_smoothing : float
        Label smoothing of CE.
    """
    hard_B = F.cross_entropy(student_BK, labels_B, reduction="none", label_smoothing=label_smoothing)
    target_B1 = labels_B.unsqueeze(1)
    p_t_B1 = F.softmax(_scaled(teacher_BK, 1.0), dim=1).gather(1, target_B1)
    target_B = -(p_t_B1 * F.log_softmax(student_BK, dim=1).gather(1, target_B1)).squeeze(1)
    p_BJ = F.softmax(_scaled(_others(teacher_BK, labels_B), temperature), dim=1)
    others_B = -(p_BJ * F.log_softmax(_others(student_BK, labels_B) / temperature, dim=1)).sum(dim=1)
    return gamma * hard_B + alpha * (target_B + nkd_gamma * temperature**2 * others_B)


def loss_function(loss: Loss, *, has_teacher: bool) -> LossFn:
    """Return the loss of a recipe's section ``loss``; without a teacher, cross-entropy."""
    if not has_teacher:
        return partial(supervised_loss, label_smoothing=loss.label_smoothing)
    function: Callable[..., Tensor] = globals()[f"{loss.name}_loss"]
    return partial(function, **loss.model_dump(include=set(LOSSES[loss.name].settings)))


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


def reshape_logits(z_BK: Tensor, labels_B: Tensor, class_std_K: Tensor, strength: float = 1.0) -> Tensor:
    """Rescale each row of logits towards the σ of its class: z · (σ_y / std(z))^λ, with λ = `strength`.

    MDSLR has λ = 1. Constant rows are returned unchanged. Equals `fastkd.kernels.reshape_rows` up to a constant per
    row, on the device.
    """
    std_B1 = z_BK.std(dim=1, keepdim=True)
    scale_B1 = class_std_K[labels_B].unsqueeze(1) / std_B1
    if strength != 1:
        scale_B1 = scale_B1**strength
    return z_BK * torch.where(std_B1 > 0, scale_B1, torch.ones_like(scale_B1))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) of each row of log-probabilities [B, J] (float32 [B])."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def _scaled(teacher_BK: Tensor, temperature: float) -> Tensor:
    """Return logits divided by T, with finite numbers in place of -inf (float32 [B, K]).

    0 · -inf is NaN. A quarter of the smallest float can be summed without overflow; its softmax is 0.
    """
    return (teacher_BK / temperature).clamp(min=torch.finfo(teacher_BK.dtype).min / 4)


def _z_scores(z_BK: Tensor, known_BK: Tensor) -> Tensor:
    """Return (z − mean z) / std(z) of each row, with the mean and std of the known classes (float32 [B, K])."""
    count_B1 = known_BK.sum(dim=1, keepdim=True).clamp(min=1)
    inside_BK = torch.where(known_BK, z_BK, 0.0)
    centred_BK = z_BK - inside_BK.sum(dim=1, keepdim=True) / count_B1
    var_B1 = torch.where(known_BK, centred_BK, 0.0).square().sum(dim=1, keepdim=True) / count_B1
    flat_B1 = var_B1 <= (1e-6 * inside_BK.detach().abs().amax(dim=1, keepdim=True)).square()
    return centred_BK / torch.where(flat_B1, 1.0, var_B1).sqrt()  # sqrt after where: its gradient at 0 is infinite


def _others(z_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return the logits of all classes but the target, in their order (float32 [B, K − 1])."""
    position_J = torch.arange(z_BK.shape[1] - 1, device=z_BK.device)
    return z_BK.gather(1, position_J + (position_J >= labels_B.unsqueeze(1)))


def _target_or_not(z_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return the log-probabilities of the target class and of all others together (float32 [B, 2])."""
    target_B1 = z_BK.gather(1, labels_B.unsqueeze(1))
    others_B1 = _others(z_BK, labels_B).logsumexp(dim=1, keepdim=True)
    return F.log_softmax(torch.cat([target_B1, others_B1], dim=1), dim=1)


def _correlation(a_BK: Tensor, b_BK: Tensor, dim: int) -> Tensor:
    """Return Pearson's correlation along a dimension; 0 if either is constant."""
    a, b = (x - x.mean(dim=dim, keepdim=True) for x in (a_BK, b_BK))
    return (a * b).sum(dim=dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)
