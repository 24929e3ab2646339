import math

import pytest
import torch
import torch.nn.functional as F

from fastkd.engine import losses
from fastkd.engine.losses import kd_loss, reshape_logits, stored_logits, supervised_loss
from fastkd.errors import InputError
from fastkd.kernels import reshape_rows
from fastkd.recipe import Loss


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64) * 3, torch.randint(0, 5, (6,))


def test_kd_loss_is_the_formula_row_by_row(logits):
    student, teacher, labels = logits
    T, alpha, gamma = 4.0, 0.9, 0.1
    expected = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p = [math.exp(v / T) for v in t]
        q = [math.exp(v / T) for v in s]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        ce = math.log(sum(math.exp(v) for v in s)) - s[y]
        expected.append(gamma * ce + alpha * T * T * kl)
    found = kd_loss(student, labels, teacher, alpha=alpha, gamma=gamma, temperature=T)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_constant_per_row_of_the_teacher_changes_nothing(logits):
    student, teacher, labels = logits
    arguments = {"alpha": 0.9, "gamma": 0.1, "temperature": 2.0}
    shifted = teacher + torch.randn(6, 1, dtype=torch.float64)
    torch.testing.assert_close(
        kd_loss(student, labels, teacher, **arguments), kd_loss(student, labels, shifted, **arguments)
    )


def test_a_student_that_equals_its_teacher_has_no_soft_loss(logits):
    _, teacher, labels = logits
    found = kd_loss(teacher, labels, teacher, alpha=1.0, gamma=0.0, temperature=4.0)
    assert found.tolist() == pytest.approx([0.0] * 6, abs=1e-12)


def test_the_supervised_loss_ignores_the_teacher(logits):
    student, _, labels = logits
    found = supervised_loss(student, labels, None)
    assert found.shape == (6,)
    torch.testing.assert_close(found.mean(), F.cross_entropy(student, labels))


def test_smoothed_labels_are_torchs(logits):
    student, teacher, labels = logits
    expected = F.cross_entropy(student, labels, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(supervised_loss(student, labels, None, label_smoothing=0.2), expected)
    kd = kd_loss(student, labels, teacher, alpha=0.0, gamma=1.0, temperature=4.0, label_smoothing=0.2)
    torch.testing.assert_close(kd, expected)


def test_the_live_reshaping_is_the_kernels_up_to_a_constant(logits):
    _, teacher, labels = logits
    teacher = teacher.float()
    teacher[2] = 1.5
    sigma = torch.rand(5) + 0.5
    live = reshape_logits(teacher, labels, sigma)
    stored, flat = reshape_rows(teacher.numpy(), sigma[labels].double().numpy())
    assert flat == 1
    assert torch.isfinite(live).all()
    torch.testing.assert_close(live - live.mean(1, keepdim=True), torch.from_numpy(stored), atol=1e-5, rtol=1e-5)


def test_stored_rows_of_all_logits_are_those():
    rows = torch.randn(4, 5).half()
    assert torch.equal(stored_logits((rows,), 5, 4.0), rows.float())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_topk_rows_give_the_softmax_that_they_were_taken_from(temperature):
    """The k largest keep their probability; the others share theirs evenly."""
    z = torch.randn(6, 7, generator=torch.Generator().manual_seed(0)) * 4
    p = (z / temperature).softmax(1)
    logits, indices = z.topk(3, dim=1)
    tail = 1 - p.gather(1, indices).sum(1, keepdim=True)
    found = (stored_logits((indices.to(torch.uint16), logits, tail), 7, temperature) / temperature).softmax(1)
    torch.testing.assert_close(found.gather(1, indices), p.gather(1, indices), rtol=1e-4, atol=1e-6)
    others = torch.ones(6, 7, dtype=torch.bool).scatter(1, indices, False)
    expected = (tail / 4).expand(-1, 7)[others]
    torch.testing.assert_close(found[others], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tail", [0.0, 1e-38])
def test_a_tail_of_nothing_makes_no_nan(tail):
    stored = (torch.tensor([[2, 0]], dtype=torch.uint16), torch.tensor([[5.0, 1.0]]).half(), torch.tensor([[tail]]))
    found = stored_logits(stored, 4, 4.0)
    assert torch.isfinite(found).all()
    loss = kd_loss(torch.zeros(1, 4), torch.tensor([0]), found, alpha=1.0, gamma=0.0, temperature=4.0)
    assert torch.isfinite(loss)


def test_a_class_that_a_teacher_masks_with_minus_infinity_adds_nothing():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    masked = teacher.clone()
    masked[0, 1] = masked[1, 2] = masked[1, 3] = float("-inf")
    weights = {"alpha": 1.0, "gamma": 0.0, "temperature": 3.0}
    labels = torch.tensor([0, 1, 2, 3])
    loss = kd_loss(student, labels, masked, **weights)
    far = torch.where(torch.isinf(masked), -1e4, masked)
    torch.testing.assert_close(loss, kd_loss(student, labels, far, **weights))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(student.grad).all()
    assert torch.equal(loss[2:], kd_loss(student, labels, teacher, **weights)[2:])


def test_a_loss_of_the_table_is_chosen_by_its_name(monkeypatch):
    def soft_only(student_BK, labels_B, teacher_BK, *, temperature, **others):
        return kd_loss(student_BK, labels_B, teacher_BK, alpha=1.0, gamma=0.0, temperature=temperature)

    monkeypatch.setitem(losses.LOSSES, "soft", soft_only)
    z, t, y = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 1, 2])
    chosen = losses.loss_function(Loss(name="soft", temperature=2.0), has_teacher=True)
    assert torch.equal(chosen(z, y, t), kd_loss(z, y, t, alpha=1.0, gamma=0.0, temperature=2.0))
    usual = losses.loss_function(Loss(temperature=2.0), has_teacher=True)
    assert torch.equal(usual(z, y, t), kd_loss(z, y, t, alpha=0.9, gamma=0.1, temperature=2.0))
    alone = losses.loss_function(Loss(), has_teacher=False)
    assert torch.equal(alone(z, y, None), supervised_loss(z, y, None))


def test_an_unknown_loss_is_refused_and_the_usual_one_is_in_no_key():
    with pytest.raises(InputError, match=r"loss\.name='hint': unknown loss; known: kd"):
        losses.loss_function(Loss(name="hint"), has_teacher=True)
    assert "name" not in Loss().key_fields()
    assert Loss(name="hint").key_fields()["name"] == "hint"
