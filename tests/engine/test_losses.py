import itertools
import math

import losses_oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastkd.engine import losses
from fastkd.engine.losses import dist_loss, dkd_loss, kd_loss, reshape_logits, stored_logits, supervised_loss
from fastkd.kernels import reshape_rows
from fastkd.recipe import Loss
from fastkd.recipe.tables import LOSSES


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


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_partial_reshaping_on_the_device_is_the_kernels_up_to_a_constant(logits, strength):
    _, teacher, labels = logits
    teacher = teacher.float()
    teacher[2] = 1.5
    sigma = torch.rand(5) + 0.5
    live = reshape_logits(teacher, labels, sigma, strength)
    stored, _ = reshape_rows(teacher.numpy(), sigma[labels].double().numpy(), strength)
    assert torch.isfinite(live).all()
    torch.testing.assert_close(live - live.mean(1, keepdim=True), torch.from_numpy(stored), atol=1e-5, rtol=1e-5)
    if strength == 0:
        assert torch.equal(live, teacher)


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


# --- all losses of the table ---------------------------------------------------------------------------------------

WEIGHTS = {"alpha": 0.7, "gamma": 0.4, "dkd_alpha": 1.1, "dkd_beta": 3.0, "dist_beta": 2.0, "dist_gamma": 1.3}
SETTINGS = Loss(**WEIGHTS, nkd_gamma=1.5, temperature=3.0, label_smoothing=0.1)
all_losses = pytest.mark.parametrize("name", LOSSES)


def loss_of(name: str, **changes):
    """Return the function of a loss, and its settings."""
    settings = SETTINGS.model_dump(include=set(LOSSES[name].settings)) | changes
    return lambda s, y, t: getattr(losses, f"{name}_loss")(s, y, t, **settings), settings


