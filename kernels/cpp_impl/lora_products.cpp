// Seeded dropout: reference/lora_products.py, one pass. VALUE: float or bf16.
#include "common.h"

namespace {

// a block lies within one run of 2^32 indices
inline uint32_t block_key(uint32_t key, int64_t begin) { return key ^ hash32(static_cast<uint32_t>(begin >> 32)); }

}  // namespace

extern "C" void dropout(
    int64_t size, const VALUE* __restrict x, VALUE* __restrict out, uint32_t key, uint32_t threshold, float gain,
    int threads
) {
    for_blocks(1, &size, threads, [=](int64_t, int64_t begin, int64_t end) {
        const uint32_t mixed = block_key(key, begin);
        const uint32_t limit = threshold;
        const float factor = gain;
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            const float value = widen(x[i]) * factor;
            VALUE rounded;
            narrow(hash32(static_cast<uint32_t>(i) ^ mixed) >= limit ? value : 0.0f, rounded);
            out[i] = rounded;
        }
    });
}

// out += factor * dropout(x); the dropped tensor is rounded as the one above, the sum once
extern "C" void dropout_add(
    int64_t size, const VALUE* __restrict x, VALUE* __restrict out, uint32_t key, uint32_t threshold, float gain,
    float scale, int threads
) {
    for_blocks(1, &size, threads, [=](int64_t, int64_t begin, int64_t end) {
        const uint32_t mixed = block_key(key, begin);
        const uint32_t limit = threshold;
        const float factor = gain * scale;
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            const float value = widen(x[i]) * factor;
            VALUE rounded;
            narrow(widen(out[i]) + (hash32(static_cast<uint32_t>(i) ^ mixed) >= limit ? value : 0.0f), rounded);
            out[i] = rounded;
        }
    });
}
