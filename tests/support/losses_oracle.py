"""The losses written from the papers' equations in NumPy, float64, one sample at a time. They share no code."""

import numpy as np


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def cross_entropy(z, y, smoothing):
    target = np.full(len(z), smoothing / len(z))
    target[y] += 1 - smoothing
    return -(target * np.log(softmax(z))).sum()


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def kd(s_BK, y_B, t_BK, *, alpha, gamma, temperature, label_smoothing):
    T = temperature
    return [
        gamma * cross_entropy(s, y, label_smoothing) + alpha * T**2 * kl(softmax(t / T), softmax(s / T))
        for s, y, t in zip(s_BK, y_B, t_BK, strict=True)
    ]


def standardised(s_BK, y_B, t_BK, *, alpha, gamma, temperature, label_smoothing):
    """Sun et al. 2024, algorithm 1: σ = sqrt(1/K Σ (x − x̄)²); algorithm 2: λ_CE·CE + λ_KD·τ²·KL."""
    losses = []
    for s, y, t in zip(s_BK, y_B, t_BK, strict=True):
        known = np.isfinite(t)
        z_s, z_t = (
            (x - x[known].mean()) / np.sqrt(((x[known] - x[known].mean()) ** 2).sum() / known.sum()) for x in (s, t)
        )
        soft = kl(softmax(z_t / temperature), softmax(z_s / temperature))
        losses.append(gamma * cross_entropy(s, y, label_smoothing) + alpha * temperature**2 * soft)
    return losses


def dkd(s_BK, y_B, t_BK, *, gamma, temperature, dkd_alpha, dkd_beta, label_smoothing):
    """Zhao et al. 2022: α·TCKD + β·NCKD."""
    losses = []
    for s, y, t in zip(s_BK, y_B, t_BK, strict=True):
        p, q = softmax(t / temperature), softmax(s / temperature)
        others = [k for k in range(len(s)) if k != y]
        tckd = kl([p[y], p[others].sum()], [q[y], q[others].sum()])
        nckd = kl(softmax(t[others] / temperature), softmax(s[others] / temperature))
        soft = temperature**2 * (dkd_alpha * tckd + dkd_beta * nckd)
        losses.append(gamma * cross_entropy(s, y, label_smoothing) + soft)
    return losses


def pearson(u, v, epsilon=1e-8):
    u, v = u - u.mean(), v - v.mean()
    return (u * v).sum() / (np.sqrt((u**2).sum()) * np.sqrt((v**2).sum()) + epsilon)


def dist(s_BK, y_B, t_BK, *, gamma, temperature, dist_beta, dist_gamma, label_smoothing):
    """Huang et al. 2022: L_inter of each sample, and L_intra of the batch."""
    p_BK, q_BK = (np.array([softmax(row / temperature) for row in z_BK]) for z_BK in (t_BK, s_BK))
    intra = np.mean([1 - pearson(q, p) for q, p in zip(q_BK.T, p_BK.T, strict=True)])
    return [
        gamma * cross_entropy(s, y, label_smoothing)
        + temperature**2 * (dist_beta * (1 - pearson(q, p)) + dist_gamma * intra)
        for s, y, q, p in zip(s_BK, y_B, q_BK, p_BK, strict=True)
    ]


def nkd(s_BK, y_B, t_BK, *, alpha, gamma, temperature, nkd_gamma, label_smoothing):
    """Yang et al. 2023: −T_t·log S_t − γ·λ²·Σ N(T_i)·log N(S_i)."""
    losses = []
    for s, y, t in zip(s_BK, y_B, t_BK, strict=True):
        others = [k for k in range(len(s)) if k != y]
        target = -softmax(t)[y] * np.log(softmax(s)[y])
        rest = -(softmax(t[others] / temperature) * np.log(softmax(s[others] / temperature))).sum()
        soft = target + nkd_gamma * temperature**2 * rest
        losses.append(gamma * cross_entropy(s, y, label_smoothing) + alpha * soft)
    return losses
