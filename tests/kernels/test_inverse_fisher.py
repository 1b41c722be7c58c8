"""Coefficients of F^-1 x: closed forms, the dense inverse, the paper's recursions, and rounding in each form."""

import pytest
import torch
from dense_fisher import newest_preconditioned, slow_rows
from gradient_windows import gram_row, woodbury_coefficients
from kernel_cases import bits_equal
from static_recursion import dense_fisher, static_recursion

from leanstep.kernels import linear_combination, row_dots, use_backend, window_coefficients
from leanstep.kernels.fisher import inverse_fisher
from leanstep.kernels.fisher.inverse_fisher import EIGEN, JITTERS, OK
from leanstep.kernels.reference.fisher.inverse_fisher import dynamic_recursion

# (m, d): one gradient, fewer than columns, as many, more
SIZES = [(1, 7), (5, 24), (24, 24), (72, 24)]
DAMPINGS = [1.0, 1e-2, 1e-6]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pushed_through(rows, damping, target, denominator=None):
    """F^-1 G^T a."""
    coefficients, _ = window_coefficients(rows @ rows.T, damping, denominator or len(rows), target)
    return rows.T @ coefficients


def woodbury(rows, damping, x):
    coefficients, _ = woodbury_coefficients(rows @ rows.T, rows @ x, damping, len(rows))
    return x / damping + rows.T @ coefficients


def close(found, expected, bound):
    error = float((found.double() - expected).norm() / expected.norm())
    assert error <= bound, error


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize(("m", "d"), SIZES)
def test_all_forms_equal_the_dense_inverse(m, d, damping):
    rows, x = normal(m, d), normal(d, seed=1)
    fisher = dense_fisher(rows, damping)
    inverse = torch.linalg.inv(fisher)
    bound = 1e-13 * torch.linalg.cond(fisher)  # measured below a tenth of it
    static = static_recursion(rows, damping)
    dynamic = dynamic_recursion(rows @ rows.T, damping)
    for vector in (x, rows[-1]):
        want = inverse @ vector
        for found in (
            woodbury(rows, damping, vector),
            static.solve(vector),
            vector / damping - rows.T @ dynamic.coefficients(rows @ vector),
        ):
            # they subtract from x / damping
            close(found, want, bound + 1e-14 * vector.norm() / damping / want.norm())
    for target, vector in ((m - 1, rows[-1]), (weights := normal(m, seed=2), rows.T @ weights)):
        coefficients, _ = window_coefficients(rows @ rows.T, damping, m, target)
        found = rows.T @ coefficients
        # with more rows than columns they depend on one another, and the sum rounds as its largest terms do
        rounding = 2**-53 * coefficients.abs() @ rows.norm(dim=1) / found.norm()
        close(found, torch.linalg.solve(fisher, vector), bound + 10 * rounding)
    absolute = bound * inverse.abs().max() + 1e-14 / damping
    assert (static.diagonal() - inverse.diagonal()).abs().max() <= absolute
    for a in range(0, d, 5):
        for b in range(0, d, 7):
            assert abs(static.element(a, b) - inverse[a, b]) <= absolute