def drawn(seed: int, B: int, K: int, scale: float, masked: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return student logits, labels and teacher logits (float64), of which classes 0 and 1 are never masked."""
    rng = np.random.default_rng(seed)
    s_BK, t_BK = rng.normal(size=(B, K)), scale * rng.normal(size=(B, K))
    if masked:
        t_BK[:, 2:][rng.random((B, K - 2)) < 0.4] = -np.inf
    return s_BK, rng.integers(0, K, B), t_BK


@all_losses
@given(
    seed=st.integers(0, 2**32),
    B=st.integers(1, 6),
    K=st.integers(2, 9),
    scale=st.floats(0.1, 8.0),
    temperature=st.floats(0.5, 8.0),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_loss_is_the_papers_equation(name, seed, B, K, scale, temperature, masked, dtype):
    s_BK, y_B, t_BK = drawn(seed, B, K, scale, masked)
    function, settings = loss_of(name, temperature=temperature)
    found = function(torch.tensor(s_BK, dtype=dtype), torch.tensor(y_B), torch.tensor(t_BK, dtype=dtype))
    assert found.dtype == dtype
    assert found.shape == (B,)
    expected = getattr(losses_oracle, name)(s_BK, y_B, t_BK, **settings)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    np.testing.assert_allclose(found.numpy(), expected, rtol=tolerance, atol=tolerance * temperature**2)


@all_losses
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_that_of_finite_differences(name, masked):
    s_BK, y_B, t_BK = drawn(3, 4, 6, 3.0, masked)
    function, _ = loss_of(name)
    student = torch.tensor(s_BK, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: function(s, torch.tensor(y_B), torch.tensor(t_BK)), (student,))


INF = float("inf")
ROWS = {
    "constant": [2.0, 2.0, 2.0, 2.0],
    "zero": [0.0] * 4,
    "almost constant": [0.1, 0.1, 0.1, 0.1 + 1e-8],
    "far apart": [3e4, -3e4, 0.0, 1.0],
    "target masked": [-INF, 1.0, 2.0, 3.0],
    "only the target": [1.0, -INF, -INF, -INF],
    "all but the target masked but one": [1.0, -INF, 2.0, -INF],
    "one other": [-INF, -INF, 1.0, -INF],
    "all masked": [-INF] * 4,
}


@all_losses
@pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
def test_degenerate_rows_have_a_finite_loss_and_gradient(name, temperature):
    function, _ = loss_of(name, temperature=temperature)
    for student, teacher in itertools.product(["constant", "zero", "almost constant", "far apart"], ROWS):
        s_BK = torch.tensor([ROWS[student], [1.0, 2.0, 3.0, 5.0]], requires_grad=True)
        loss_B = function(s_BK, torch.tensor([0, 1]), torch.tensor([ROWS[teacher], [0.0, 3.0, 1.0, 2.0]]))
        loss_B.sum().backward()
        assert torch.isfinite(loss_B).all(), (student, teacher)
        assert torch.isfinite(s_BK.grad).all(), (student, teacher)


@all_losses
@pytest.mark.parametrize(("B", "K"), [(1, 5), (3, 2), (1, 2)])
def test_one_sample_and_two_classes_are_enough(name, B, K):
    function, _ = loss_of(name)
    s_BK, t_BK = torch.randn(B, K, requires_grad=True), torch.randn(B, K)
    loss_B = function(s_BK, torch.ones(B, dtype=torch.int64), t_BK)
    loss_B.sum().backward()
    assert torch.isfinite(loss_B).all()
    assert s_BK.grad.abs().max() > 0


@all_losses
def test_no_loss_depends_on_a_constant_per_row_of_the_teacher(name, logits):
    student, teacher, labels = logits
    function, _ = loss_of(name)
    shifted = teacher + torch.randn(6, 1, dtype=torch.float64)
    torch.testing.assert_close(function(student, labels, teacher), function(student, labels, shifted))


@all_losses
def test_topk_rows_give_the_loss_of_a_teacher_whose_other_classes_are_equal(name):
    T, generator = 3.0, torch.Generator().manual_seed(0)
    z = torch.randn(5, 8, generator=generator) * 4
    logits, indices = z.topk(3, dim=1)
    teacher = torch.full_like(z, -6.0).scatter(1, indices, logits)
    tail = 1 - (teacher / T).softmax(1).gather(1, indices).sum(1, keepdim=True)
    rows = stored_logits((indices.to(torch.uint16), logits, tail), 8, T)
    student, labels = torch.randn(5, 8, generator=generator), torch.arange(5)
    function, _ = loss_of(name, temperature=T)
    found, expected = function(student, labels, rows), function(student, labels, teacher)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@all_losses
def test_a_loss_is_compiled_as_one_graph_with_its_stored_rows(name):
    function, _ = loss_of(name)

    def objective(student, labels, indices, logits, tail):
        return function(student, labels, stored_logits((indices, logits, tail), 7, 3.0)).mean()

    rows = (torch.tensor([[2, 0], [3, 6]], dtype=torch.uint16), torch.tensor([[5.0, 1.0], [2.0, 1.5]]).half())
    inputs = (torch.tensor([2, 5]), *rows, torch.tensor([[0.2], [0.4]]))
    gradients = []
    for call in (objective, torch.compile(objective, fullgraph=True, backend="aot_eager")):
        student = torch.arange(14.0).sin().reshape(2, 7).requires_grad_()
        loss = call(student, *inputs)
        loss.backward()
        gradients.append((loss.detach(), student.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


# --- properties of single losses ------------------------------------------------------------------------------------


def test_the_scale_of_logits_is_irrelevant_once_they_are_standardised(logits):
    student, teacher, labels = logits
    function, _ = loss_of("standardised", gamma=0.0)
    torch.testing.assert_close(function(student, labels, teacher), function(7 * student, labels, teacher / 3 + 1))
    assert function(teacher * 2, labels, teacher).tolist() == pytest.approx([0.0] * 6, abs=1e-12)


def test_a_student_with_zero_weights_can_leave_its_constant_rows():
    """Dividing by an epsilon instead would multiply the gradient by 10⁷."""
    student = torch.zeros(2, 5, requires_grad=True)
    function, _ = loss_of("standardised", gamma=0.0)
    function(
        student, torch.tensor([0, 1]), torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    ).sum().backward()
    assert 1e-3 < student.grad.abs().max() < 10


def test_kd_is_tckd_and_nckd_weighted_by_the_probability_of_the_other_classes(logits):
    student, teacher, labels = logits
    T = 3.0
    weights = {"gamma": 0.0, "temperature": T}
    tckd, nckd = (dkd_loss(student, labels, teacher, dkd_alpha=a, dkd_beta=1.0 - a, **weights) for a in (1.0, 0.0))
    others_B = 1 - (teacher / T).softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(tckd + others_B * nckd, kd_loss(student, labels, teacher, alpha=1.0, **weights))


def test_dist_is_one_minus_the_correlations_of_numpy_and_its_batch_term_is_shared(logits):
    student, teacher, labels = logits
    T = 2.0
    q_BK, p_BK = ((z / T).softmax(1).numpy() for z in (student, teacher))
    weights = {"gamma": 0.0, "temperature": T}
    inter_B = dist_loss(student, labels, teacher, dist_beta=1.0, dist_gamma=0.0, **weights)
    rows = [1 - np.corrcoef(q, p)[0, 1] for q, p in zip(q_BK, p_BK, strict=True)]
    np.testing.assert_allclose(inter_B.numpy(), T**2 * np.array(rows), rtol=1e-5)
    intra_B = dist_loss(student, labels, teacher, dist_beta=0.0, dist_gamma=1.0, **weights)
    columns = [1 - np.corrcoef(q, p)[0, 1] for q, p in zip(q_BK.T, p_BK.T, strict=True)]
    np.testing.assert_allclose(intra_B.numpy(), np.full(6, T**2 * np.mean(columns)), rtol=1e-5)


def test_a_loss_is_chosen_by_its_name_with_its_settings_alone():
    z, t, y = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 1, 2])
    chosen = losses.loss_function(Loss(name="dkd", temperature=2.0, alpha=5.0, dkd_beta=3.0), has_teacher=True)
    expected = dkd_loss(z, y, t, gamma=0.1, temperature=2.0, dkd_alpha=1.0, dkd_beta=3.0)
    assert torch.equal(chosen(z, y, t), expected)
    usual = losses.loss_function(Loss(temperature=2.0), has_teacher=True)
    assert torch.equal(usual(z, y, t), kd_loss(z, y, t, alpha=0.9, gamma=0.1, temperature=2.0))
    alone = losses.loss_function(Loss(name="dist"), has_teacher=False)
    assert torch.equal(alone(z, y, None), supervised_loss(z, y, None))
