// Masked weights and their gradient: reference/nm/apply.py, one pass each.
//
// WEIGHT, GRAD: float or bf16.
#include "common.h"

namespace {

enum Flow { STE, DECAY, FIXED };

template <int flow, bool srste>
void backward(
    int64_t size, const GRAD* __restrict grad, const WEIGHT* __restrict weight, const uint8_t* __restrict mask,
    float alpha, float factor, WEIGHT* __restrict out, int threads
) {
    for_blocks(1, &size, threads, [=](int64_t, int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            const float g = widen(grad[i]);
            float pruned = flow == STE ? g : flow == DECAY ? g * alpha : 0.0f;
            if (srste) pruned = pruned + factor * widen(weight[i]);
            WEIGHT rounded;
            narrow(mask[i] ? g : pruned, rounded);
            out[i] = rounded;
        }
    });
}

}  // namespace

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

// factor: of the SR-STE term, factor * weight, in the gradient of pruned entries; 0: no such term
extern "C" void nm_apply_backward(
    int64_t size, const GRAD* grad, const WEIGHT* weight, const uint8_t* mask, float alpha, int64_t flow, float factor,
    WEIGHT* out, int threads
) {
    const bool srste = factor != 0.0f;
    const auto run = flow == STE     ? (srste ? backward<STE, true> : backward<STE, false>)
                     : flow == DECAY ? (srste ? backward<DECAY, true> : backward<DECAY, false>)
                                     : (srste ? backward<FIXED, true> : backward<FIXED, false>);
    run(size, grad, weight, mask, alpha, factor, out, threads);
}