@pytest.mark.parametrize(("m", "d"), SIZES)
def test_identities_of_the_recursions_and_the_cholesky_factor(m, d):
    rows, damping = normal(m, d), 1e-2
    static, dynamic = static_recursion(rows, damping), dynamic_recursion(rows @ rows.T, damping)
    factor = torch.linalg.cholesky(m * torch.eye(m, dtype=torch.float64) + rows @ rows.T / damping)
    diagonal = factor.diagonal()
    torch.testing.assert_close(static.q, dynamic.q)
    torch.testing.assert_close(static.q, diagonal.square())
    torch.testing.assert_close(static.vectors, dynamic.lower @ rows, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(dynamic.upper + m * torch.eye(m), (diagonal * factor).T, rtol=1e-7, atol=1e-8)
    unit = factor / diagonal
    inverse = torch.linalg.solve_triangular(unit, torch.eye(m, dtype=torch.float64), upper=False, unitriangular=True)
    torch.testing.assert_close(dynamic.lower, inverse / damping, rtol=1e-7, atol=1e-8)
    logdet = d * torch.log(torch.tensor(damping, dtype=torch.float64)) + (static.q / m).log().sum()
    torch.testing.assert_close(logdet, torch.logdet(dense_fisher(rows, damping)))


@pytest.mark.parametrize("damping", DAMPINGS)
def test_closed_forms(damping):
    one = normal(1, 9)
    g = one[0]
    close(pushed_through(one, damping, 0), g / (damping + g @ g), 1e-14)
    orthogonal = torch.linalg.qr(normal(9, 4)).Q.T * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    for i, row in enumerate(orthogonal):
        close(pushed_through(orthogonal, damping, i), row / (damping + row @ row / 4), 1e-12)
    x = normal(9, seed=1)
    x -= orthogonal.T @ torch.linalg.solve(orthogonal @ orthogonal.T, orthogonal @ x)
    close(woodbury(orthogonal, damping, x), x / damping, 1e-12)
    repeated = g.expand(6, -1).clone()
    close(pushed_through(repeated, damping, 3), g / (damping + g @ g), 1e-14 * (g @ g) / damping + 1e-13)


def test_rows_that_are_not_in_use_count_only_in_the_denominator():
    rows, damping, m = normal(5, 12), 1e-2, 16
    padded = torch.cat([rows, torch.zeros(m - 5, 12, dtype=torch.float64)])
    for denominator in (5, m):
        live = pushed_through(rows, damping, 4, denominator)
        close(pushed_through(padded, damping, 4, denominator), live, 1e-13)
        want = damping * torch.eye(12, dtype=torch.float64) + rows.T @ rows / denominator
        close(live, torch.linalg.solve(want, rows[4]), 1e-12)


def test_order_scale_limits_and_positivity():
    rows, damping = normal(6, 15), 1e-3
    found = pushed_through(rows, damping, 2)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    close(pushed_through(rows[order], damping, int((order == 2).nonzero())), found, 1e-12)
    close(pushed_through(3 * rows, 9 * damping, 2), found / 3, 1e-12)
    close(1e12 * pushed_through(rows, 1e12, 2), rows[2], 1e-9)
    x, y = normal(15, seed=4), normal(15, seed=5)
    left, right = x @ woodbury(rows, damping, y), y @ woodbury(rows, damping, x)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=0)
    sizes = []
    for count in range(1, 7):  # another gradient never makes x^T F^-1 x larger
        coefficients, _ = woodbury_coefficients(rows[:count] @ rows[:count].T, rows[:count] @ x, damping, 6)
        sizes.append(float(x @ (x / damping + rows[:count].T @ coefficients)))
    assert all(a > b > 0 for a, b in zip(sizes, sizes[1:], strict=False))


def test_several_windows_at_once_each_with_its_damping():
    rows = normal(3, 5, 11)
    grams, dampings = rows @ rows.mT, torch.tensor([1e-1, 1e-3, 1e-5], dtype=torch.float64)
    pushed = window_coefficients(grams, dampings, 5, 4)
    general = window_coefficients(grams, dampings, 5, rows[:, :, 0])
    assert pushed.status.tolist() == general.status.tolist() == [OK] * 3
    for i, damping in enumerate(dampings.tolist()):
        torch.testing.assert_close(pushed.values[i], window_coefficients(grams[i], damping, 5, 4).values)
        want = window_coefficients(grams[i], damping, 5, rows[i, :, 0]).values
        torch.testing.assert_close(general.values[i], want)


@pytest.mark.parametrize(("damping", "size"), [(1e-4, 1), (1e-6, 1), (1e-6, 30), (1e-8, 1), (1e-8, 30)])
def test_the_push_through_form_loses_nothing_where_the_subtractive_one_fails(damping, size):
    m, d = 64, 5000
    rows = torch.randn(m, d) + torch.randn(d)  # correlated gradients
    rows *= size / rows.norm(dim=1, keepdim=True)
    exact = pushed_through(rows.double(), damping, m - 1)
    gram = torch.stack([gram_row([rows], i) for i in range(m)])
    coefficients, status = window_coefficients(gram, damping, m, m - 1)
    assert status == OK
    close(linear_combination([rows], coefficients)[0], exact, 1e-7)  # measured 3e-8 in every case

    # as printed, all in fp32: its error is eps * size^2 / (m * damping) and more
    system = m * torch.eye(m) + rows @ rows.T / damping
    g = rows[-1]
    naive = g / damping - rows.T @ torch.linalg.solve(system, rows @ g / damping) / damping
    general, _ = woodbury_coefficients(gram, row_dots([rows], [g]), damping, m)
    subtracted = g / damping + linear_combination([rows], general)[0]
    error, subtracted_error = ((u.double() - exact).norm() / exact.norm() for u in (naive, subtracted))
    assert error > 3 * subtracted_error  # fp64 in the m x m part helps
    if damping * m < 1e-6 * size**2:
        assert error > 1e-1 and subtracted_error > 1e-3


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_16_bit_windows_need_the_stored_gradient_everywhere(dtype, bound):
    m, d, damping = 32, 4000, 1e-6
    gradients = torch.randn(m, d) + torch.randn(d)
    gradients /= gradients.norm(dim=1, keepdim=True)
    window = [gradients.to(dtype)]
    gram = torch.stack([gram_row(window, i) for i in range(m)])
    exact = pushed_through(gradients.double(), damping, m - 1)
    coefficients, _ = window_coefficients(gram, damping, m, m - 1)
    close(linear_combination(window, coefficients)[0], exact, bound)
    # the unrounded gradient is no row of the stored window
    general, _ = woodbury_coefficients(gram, row_dots(window, [gradients[-1]]), damping, m)
    mixed = gradients[-1] / damping + linear_combination(window, general)[0]
    assert (mixed.double() - exact).norm() > exact.norm()


