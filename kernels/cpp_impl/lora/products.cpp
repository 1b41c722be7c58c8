// Seeded dropout: reference/lora/products.py, one pass. VALUE: float or bf16. `first`: index of the first element.
#include "common.h"

namespace {

// out = dropout(x) or, with `adding`, out += scale * dropout(x), rounded once; gain contains the scale
template <bool adding>
void run(
    int64_t first, int64_t size, const VALUE* __restrict x, VALUE* __restrict out, uint32_t key, uint32_t threshold,
    float gain, int threads
) {
    for_blocks(1, &size, threads, [=](int64_t, int64_t begin, int64_t end) {
        const uint32_t limit = threshold, shift = static_cast<uint32_t>(first);
        const float factor = gain;
        while (begin < end) {
            // the key contains the upper half of the index, which changes every 2^32 elements
            const int64_t upper = (first + begin) >> 32;
            const int64_t stop = std::min(end, ((upper + 1) << 32) - first);
            const uint32_t mixed = key ^ hash32(static_cast<uint32_t>(upper));
#pragma omp simd
            for (int64_t i = begin; i < stop; ++i) {
                const float scaled = widen(x[i]) * factor;
                const float value = hash32((static_cast<uint32_t>(i) + shift) ^ mixed) >= limit ? scaled : 0.0f;
                VALUE rounded;
                narrow(adding ? widen(out[i]) + value : value, rounded);
                out[i] = rounded;
            }
            begin = stop;
        }
    });
}

}  // namespace

extern "C" void dropout(
    int64_t first, int64_t size, const VALUE* x, VALUE* out, uint32_t key, uint32_t threshold, float gain, int threads
) {
    run<false>(first, size, x, out, key, threshold, gain, threads);
}

extern "C" void dropout_add(
    int64_t first, int64_t size, const VALUE* x, VALUE* out, uint32_t key, uint32_t threshold, float gain, float scale,
    int threads
) {
    run<true>(first, size, x, out, key, threshold, gain * scale, threads);
}
