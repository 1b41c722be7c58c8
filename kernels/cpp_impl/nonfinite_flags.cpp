// Whether every entry of every tensor is finite: one read. TENSOR: float or bf16.
#include "common.h"

// the processor's own prefetching does best alone, in stretches like this
constexpr int64_t STRETCH = 4 * CHUNK;

extern "C" void nonfinite_flags(int64_t count, const TENSOR** tensors, const int64_t* sizes, int32_t* flags, int threads) {
    for_blocks(count, sizes, threads, [=](int64_t t, int64_t begin, int64_t end) {
        for (int64_t from = begin; from < end; from += STRETCH) {
            if (any_nonfinite(tensors[t] + from, std::min(STRETCH, end - from))) raise_flag(flags + t);
        }
    });
}
