// Lion with an 8-bit momentum on a list of tensors: reference/steps/lion_int8.py, one pass over p, g and the codes.
//
// PARAM, GRAD: float or bf16. ROUNDING: see common.h. CAUTIOUS, ALIGNED, MAXIMIZE, SKIP: 0 or 1.
#include "lion.h"
#include "quantized.h"

using StateT = RoundingState<PARAM, ROUNDING>::type;

struct Settings {
    float scalars[6], cautious_scale;
    uint32_t seed;
};

// updates the n parameters of one block; with `skipping`, not those whose gradient is not finite
template <bool skipping>
static inline void update(
    PARAM* __restrict p, const GRAD* __restrict g, const bf16* __restrict stored, float scale, StateT* __restrict state,
    int64_t n, const Settings& settings, uint32_t index, Momenta& momenta
) {
    constexpr bool in_pairs = !skipping && all_bf16<PARAM, GRAD>;
    const uint32_t seed = settings.seed;
    // updates entry i, and returns its momentum
    const auto one = [&](int64_t i) {
        const float gradient = signed_gradient(widen(g[i])), momentum = unit_of(widen(stored[i])) * scale;
        const float weight = weight_of<ROUNDING>(p[i], state, i);
        const Moved moved = move(gradient, momentum, weight, settings.scalars, settings.cautious_scale);
        const bool keep = skipping && !is_finite(gradient);
        store_weight<ROUNDING>(moved.weight, keep, p, state, i, index + static_cast<uint32_t>(i), seed);
        return keep ? momentum : moved.momentum;
    };
    if constexpr (!in_pairs) {
        for_entries(n, momenta, one);
        return;
    }
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < n / 2; ++j) {
        const Pair gradient = load_pair(g, j), coded = load_pair(stored, j), weight = weights_of<ROUNDING>(p, state, j);
        const Moved even = move(signed_gradient(gradient.low), unit_of(coded.low) * scale, weight.low, settings.scalars,
                                settings.cautious_scale);
        const Moved odd = move(signed_gradient(gradient.high), unit_of(coded.high) * scale, weight.high, settings.scalars,
                               settings.cautious_scale);
        const uint32_t i = index + static_cast<uint32_t>(2 * j);
        store_weights<ROUNDING>({even.weight, odd.weight}, p, state, j, i, seed);
        momenta.low[j] = even.momentum, momenta.high[j] = odd.momentum;
        largest = larger(larger(largest, even.momentum), odd.momentum);
    }
    if (n % 2) {
        momenta.low[n / 2] = one(n - 1), momenta.high[n / 2] = 0.0f;
        largest = larger(largest, momenta.low[n / 2]);
    }
    momenta.largest = from_bits(largest);
}

// steps n entries of adjacent blocks
template <bool skipping>
static void step(
    PARAM* p, const GRAD* g, int8_t* codes, float* scales, StateT* state, int64_t n, const Settings& given,
    uint32_t index, uint32_t first_pair
) {
    const Settings settings = given;
    alignas(64) bf16 stored[PIECE];
    Momenta momenta[BLOCKS];
    stored_of(codes, n, stored);
    for (int64_t b = 0, from = 0; from < n; ++b, from += SCALED) {
        const auto block = [&](int64_t size) {
            update<skipping>(p + from, g + from, stored + from, scales[b], state ? state + from : nullptr, size,
                             settings, index + static_cast<uint32_t>(from), momenta[b]);
        };
        // loops of a constant length have no remainder
        if (n - from >= SCALED) {
            block(SCALED);
        } else {
            block(n - from);
        }
    }
    for (int64_t b = 0, from = 0; from < n; ++b, from += SCALED) {
        quantize(momenta[b], std::min(SCALED, n - from), codes + from, scales + b,
                 first_pair + static_cast<uint32_t>(from / 2), settings.seed);
    }
}

extern "C" void lion_step_int8(
    int64_t count, PARAM** params, const GRAD** grads, int8_t** codes, float** scales, StateT** states,
    const int64_t* rows, const int64_t* columns, const float* scalars, const float* cautious_scale,
    const int64_t* seeds, const int64_t* offsets, int32_t* flags, int threads
) {
    for_pieces(count, rows, columns, threads, [=](int64_t t, int64_t block, int64_t from, int64_t n) {
        Settings settings{{}, cautious_scale ? cautious_scale[t] : 1.0f, static_cast<uint32_t>(seeds[t])};
        std::copy(scalars, scalars + 6, settings.scalars);
        const int64_t offset = offsets ? offsets[t] : 0;
        const int64_t first_pair = (offset / columns[t] * blocks_of(columns[t]) + block) * (SCALED / 2);
        const bool masked = SKIP && any_nonfinite(grads[t] + from, n);
        (masked ? step<true> : step<false>)(
            params[t] + from, grads[t] + from, codes[t] + from, scales[t] + block, states ? states[t] + from : nullptr,
            n, settings, static_cast<uint32_t>(offset + from), static_cast<uint32_t>(first_pair)
        );
        if (masked) raise_flag(flags + t);
    });
}

extern "C" void lion_agreement_int8(
    int64_t count, const GRAD** grads, const int8_t** codes, const float** scales, const int64_t* rows,
    const int64_t* columns, const float* scalars, int64_t* counts, int threads
) {
    const float beta1 = scalars[2], rest1 = scalars[3];
    for_pieces(count, rows, columns, threads, [=](int64_t t, int64_t block, int64_t from, int64_t n) {
        int32_t agreeing = 0;
        for (int64_t first = 0; first < n; first += SCALED, ++block) {
            const GRAD* g = grads[t] + from + first;
            const int8_t* m = codes[t] + from + first;
            const float scale = scales[t][block];
            const int64_t size = std::min(SCALED, n - first);
#pragma omp simd reduction(+ : agreeing)
            for (int64_t i = 0; i < size; ++i) {
                const float gradient = signed_gradient(widen(g[i]));
                const float c = beta1 * value_of(m[i], scale) + rest1 * gradient;
                agreeing += sign(c) * gradient > 0.0f && !(SKIP && !is_finite(gradient));
            }
        }
#pragma omp atomic
        counts[t] += agreeing;
    });
}
