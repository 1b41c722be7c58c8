// Lion on a list of tensors: reference/lion_step.py, one pass over p, g and m.
//
// PARAM, GRAD, AVG: float or bf16. ROUNDING: see common.h. CAUTIOUS, ALIGNED, MAXIMIZE, SKIP: 0 or 1.
#include "common.h"

using ExtraT = Extra<PARAM, ROUNDING>::type;

static inline float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }

// with `skipping`, entries whose gradient is not finite keep what they hold
template <bool skipping>
static void step(
    PARAM* __restrict p, const GRAD* __restrict g, AVG* __restrict m, ExtraT* __restrict extra, int64_t n,
    const float* hyper, float cautious_scale, uint32_t seed, uint32_t offset
) {
    const float lr = hyper[0], decay = hyper[1];
    const float beta1 = hyper[2], rest1 = hyper[3], beta2 = hyper[4], rest2 = hyper[5];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float gradient = MAXIMIZE ? -widen(g[i]) : widen(g[i]);
        const float momentum = widen(m[i]);
        const float c = beta1 * momentum + rest1 * gradient;
        float update = sign(c);
        if (CAUTIOUS) update = update * gradient > 0.0f ? update * cautious_scale : 0.0f;
        const float weight = weight_of<ROUNDING>(p[i], extra, i);
        float decayed = weight * decay;
        if (ALIGNED) decayed = update * weight >= 0.0f ? decayed : weight;
        const bool keep = skipping && !is_finite(gradient);
        AVG next;
        narrow(beta2 * momentum + rest2 * gradient, next);
        m[i] = keep ? m[i] : next;
        store_weight<ROUNDING>(decayed - lr * update, keep, p, extra, i, offset + static_cast<uint32_t>(i), seed);
    }
}

extern "C" void lion_step(
    int64_t count, PARAM** params, const GRAD** grads, AVG** exp_avgs, ExtraT** extras, const int64_t* sizes,
    const float* hyper, const float* cautious_scale, const int64_t* seeds, const int64_t* offsets, int32_t* flags,
    int threads
) {
    for_blocks(count, sizes, threads, [=](int64_t t, int64_t begin, int64_t end) {
        for (int64_t from = begin; from < end; from += CHUNK) {
            const int64_t n = std::min(CHUNK, end - from);
            // the masked loop costs half as much again, so it runs only where the gradient needs it
            const bool masked = SKIP && any_nonfinite(grads[t] + from, n);
            const int64_t next = from + n, after = std::min(next + CHUNK, end);
            fetch(grads[t], next, after);
            fetch(exp_avgs[t], next, after);
            fetch(params[t], next, after);
            (masked ? step<true> : step<false>)(
                params[t] + from, grads[t] + from, exp_avgs[t] + from, extras ? extras[t] + from : nullptr, n, hyper,
                cautious_scale ? cautious_scale[t] : 1.0f, seeds ? static_cast<uint32_t>(seeds[t]) : 0u,
                static_cast<uint32_t>((offsets ? offsets[t] : 0) + from)
            );
            if (masked) raise_flag(flags + t);
        }
    });
}

extern "C" void lion_agreement(
    int64_t count, const GRAD** grads, const AVG** exp_avgs, const int64_t* sizes, const float* hyper,
    int64_t* counts, int threads
) {
    const float beta1 = hyper[2], rest1 = hyper[3];
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
