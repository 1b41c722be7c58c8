// Lion on a list of tensors: reference/steps/lion_step.py, one pass over p, g and m.
//
// PARAM, GRAD, AVG: float or bf16. ROUNDING: see common.h. CAUTIOUS, ALIGNED, MAXIMIZE, SKIP: 0 or 1.
#include "lion.h"

using StateT = RoundingState<PARAM, ROUNDING>::type;

// entries that are checked, then updated, at a time; hardware prefetching alone is fastest for pieces of this length
constexpr int64_t PIECE = 4 * CHUNK;

// with `skipping`, does not update entries whose gradient is not finite
template <bool skipping>
static void step(
    PARAM* __restrict p, const GRAD* __restrict g, AVG* __restrict m, StateT* __restrict state, int64_t n,
    const float* scalar_values, float cautious_scale, uint32_t seed, uint32_t offset
) {
    float scalars[6];
    std::copy(scalar_values, scalar_values + 6, scalars);
    int64_t done = 0;
    if constexpr (!skipping && all_bf16<PARAM, GRAD, AVG>) {
        done = n / 2 * 2;
#pragma omp simd
        for (int64_t j = 0; j < n / 2; ++j) {
            const Pair gradient = load_pair(g, j), momentum = load_pair(m, j);
            const Pair weight = weights_of<ROUNDING>(p, state, j);
            const uint32_t i = offset + static_cast<uint32_t>(2 * j);
            const Moved low = move(signed_gradient(gradient.low), momentum.low, weight.low, scalars, cautious_scale);
            const Moved high = move(signed_gradient(gradient.high), momentum.high, weight.high, scalars, cautious_scale);
            store_pair(m, j, low.momentum, high.momentum);
            store_weights<ROUNDING>({low.weight, high.weight}, p, state, j, i, seed);
        }
    }
#pragma omp simd
    for (int64_t i = done; i < n; ++i) {
        const float gradient = signed_gradient(widen(g[i]));
        const Moved moved = move(gradient, widen(m[i]), weight_of<ROUNDING>(p[i], state, i), scalars, cautious_scale);
        const bool keep = skipping && !is_finite(gradient);
        AVG next;
        narrow(moved.momentum, next);
        m[i] = keep ? m[i] : next;
        store_weight<ROUNDING>(moved.weight, keep, p, state, i, offset + static_cast<uint32_t>(i), seed);
    }
}

extern "C" void lion_step(
    int64_t count, PARAM** params, const GRAD** grads, AVG** exp_avgs, StateT** states, const int64_t* sizes,
    const float* scalars, const float* cautious_scale, const int64_t* seeds, const int64_t* offsets,
    const int64_t* all_runs, int32_t* flags, int threads
) {
    for_blocks(count, sizes, threads, [=](int64_t t, int64_t begin, int64_t end) {
        const Runs runs{all_runs ? all_runs + 4 * t : nullptr};
        int64_t n;
        for (int64_t from = begin; from < end; from += n) {
            n = runs.rest(from, std::min(PIECE, end - from));
            // the masked loop takes 1.5 times as long, so it runs only for non-finite gradients
            const bool masked = SKIP && any_nonfinite(grads[t] + from, n);
            (masked ? step<true> : step<false>)(
                params[t] + from, grads[t] + from, exp_avgs[t] + from, states ? states[t] + from : nullptr, n, scalars,
                cautious_scale ? cautious_scale[t] : 1.0f, seeds ? static_cast<uint32_t>(seeds[t]) : 0u,
                static_cast<uint32_t>((offsets ? offsets[t] : 0) + runs.index(from))
            );
            if (masked) raise_flag(flags + t);
        }
    });
}

extern "C" void lion_agreement(
    int64_t count, const GRAD** grads, const AVG** exp_avgs, const int64_t* sizes, const float* scalars,
    int64_t* counts, int threads
) {
    const float beta1 = scalars[2], rest1 = scalars[3];
    for_blocks(count, sizes, threads, [=](int64_t t, int64_t begin, int64_t end) {
        const GRAD* g = grads[t];
        const AVG* m = exp_avgs[t];
        int32_t agreeing = 0;
#pragma omp simd reduction(+ : agreeing)
        for (int64_t i = begin; i < end; ++i) {
            const float gradient = MAXIMIZE ? -widen(g[i]) : widen(g[i]);
            const float c = beta1 * widen(m[i]) + rest1 * gradient;
            agreeing += sign(c) * gradient > 0.0f && !(SKIP && !is_finite(gradient));
        }
#pragma omp atomic
        counts[t] += agreeing;
    });
}
