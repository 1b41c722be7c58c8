// AdamW on a list of tensors, one pass over p, g, m and v: bit for bit what torch's fused CPU kernel writes, at the speed
// of the memory in bf16, too. TENSOR: float or bf16. MAXIMIZE: 0 or 1.
#include "common.h"

// as packed by the launcher, per tensor
struct Hyper {
    float decay, weight1, beta2, weight2, root2, eps, size;
};

struct Moved {
    float param, avg, avg_sq;
};

// The fused multiply-adds are those of torch's kernel. An average moves from the nearer of its two ends.
static inline Moved move(float param, float grad, float avg, float avg_sq, const Hyper& h, bool from_grad) {
    const float gradient = MAXIMIZE ? -grad : grad;
    const float end = from_grad ? gradient : avg, weight = from_grad ? h.weight1 - 1.0f : h.weight1;
    const float new_avg = fused(weight, gradient - avg, end);
    const float new_sq = fused(h.weight2 * gradient, gradient, h.beta2 * avg_sq);
    const float denominator = std::sqrt(new_sq) / h.root2 + h.eps;
    return {param * h.decay + h.size * new_avg / denominator, new_avg, new_sq};
}

static void step(
    TENSOR* __restrict p, const TENSOR* __restrict g, TENSOR* __restrict m, TENSOR* __restrict v, int64_t n,
    const Hyper& values
) {
    const Hyper h = values;
    const bool from_grad = h.weight1 >= 0.5f;
    const int64_t pairs = all_bf16<TENSOR> ? n / 2 : 0;
#pragma omp simd
    for (int64_t j = 0; j < pairs; ++j) {
        const Pair param = load_pair(p, j), grad = load_pair(g, j), avg = load_pair(m, j), avg_sq = load_pair(v, j);
        const Moved low = move(param.low, grad.low, avg.low, avg_sq.low, h, from_grad);
        const Moved high = move(param.high, grad.high, avg.high, avg_sq.high, h, from_grad);
        store_pair(m, j, low.avg, high.avg);
        store_pair(v, j, low.avg_sq, high.avg_sq);
        store_pair(p, j, low.param, high.param);
    }
#pragma omp simd
    for (int64_t i = 2 * pairs; i < n; ++i) {
        const Moved moved = move(widen(p[i]), widen(g[i]), widen(m[i]), widen(v[i]), h, from_grad);
        narrow(moved.avg, m[i]);
        narrow(moved.avg_sq, v[i]);
        narrow(moved.param, p[i]);
    }
}

extern "C" void adamw_step(
    int64_t count, TENSOR** params, const TENSOR** grads, TENSOR** avgs, TENSOR** avg_sqs, const int64_t* sizes,
    const Hyper* hyper, int threads
) {
    // the processor's own prefetching does best alone here
    for_blocks(count, sizes, threads, [=](int64_t t, int64_t begin, int64_t end) {
        step(params[t] + begin, grads[t] + begin, avgs[t] + begin, avg_sqs[t] + begin, end - begin, hyper[t]);
    });
}
