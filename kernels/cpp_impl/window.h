// Number types of windows of gradients. WINDOW: float, bf16 or fp16.
#pragma once

#include "common.h"

namespace {

enum fp16 : uint16_t {};

inline float widen(fp16 value) {
    const uint32_t sign = (value & 0x8000u) << 16, magnitude = (value & 0x7FFFu) << 13;
    // the exponents' biases differ by 112; the product is also right for subnormal numbers
    const uint32_t finite = to_bits(from_bits(magnitude) * 0x1p112f);
    return from_bits(sign | (magnitude < 0x0F800000u ? finite : magnitude | 0x7F800000u));
}

// sum + a * b. Products of two numbers of a window are exact, so one rounding equals two.
inline double fused(double a, double b, double sum) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fma(a, b, sum);
#else
    return sum + a * b;
#endif
}

}  // namespace
