// Lion's rule for one entry: reference/steps/lion_step.py.
//
// CAUTIOUS, ALIGNED, MAXIMIZE: 0 or 1.
#pragma once

#include "common.h"

// length * sign(x), without a product
static inline float along(float length, float x) {
    return x > 0.0f || x < 0.0f ? from_bits(to_bits(length) ^ (to_bits(x) & 0x80000000u)) : 0.0f;
}

static inline float sign(float x) { return along(1.0f, x); }

struct Moved {
    float weight, momentum;
};

// updates one entry
static inline Moved move(float gradient, float momentum, float weight, const float* scalars, float cautious_scale) {
    const float c = scalars[2] * momentum + scalars[3] * gradient;
    float update = sign(c), distance = along(scalars[0], c);
    if (CAUTIOUS) {
        update = update * gradient > 0.0f ? update * cautious_scale : 0.0f;
        distance = scalars[0] * update;
    }
    float decayed = weight * scalars[1];
    if (ALIGNED) decayed = update * weight >= 0.0f ? decayed : weight;
    return {decayed - distance, scalars[4] * momentum + scalars[5] * gradient};
}

static inline float signed_gradient(float gradient) { return MAXIMIZE ? -gradient : gradient; }
