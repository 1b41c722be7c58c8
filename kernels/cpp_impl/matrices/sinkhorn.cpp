// The scales alone; see sinkhorn.h. MAT: float or bf16.
#include "sinkhorn.h"

extern "C" void sinkhorn(
    int64_t count, const MAT** mats, const int64_t* heights, const int64_t* widths, const int64_t* strides,
    float** rows, float** cols, int64_t num_iters, int64_t end_with_rows, int threads
) {
    sinkhorn_all(count, mats, heights, widths, strides, rows, cols, num_iters, end_with_rows, threads,
                 [](const Matrix&, int64_t, int64_t) {});
}
