"""lion_step and lion_agreement against the formula in fp64, on every backend that a CPU has."""

import itertools

import pytest
import torch
from kernel_cases import rounding_states

from leanstep.kernels import BackendError, StepOptions, lion_agreement, lion_step, use_backend

BACKENDS = ["reference", "cpp"]
SETTINGS = (0.01, 0.999, 0.9, 0.1, 0.99, 0.01)
SHAPES = [(), (1,), (0,), (0, 3), (63,), (129,), (4160,), (65, 77), (3, 35, 41)]


def scalars(dtype=torch.float32):
    return torch.tensor(SETTINGS, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def step_options(dtype=torch.float32, **settings):
    return StepOptions(scalars(dtype), **settings)


def tensors(shape, dtypes, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=chance).to(dtype) for dtype in dtypes]


def oracle(p, g, m, *, maximize=False, scale=None, aligned=False):
    """The update in fp64, with the fp32 scalars that the kernel is given, and c."""
    lr, decay, b1, a1, b2, a2 = scalars().double().tolist()
    p, g, m = p.double(), g.double(), m.double()
    g = -g if maximize else g
    c = b1 * m + a1 * g
    u = torch.sign(c)
    if scale is not None:
        u = torch.where(u * g > 0, u * scale, 0.0)
    kept = torch.where(u * p >= 0, p * decay, p) if aligned else p * decay
    return kept - lr * u, b2 * m + a2 * g, c


def check(p, g, m, old, **options):
    """Within one rounding of the storage dtype and a few of fp32; entries with c on the fence are not compared."""
    new_p, new_m, c = oracle(old[0], g, old[1], **options)
    sure = c.abs() > 1e-6
    for got, want in ((p, new_p), (m, new_m)):
        unit = torch.finfo(got.dtype).eps
        bound = unit * want.abs() + 4 * torch.finfo(torch.float32).eps * (want.abs() + 1)
        assert ((got.double() - want).abs() <= bound)[sure].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, shape, dirty_memory):
    p, g, m = tensors(shape, [torch.float32] * 3)
    old = [p.clone(), m.clone()]
    before = g.clone()
    with use_backend(backend):
        flags = lion_step([p], [g], [m], [], step_options())
    assert flags.dtype == torch.int32 and flags.tolist() == [0]
    assert torch.equal(g, before)
    check(p, g, m, old)