def with_eigenvalues(eigenvalues):
    """A matrix with these eigenvalues; rounding leaves negative ones in Gram matrices."""
    n = len(eigenvalues)
    vectors = torch.linalg.qr(normal(n, n)).Q
    return (vectors * torch.tensor(eigenvalues, dtype=torch.float64)) @ vectors.T


def test_jitter_then_eigenvalues_and_the_count_of_both():
    good = with_eigenvalues([1.0, 2.0, 3.0, 4.0])
    slightly = with_eigenvalues([-1.2e-10, 2.0, 3.0, 4.0])
    badly = with_eigenvalues([-1e-3, 2.0, 3.0, 4.0])
    grams, damping, identity = torch.stack([good, slightly, badly]), 1e-12, torch.eye(4, dtype=torch.float64)
    # orthogonal to the first eigenvector, as the dots of any vector with such rows are
    first = torch.linalg.qr(normal(4, 4)).Q[:, 0]
    right = identity[3] - first * first[3]
    values, status = window_coefficients(grams, damping, 1, right.expand(3, -1))
    assert status.dtype == torch.int32
    assert status[0] == OK and 1 < status[1] <= JITTERS and status[2] == EIGEN
    torch.testing.assert_close(values[0], torch.linalg.solve(good, right), rtol=1e-9, atol=1e-12)
    # the three eigenvectors that are left: so little jitter changes nothing in them
    want = torch.linalg.pinv(badly + 1e-3 * first.outer(first), rtol=1e-3) @ right
    torch.testing.assert_close(values[1], want, rtol=0, atol=1e-5)
    torch.testing.assert_close(values[2], want, rtol=1e-9, atol=1e-12)
    _, alone = window_coefficients(badly, damping, 1, right)
    assert alone == EIGEN


