// Masked weights: reference/nm/apply.py, one pass. WEIGHT: float or bf16.
#include "common.h"

extern "C" void nm_apply(
    int64_t size, const WEIGHT* __restrict weight, const uint8_t* __restrict mask, float alpha, WEIGHT* __restrict out,
    int threads
) {
    for_blocks(1, &size, threads, [=](int64_t, int64_t begin, int64_t end) {
        const float factor = alpha;
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            // an unconditional read, so that the compiler does not branch
            const float w = widen(weight[i]);
            const float decayed = factor == 0.0f ? 0.0f : w * factor;
            WEIGHT rounded;
            narrow(mask[i] ? w : decayed, rounded);
            out[i] = rounded;
        }
    });
}