DTYPES = [
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float32),
    (torch.float64, torch.float64, torch.float64),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(backend, dtypes):
    p, g, m = tensors((65, 77), dtypes)
    old, before = [p.clone(), m.clone()], g.clone()
    if backend == "cpp" and {torch.float16, torch.float64} & set(dtypes):
        with use_backend(backend), pytest.raises(BackendError, match="fp32 and bf16, not float"):
            lion_step([p], [g], [m], [], step_options(dtypes[0]))
        assert torch.equal(p, old[0]) and torch.equal(m, old[1])
        backend = "auto"
    with use_backend(backend):
        lion_step([p], [g], [m], [], step_options(dtypes[0]))
    assert torch.equal(g, before)
    if dtypes[0] == torch.float64:
        lr, decay, b1, a1, b2, a2 = SETTINGS
        torch.testing.assert_close(p, old[0] * decay - lr * torch.sign(b1 * old[1] + a1 * g), rtol=1e-15, atol=1e-15)
        return
    check(p, g, m, old)


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "stochastic"},
        {"rounding": "kahan"},
        {"rounding": "master", "maximize": True},
        {"rounding": "split"},
        {"cautious": True, "decay_where_aligned": True},
    ],
    ids=str,
)
def test_backends_agree_bit_for_bit(options):
    """Every option, whole rows and tails; shards with an offset; zeros and a non-finite entry."""
    options = dict(options)
    rounding = options.get("rounding", "nearest")
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16  # where a decay of 0.999 is seen
    results = []
    for backend in BACKENDS:
        params, grads, momenta = ([], [], [])
        for i, shape in enumerate([(65, 77), (35, 128), (7,)]):
            for held, t in zip((params, grads, momenta), tensors(shape, [dtype] * 3, i), strict=True):
                held.append(t)
        grads[0][1, 3] = float("inf")
        # no update where both are zero, and one without a gradient
        grads[0][2], momenta[0][2, :9] = 0.0, 0.0
        states = rounding_states(params, rounding)
        call = {k: v for k, v in options.items() if k != "cautious"}
        if options.get("cautious"):
            with use_backend(backend):
                call["cautious_scale"] = 100 / lion_agreement(grads, momenta, step_options())
        if rounding == "stochastic":
            call |= {"seeds": torch.tensor([1, 2**32 - 1, 77]), "offsets": torch.tensor([0, 4480, 5])}
        with use_backend(backend):
            flags = lion_step(params, grads, momenta, states, step_options(**call))
        assert flags.tolist() == [1, 0, 0]
        results.append([*params, *momenta, *states])
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_one_storage(backend):
    """Parameters cut from one flat buffer, and a gradient that lies in the buffer of its parameter."""
    flat = torch.randn(4 * 5000)
    want = [flat[:5000].clone(), flat[5000:10000].clone(), flat[10000:15000].clone()]
    p, g, m = (flat[i * 5000 : (i + 1) * 5000] for i in range(3))
    rest = flat[15000:].clone()
    lion_step([want[0]], [want[1]], [want[2]], [], step_options())
    with use_backend(backend):
        lion_step([p], [g], [m], [], step_options())
    assert torch.equal(flat, torch.cat([*want, rest]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_entries(backend):
    p, g, m = tensors((65, 77), [torch.float32] * 3)
    old = [p.clone(), m.clone()]
    bad = [(0, 0, float("nan")), (2, 5, float("inf")), (64, 76, float("-inf"))]
    for i, j, value in bad:
        g[i, j] = value
    with use_backend(backend):
        flags = lion_step([p, torch.ones(3)], [g, torch.ones(3)], [m, torch.ones(3)], [], step_options())
    assert flags.tolist() == [1, 0]
    for i, j, _ in bad:
        assert p[i, j] == old[0][i, j] and m[i, j] == old[1][i, j]
    finite = torch.isfinite(g)
    assert (p != old[0])[finite].all()
    check(p[finite], g[finite], m[finite], [o[finite] for o in old])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(65, 77), (9,), (0,)])
def test_agreement(backend, shape):
    _, g, m = tensors(shape, [torch.float32] * 3)
    if g.numel() > 9:
        g[2, 2] = float("nan")
    with use_backend(backend):
        found = lion_agreement([g], [m], step_options())
    c = 0.9 * m.double() + 0.1 * g.double()
    assert found.dtype == torch.float32
    assert found.item() == int(((torch.sign(c) * g > 0) & torch.isfinite(g)).sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_counts_are_fp32_whatever_the_default_dtype(backend, default):
    grads = [torch.ones(65537)]  # fp16 would give infinity, bf16 65536
    torch.set_default_dtype(default)
    with use_backend(backend):
        counts = lion_agreement(grads, grads, step_options())
    assert counts.dtype == torch.float32 and counts.tolist() == [65537]
    assert lion_agreement([], [], step_options()).dtype == torch.float32


def test_a_list_is_its_members():
    """Tensors of many sizes in one call and one by one."""
    together = [tensors(s, [torch.float32] * 3, i) for i, s in enumerate(SHAPES)]
    alone = [[t.clone() for t in row] for row in together]
    lion_step(*(list(x) for x in zip(*together, strict=True)), [], step_options())
    for p, g, m in alone:
        lion_step([p], [g], [m], [], step_options())
    for a, b in zip(itertools.chain(*together), itertools.chain(*alone), strict=True):
        assert torch.equal(a, b)
