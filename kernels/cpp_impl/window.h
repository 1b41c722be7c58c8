// Number types of windows of gradients. WINDOW: float, bf16 or fp16.
#pragma once

#include "common.h"

namespace {

// sum + a * b. Products of two numbers of a window are exact, so one rounding equals two.
inline double fused(double a, double b, double sum) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fma(a, b, sum);
#else
    return sum + a * b;
#endif
}

}  // namespace
