// SwiGLU and its gradient: reference/lora_swiglu.py, one pass each. VALUE: float or bf16.
#include "common.h"

namespace {

// 1 / (1 + exp(-x)), within 3 units in the last place; the library's exp is not vectorised without -ffast-math
inline float sigmoid(float x) {
    // beyond these, the result is a subnormal or 1
    float t = -x;
    t = t > 87.0f ? 87.0f : t;
    t = t < -87.0f ? -87.0f : t;
    // exp(t) = 2^k exp(r), |r| <= ln(2) / 2, with ln(2) in two parts
    const float shifted = t * 1.44269504f + 12582912.0f;
    const float k = shifted - 12582912.0f;
    const float r = (t - k * 0.693359375f) + k * 2.12194440e-4f;
    float poly = 1.0f / 5040.0f;
    poly = poly * r + 1.0f / 720.0f;
    poly = poly * r + 1.0f / 120.0f;
    poly = poly * r + 1.0f / 24.0f;
    poly = poly * r + 1.0f / 6.0f;
    poly = poly * r + 0.5f;
    poly = poly * r + 1.0f;
    poly = poly * r + 1.0f;
    const uint32_t power = (to_bits(shifted) - 0x4B400000u + 127u) << 23;
    const float value = 1.0f / (1.0f + poly * from_bits(power));
    return x != x ? x : value;
}

}  // namespace

extern "C" void swiglu(
    int64_t size, const VALUE* __restrict e, const VALUE* __restrict u, VALUE* __restrict out, int threads
) {
    for_blocks(1, &size, threads, [=](int64_t, int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            const float x = widen(e[i]);
            VALUE rounded;
            narrow(x * sigmoid(x) * widen(u[i]), rounded);
            out[i] = rounded;
        }
    });
}

// the gradient of u is written over that of the output
extern "C" void swiglu_backward(
    int64_t size, VALUE* grad, const VALUE* __restrict e, const VALUE* __restrict u, VALUE* __restrict out,
    VALUE* __restrict de, int threads
) {
    for_blocks(1, &size, threads, [=](int64_t, int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            const float g = widen(grad[i]), x = widen(e[i]), v = widen(u[i]);
            const float s = sigmoid(x);
            VALUE h, first, second;
            narrow(x * s * v, h);
            narrow(g * v * s * (1.0f + x * (1.0f - s)), first);
            narrow(g * (x * s), second);
            out[i] = h;
            de[i] = first;
            grad[i] = second;
        }
    });
}
