// Whether every entry of every tensor is finite: one read. TENSOR: float or bf16.
#include "common.h"

// A block is read as several streams in turn: hardware prefetching stays within a page, but runs in several at once.
constexpr int64_t STREAMS = 4, STRETCH = 1024 / sizeof(TENSOR), STREAM = 32 * BLOCK;

extern "C" void nonfinite_flags(int64_t count, const TENSOR** tensors, const int64_t* sizes, int32_t* flags, int threads) {
    const auto size_of_block = [](int64_t) { return STREAMS * STREAM; };
    for_blocks(count, sizes, threads, size_of_block, [=](int64_t t, int64_t begin, int64_t end) {
        const int64_t length = (end - begin + STREAMS - 1) / STREAMS;
        bool bad = false;
        for (int64_t from = 0; from < length; from += STRETCH) {
            for (int64_t stream = 0; stream < STREAMS; ++stream) {
                const int64_t start = begin + stream * length, last = std::min(start + length, end);
                const int64_t n = std::min(STRETCH, last - (start + from));
                bad |= n > 0 && any_nonfinite(tensors[t] + start + from, n);
            }
        }
        if (bad) raise_flag(flags + t);
    });
}
