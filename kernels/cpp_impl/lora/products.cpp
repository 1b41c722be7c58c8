// Seeded dropout: reference/lora/products.py, one pass. VALUE: float or bf16. `first`: index of the first element.
#include "common.h"

namespace {

// calls work(begin, end, shift, mixed) for pieces of 0..size; element i has the hash of (i + shift) ^ mixed
template <typename Work>
void for_runs(int64_t first, int64_t size, uint32_t key, int threads, Work work) {
    for_blocks(1, &size, threads, [=](int64_t, int64_t begin, int64_t end) {
        while (begin < end) {
            // the key contains the upper half of the index, which changes every 2^32 elements
            const int64_t upper = (first + begin) >> 32;
            const int64_t stop = std::min(end, ((upper + 1) << 32) - first);
            work(begin, stop, static_cast<uint32_t>(first), key ^ hash32(static_cast<uint32_t>(upper)));
            begin = stop;
        }
    });
}

}  // namespace

extern "C" void dropout(
    int64_t first, int64_t size, const VALUE* __restrict x, VALUE* __restrict out, uint32_t key, uint32_t threshold,
    float gain, int threads
) {
    for_runs(first, size, key, threads, [=](int64_t begin, int64_t end, uint32_t shift, uint32_t mixed) {
        const uint32_t limit = threshold;
        const float factor = gain;
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            const float value = widen(x[i]) * factor;
            VALUE rounded;
            narrow(hash32((static_cast<uint32_t>(i) + shift) ^ mixed) >= limit ? value : 0.0f, rounded);
            out[i] = rounded;
        }
    });
}

// out += scale * dropout(x), rounded once
extern "C" void dropout_add(
    int64_t first, int64_t size, const VALUE* __restrict x, VALUE* __restrict out, uint32_t key, uint32_t threshold,
    float gain, float scale, int threads
) {
    for_runs(first, size, key, threads, [=](int64_t begin, int64_t end, uint32_t shift, uint32_t mixed) {
        const uint32_t limit = threshold;
        const float factor = gain * scale;
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            const float value = widen(x[i]) * factor;
            VALUE rounded;
            narrow(widen(out[i]) + (hash32((static_cast<uint32_t>(i) + shift) ^ mixed) >= limit ? value : 0.0f), rounded);
            out[i] = rounded;
        }
    });
}
