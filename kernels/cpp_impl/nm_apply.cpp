// Masked weights and the gradient behind them: reference/nm_apply.py, one pass each.
//
// WEIGHT, GRAD: float or bf16. FLOW: see below.
#include "common.h"

enum Flow { STE, DECAY, FIXED };

extern "C" void nm_apply(
    int64_t size, const WEIGHT* __restrict weight, const uint8_t* __restrict mask, float alpha, WEIGHT* __restrict out,
    int threads
) {
    for_blocks(1, &size, threads, [=](int64_t, int64_t begin, int64_t end) {
        const float factor = alpha;
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            // read unconditionally, or the compiler branches
            const float w = widen(weight[i]);
            const float decayed = factor == 0.0f ? 0.0f : w * factor;
            WEIGHT rounded;
            narrow(mask[i] ? w : decayed, rounded);
            out[i] = rounded;
        }
    });
}

// `srste` is the factor of the weight in the gradient of what is pruned
extern "C" void nm_apply_backward(
    int64_t size, const GRAD* __restrict grad, const WEIGHT* __restrict weight, const uint8_t* __restrict mask,
    float alpha, float srste, WEIGHT* __restrict out, int threads
) {
    for_blocks(1, &size, threads, [=](int64_t, int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            const float g = widen(grad[i]);
            float pruned = FLOW == STE ? g : FLOW == DECAY ? g * alpha : 0.0f;
            if (SRSTE) pruned = pruned + srste * widen(weight[i]);
            WEIGHT rounded;
            narrow(mask[i] ? g : pruned, rounded);
            out[i] = rounded;
        }
    });
}
