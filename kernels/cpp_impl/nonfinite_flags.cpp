// Whether every entry of every tensor is finite: one read. TENSOR: float or bf16.
#include "common.h"

extern "C" void nonfinite_flags(int64_t count, const TENSOR** tensors, const int64_t* sizes, int32_t* flags, int threads) {
    for_blocks(count, sizes, threads, [=](int64_t t, int64_t begin, int64_t end) {
        if (any_nonfinite(tensors[t] + begin, end - begin)) raise_flag(flags + t);
    });
}
