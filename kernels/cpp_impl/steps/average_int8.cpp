// An average in 8 bits on a list of tensors: reference/steps/average_int8.py, one pass over g and the codes.
//
// GRAD: float or bf16. NESTEROV, UPDATE, FP8: 0 or 1.
#include "quantized.h"

struct Settings {
    float beta, rest, direction;
    uint32_t seed;
};

// averages the n entries of one block; `fresh`: without the old average
template <bool fresh, bool skipped>
static inline void average(
    const GRAD* __restrict g, const bf16* __restrict stored, float scale, float* __restrict output, int64_t n,
    const Settings& settings, Momenta& averages
) {
    for_entries(n, averages, [&](int64_t i) {
        const float gradient = settings.direction * widen(g[i]), old = unit_of(widen(stored[i])) * scale;
        float value = old;
        if constexpr (UPDATE && !skipped) value = fresh ? gradient : settings.beta * old + settings.rest * gradient;
        if (output) {
            output[i] = NESTEROV && !skipped ? settings.beta * value + settings.rest * gradient : value;
        }
        return value;
    });
}

// averages n entries of adjacent blocks
template <bool fresh, bool skipped>
static void step(
    const GRAD* g, Code* codes, float* scales, float* output, int64_t n, const Settings& given, uint32_t first_pair
) {
    const Settings settings = given;
    alignas(64) bf16 stored[PIECE];
    Momenta averages[BLOCKS];
    stored_of(codes, n, stored);
    for (int64_t b = 0, from = 0; from < n; ++b, from += SCALED) {
        const auto block = [&](int64_t size) {
            average<fresh, skipped>(g + from, stored + from, scales[b], output ? output + from : nullptr, size, settings,
                                    averages[b]);
        };
        // loops of a constant length have no remainder
        if (n - from >= SCALED) {
            block(SCALED);
        } else {
            block(n - from);
        }
    }
    if (!UPDATE || skipped) return;
    for (int64_t b = 0, from = 0; from < n; ++b, from += SCALED) {
        quantize(averages[b], std::min(SCALED, n - from), codes + from, scales + b,
                 first_pair + static_cast<uint32_t>(from / 2), settings.seed);
    }
}

extern "C" void average_step_int8(
    int64_t count, const GRAD** grads, Code** codes, float** scales, float** outputs, const int64_t* rows,
    const int64_t* columns, const float* scalars, const int64_t* seeds, const int64_t* offsets, const int32_t* skip,
    int64_t maximize, int threads
) {
    for_pieces(count, rows, columns, threads, [=](int64_t t, int64_t block, int64_t from, int64_t n) {
        const Settings settings{scalars[0], scalars[1], maximize ? -1.0f : 1.0f, static_cast<uint32_t>(seeds[t])};
        const int64_t offset = offsets ? offsets[t] : 0;
        const int64_t first_pair = (offset / columns[t] * blocks_of(columns[t]) + block) * (SCALED / 2);
        const bool skipped = skip && skip[t] > 0, fresh = settings.beta == 0.0f;
        (skipped ? step<false, true> : fresh ? step<true, false> : step<false, false>)(
            grads[t] + from, codes[t] + from, scales[t] + block, outputs ? outputs[t] + from : nullptr, n, settings,
            static_cast<uint32_t>(first_pair)
        );
    });
}
