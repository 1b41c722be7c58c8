// Whether every entry of every tensor is finite: one read. TENSOR: float or bf16.
#include "common.h"

extern "C" void nonfinite_flags(int64_t count, const TENSOR** tensors, const int64_t* sizes, int32_t* flags, int threads) {
    for_blocks(count, sizes, threads, [=](int64_t t, int64_t begin, int64_t end) {
        for (int64_t from = begin; from < end; from += CHUNK) {
            const int64_t next = std::min(from + CHUNK, end);
            fetch(tensors[t], next, std::min(next + CHUNK, end));
            if (any_nonfinite(tensors[t] + from, next - from)) raise_flag(flags + t);
        }
    });
}
