// AdamW on a list of bf16 tensors of even sizes, one pass over p, g, m and v. Writes the same bits as torch's fused CPU
// kernel, in less time. MAXIMIZE: 0 or 1.
#include "common.h"

// as packed by the launcher, per tensor
struct Scalars {
    float decay, weight1, beta2, weight2, root2, eps, size;
};

struct Moved {
    float param, avg, avg_sq;
};

// Fuses the same multiply-adds as torch's kernel. Like torch's lerp, starts from the nearer end.
static inline Moved move(float param, float grad, float avg, float avg_sq, const Scalars& h, bool from_grad) {
    const float gradient = MAXIMIZE ? -grad : grad;
    const float end = from_grad ? gradient : avg, weight = from_grad ? h.weight1 - 1.0f : h.weight1;
    const float new_avg = fused(weight, gradient - avg, end);
    const float new_sq = fused(h.weight2 * gradient, gradient, h.beta2 * avg_sq);
    const float denominator = std::sqrt(new_sq) / h.root2 + h.eps;
    return {param * h.decay + h.size * new_avg / denominator, new_avg, new_sq};
}

static void step(
    bf16* __restrict p, const bf16* __restrict g, bf16* __restrict m, bf16* __restrict v, int64_t n, const Scalars& values
) {
    const Scalars h = values;
    const bool from_grad = h.weight1 >= 0.5f;
#pragma omp simd
    for (int64_t j = 0; j < n / 2; ++j) {
        const Pair param = load_pair(p, j), grad = load_pair(g, j), avg = load_pair(m, j), avg_sq = load_pair(v, j);
        const Moved low = move(param.low, grad.low, avg.low, avg_sq.low, h, from_grad);
        const Moved high = move(param.high, grad.high, avg.high, avg_sq.high, h, from_grad);
        store_pair(m, j, low.avg, high.avg);
        store_pair(v, j, low.avg_sq, high.avg_sq);
        store_pair(p, j, low.param, high.param);
    }
}

extern "C" void adamw_step(
    int64_t count, bf16** params, const bf16** grads, bf16** avgs, bf16** avg_sqs, const int64_t* sizes,
    const Scalars* scalars, int threads
) {
    // hardware prefetching alone is fastest here
    for_blocks(count, sizes, threads, [=](int64_t t, int64_t begin, int64_t end) {
        step(params[t] + begin, grads[t] + begin, avgs[t] + begin, avg_sqs[t] + begin, end - begin, scalars[t]);
    });
}
