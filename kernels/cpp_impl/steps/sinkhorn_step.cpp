// Computes the scales of a matrix, then updates it while it is in the cache. sinkhorn.h and scaled_step.h describe both
// and the macros.
#include "scaled_step.h"
#include "sinkhorn.h"

extern "C" void sinkhorn_step(
    int64_t count, PARAM** params, const MAT** mats, float** rows, float** cols, StateT** states,
    const int64_t* heights, const int64_t* widths, int64_t num_iters, int64_t end_with_rows, const float* scalars,
    const int64_t* seeds, const int64_t* offsets, const int64_t* runs, const int64_t* owners, int32_t* flags, int threads
) {
    const Targets targets{params, mats, rows, cols, states, widths, scalars, seeds, offsets, runs, owners, flags};
    sinkhorn_all(count, mats, heights, widths, widths, rows, cols, num_iters, end_with_rows, threads,
                 [&](const Matrix& a, int64_t begin, int64_t end) {
                     if (targets.bad(a.index)) return raise_flag(flags + owners[a.index]);
                     targets.step(a.index, begin, end);
                 });
}
