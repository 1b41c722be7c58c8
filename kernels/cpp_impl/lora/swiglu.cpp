// SwiGLU and its gradient: reference/lora/swiglu.py, one pass each. VALUE: float or bf16.
#include "common.h"

namespace {

// 1 / (1 + exp(-x)), within 3 units in the last place; compilers vectorise std::exp only with -ffast-math
inline float sigmoid(float x) {
    // beyond these limits, the result is 1, or so small that 0 takes its place
    float t = -x;
    t = t > 88.0f ? 88.0f : t;
    t = t < -87.0f ? -87.0f : t;
    // exp(t) = 2^k exp(r), |r| <= ln(2) / 2, with ln(2) in two parts
    const float shifted = t * 1.44269504f + 12582912.0f;
    const float k = shifted - 12582912.0f;
    const float r = fused(k, 2.12194440e-4f, fused(k, -0.693359375f, t));
    float poly = 1.0f / 5040.0f;
    poly = fused(poly, r, 1.0f / 720.0f);
    poly = fused(poly, r, 1.0f / 120.0f);
    poly = fused(poly, r, 1.0f / 24.0f);
    poly = fused(poly, r, 1.0f / 6.0f);
    poly = fused(poly, r, 0.5f);
    poly = fused(poly, r, 1.0f);
    poly = fused(poly, r, 1.0f);
    const uint32_t power = (to_bits(shifted) - 0x4B400000u + 127u) << 23;
    const float value = x < -88.0f ? 0.0f : 1.0f / (1.0f + poly * from_bits(power));
    return x != x ? x : value;
}

struct Gradients {
    float out, of_e, of_u;
};

inline float forward(float e, float u) { return e * sigmoid(e) * u; }

inline Gradients backward(float g, float e, float u) {
    const float s = sigmoid(e);
    return {e * s * u, g * u * s * (1.0f + e * (1.0f - s)), g * (e * s)};
}

// elements begin..end in pairs, then the last one of an odd number; begin is even
void forward(
    const VALUE* __restrict e, const VALUE* __restrict u, VALUE* __restrict out, int64_t begin, int64_t end
) {
#pragma omp simd
    for (int64_t j = begin / 2; j < end / 2; ++j) {
        const Pair x = load_pair(e, j), v = load_pair(u, j);
        store_pair(out, j, forward(x.low, v.low), forward(x.high, v.high));
    }
    if (end % 2) narrow(forward(widen(e[end - 1]), widen(u[end - 1])), out[end - 1]);
}

void backward(
    VALUE* __restrict grad, const VALUE* __restrict e, const VALUE* __restrict u, VALUE* __restrict out,
    VALUE* __restrict de, int64_t begin, int64_t end
) {
#pragma omp simd
    for (int64_t j = begin / 2; j < end / 2; ++j) {
        const Pair g = load_pair(grad, j), x = load_pair(e, j), v = load_pair(u, j);
        const Gradients low = backward(g.low, x.low, v.low), high = backward(g.high, x.high, v.high);
        store_pair(out, j, low.out, high.out);
        store_pair(de, j, low.of_e, high.of_e);
        store_pair(grad, j, low.of_u, high.of_u);
    }
    if (end % 2) {
        const int64_t i = end - 1;
        const Gradients last = backward(widen(grad[i]), widen(e[i]), widen(u[i]));
        narrow(last.out, out[i]);
        narrow(last.of_e, de[i]);
        narrow(last.of_u, grad[i]);
    }
}

}  // namespace

extern "C" void swiglu(int64_t size, const VALUE* e, const VALUE* u, VALUE* out, int threads) {
    for_blocks(1, &size, threads, [=](int64_t, int64_t begin, int64_t end) { forward(e, u, out, begin, end); });
}

// the gradient of u overwrites the output's
extern "C" void swiglu_backward(
    int64_t size, VALUE* grad, const VALUE* e, const VALUE* u, VALUE* out, VALUE* de, int threads
) {
    for_blocks(1, &size, threads, [=](int64_t, int64_t begin, int64_t end) {
        backward(grad, e, u, out, de, begin, end);
    });
}