@pytest.mark.parametrize(("damping", "expected"), [(1e-9, EIGEN), (1e-6, EIGEN), (1e-3, OK)])
def test_gradients_that_repeat(damping, expected):
    m = 20
    gradient = torch.randn(3000)
    rows = gradient.repeat(m, 1)
    rows[m // 2 :] *= 4
    gram = torch.stack([gram_row([rows], i) for i in range(m)])
    coefficients, status = window_coefficients(gram, damping, m, m - 1)
    assert status == expected
    squared_norm = gradient.double().square().sum() * (1 + 16) / 2
    exact = 4 * gradient.double() / (damping + squared_norm)
    close(linear_combination([rows], coefficients)[0], exact, 1e-6)
    # Cholesky alone gives coefficients of up to 1 / damping, whose rows do not cancel in fp32
    system = damping * torch.eye(m, dtype=torch.float64) + gram / m
    plain = torch.linalg.solve(system, torch.eye(m, dtype=torch.float64)[-1])
    assert (plain.float() @ rows - exact).norm() > 0.1 * exact.norm()
    # and for any vector
    x = torch.randn(3000)
    x -= (x @ gradient) / (gradient @ gradient) * gradient
    general, _ = woodbury_coefficients(gram, row_dots([rows], [x]), damping, m)
    close(x / damping + linear_combination([rows], general)[0], x.double() / damping, 1e-5)


def slow_case(change, damping, backend="reference", dtype=torch.float32):
    """Relative error of F^-1 of the newest of 32 gradients that change slowly, and how the system was solved."""
    rows = slow_rows(32, 2000, change).to(dtype)
    with use_backend(backend):
        gram = torch.stack([row_dots([rows], [row]) for row in rows])
        coefficients, status = window_coefficients(gram, damping, 32, 31)
        update = linear_combination([rows], coefficients)[0]
    exact = newest_preconditioned(rows, damping, 32)
    return float((update - exact).norm() / exact.norm()), int(status)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("damping", [1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize("change", [1e-2, 1e-4, 1e-6])
def test_gradients_that_change_slowly(change, damping, backend, dtype):
    """fp32 sums lose the differences of the rows: the error was 7e-4 to 1."""
    error, status = slow_case(change, damping, backend, dtype)
    assert status == OK
    assert error < 1e-6  # measured 3e-8


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("change", [1e-2, 1e-5])
def test_gradients_that_change_slowly_in_triton(change):
    pytest.importorskip("triton")
    error, status = slow_case(change, 1e-7, "triton")
    assert status == OK
    assert error < 1e-6


@pytest.mark.parametrize("change", [1e-3, 1e-4])
@pytest.mark.parametrize("damping", [1e-7, 1e-8])
def test_the_rounding_of_the_gram_matrix_is_noticed(change, damping, monkeypatch):
    """With K from fp32 sums, what Cholesky finds is wrong by 15 % and more, and is not taken as accurate."""
    rows = slow_rows(32, 2000, change)
    gram, exact = (rows @ rows.T).double(), newest_preconditioned(rows, damping, 32)
    system = damping * torch.eye(32, dtype=torch.float64) + gram / 32
    found = torch.linalg.solve(system, torch.eye(32, dtype=torch.float64)[-1]) @ rows.double()
    assert (found - exact).norm() > 0.1 * exact.norm()
    monkeypatch.setattr(inverse_fisher, "EPS", 2**-24)
    _, status = window_coefficients(gram, damping, 32, 31)
    assert status != OK


def test_inputs_stay_and_bad_arguments_are_named():
    gram = normal(4, 4)
    gram = gram @ gram.T
    before = gram.clone()
    window_coefficients(gram, 1e-3, 4, 0)
    bits_equal(gram, before)
    broken = gram.clone()
    broken[1, 1] = float("nan")
    for call, message in [
        (lambda: window_coefficients(gram, 0.0, 4, 0), "damping > 0, got 0.0"),
        (lambda: window_coefficients(gram, float("nan"), 4, 0), "damping > 0"),
        (lambda: window_coefficients(gram, 1.0, 0, 0), "denominator > 0"),
        (lambda: window_coefficients(gram, 1.0, 4, 4), "row 4 is outside the window of 4"),
        (lambda: window_coefficients(gram, 1.0, 4, torch.ones(3)), r"target of shape \(4,\), got \(3,\)"),
        (lambda: window_coefficients(gram.float(), 1.0, 4, 0), "float64 Gram matrix"),
        (lambda: window_coefficients(gram[:, :3], 1.0, 4, 0), r"got \(4, 3\)"),
        (lambda: window_coefficients(gram[:0, :0], 1.0, 4, 0), "n >= 1"),
        (lambda: window_coefficients(gram, torch.ones(2), 4, 0), r"damping of shape \(\)"),
        (lambda: window_coefficients(broken, 1.0, 4, 0), "not finite.*[Ss]kip"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_compiles_whole():
    gram = normal(5, 5)
    gram = gram @ gram.T

    def solve(gram, dots):
        return window_coefficients(gram, 1e-2, 5, 2).values, window_coefficients(gram, 1e-2, 5, dots).values

    dots = normal(5, seed=1)
    found = torch.compile(solve, fullgraph=True, backend="aot_eager")(gram, dots)
    for one, want in zip(found, solve(gram, dots), strict=True):
        bits_equal(one, want)
    damping = torch.tensor(1e-2, dtype=torch.float64)
    torch.library.opcheck(torch.ops.leanstep.inverse_fisher_solve, (gram, dots, damping, 5.0))


@pytest.mark.parametrize("scaling", ["window", "count"])
def test_a_ring_of_gradients_is_the_window_of_the_last_ones(scaling):
    m, d, damping = 4, 10, 1e-3
    window, gram = [torch.zeros(m, d, dtype=torch.float64)], torch.zeros(m, m, dtype=torch.float64)
    gradients = normal(3 * m + 2, d)
    for step, gradient in enumerate(gradients):
        index, live = step % m, min(step + 1, m)
        window[0][index] = gradient
        row = gram_row([w[:live] for w in window], index)
        gram[index, :live] = row
        gram[:live, index] = row
        denominator = m if scaling == "window" else live
        coefficients, _ = window_coefficients(gram[:live, :live], damping, denominator, index)
        (found,) = linear_combination([w[:live] for w in window], coefficients)
        last = gradients[max(0, step + 1 - m) : step + 1]
        fisher = damping * torch.eye(d, dtype=torch.float64) + last.T @ last / denominator
        close(found, torch.linalg.solve(fisher, gradient), 1e-10)


def test_the_gram_matrix_stays_exact_over_ten_thousand_gradients():
    m, generator = 5, torch.Generator().manual_seed(0)
    window, gram = [torch.zeros(m, 7, dtype=torch.float64)], torch.zeros(m, m, dtype=torch.float64)
    for step in range(10_000):
        index = step % m
        window[0][index] = torch.randn(7, generator=generator, dtype=torch.float64)
        gram[index] = gram[:, index] = gram_row(window, index)
    torch.testing.assert_close(gram, window[0] @ window[0].T, rtol=1e-12, atol=1e-12)
