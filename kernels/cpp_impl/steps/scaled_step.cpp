// The update alone; scaled_step.h describes it and the macros.
#include "scaled_step.h"

extern "C" void scaled_step(
    int64_t count, PARAM** params, const MAT** mats, float** rows, float** cols, StateT** states,
    const int64_t* heights, const int64_t* widths, const float* scalars, const int64_t* seeds, const int64_t* offsets,
    const int64_t* runs, const int64_t* owners, int32_t* flags, int threads
) {
    const Targets targets{params, mats, rows, cols, states, widths, scalars, seeds, offsets, runs, owners, flags};
    std::vector<char> skipped(count, 0);
    for (int64_t t = 0; t < count; ++t) {
        skipped[t] = targets.bad(t);
        if (skipped[t]) raise_flag(flags + owners[t]);
    }
    const auto rows_of_block = [=](int64_t t) { return std::max<int64_t>(1, BLOCK / std::max<int64_t>(1, widths[t])); };
    for_blocks(count, heights, threads, rows_of_block, [&](int64_t t, int64_t begin, int64_t end) {
        if (!skipped[t]) targets.step(t, begin, end);
    });
}
