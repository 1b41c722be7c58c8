"""The coefficients of the Polar Express, derived: the table of ``leanstep.kernels.COEFFICIENTS`` holds its results."""

import torch

# Two numbers of the Polar Express (Amsel, Persson, Musco, Gower, arXiv 2505.16932): rounding lifts singular values
# above the interval a polynomial is made for, so that all steps but the last see theirs divided by SAFETY; and no
# polynomial is made for an interval that begins below CUSHION times its end, where it would be flat.
SAFETY = 1.01
CUSHION = 0.02407327424182761


def polar_express(lower: float, steps: int) -> tuple[tuple[float, float, float], ...]:
    """Coefficients of the odd quintics whose composition stays closest to 1 on [lower, 1], SAFETY applied.

    Greedy by the paper's theorem: each polynomial is the best one, in the largest error, for the interval to which
    those before it have taken [lower, 1] (Amsel, Persson, Musco, Gower, "The Polar Express: Optimal Matrix Sign
    Methods and Their Application to the Muon Algorithm", arXiv 2505.16932).

    Args:
        lower: in (0, 1): singular values below this part of the largest come out below 1.
        steps: number of triples, at least 1.

    Raises:
        ValueError: if an argument is out of range.
    """
    if not 0 < lower < 1 or steps < 1:
        raise ValueError(f"polar_express: expected 0 < lower < 1 and steps >= 1, got lower={lower}, steps={steps}")
    triples: list[tuple[float, float, float]] = []
    upper = 1.0
    for _ in range(steps):
        a, b, c = minimax_quintic(max(lower, CUSHION * upper), upper)
        if lower < CUSHION * upper:
            # the values at both ends of the true interval again lie symmetrically about 1
            scale = 2.0 / (_odd(a, b, c, lower) + _odd(a, b, c, upper))
            a, b, c = a * scale, b * scale, c * scale
        triples.append((a, b, c))
        lower = _odd(a, b, c, lower)
        upper = 2.0 - lower
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in triples[:-1]]
    return (*safe, triples[-1])


def minimax_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """The odd polynomial a t + b t^3 + c t^5 with the smallest largest distance from 1 on [lower, upper].

    Remez exchange: its error takes its extreme value, with alternating sign, at both ends and at two points between.
    """
    if lower / upper > 1 - 5e-6:
        return 1.875 / upper, -1.25 / upper**3, 0.375 / upper**5
    inner = [(3 * lower + upper) / 4, (lower + 3 * upper) / 4]
    error = float("inf")
    for _ in range(100):
        t = torch.tensor([lower, *inner, upper], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([t, t**3, t**5, signs], dim=1)
        a, b, c, new_error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        if abs(new_error - error) <= 1e-15:
            break
        error = new_error
        # where the derivative a + 3 b t^2 + 5 c t^4 vanishes
        root = (9 * b * b - 20 * a * c) ** 0.5
        inner = [((-3 * b - root) / (10 * c)) ** 0.5, ((-3 * b + root) / (10 * c)) ** 0.5]
    return a, b, c


def _odd(a: float, b: float, c: float, t: float) -> float:
    return a * t + b * t**3 + c * t**5
