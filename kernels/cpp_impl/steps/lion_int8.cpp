// Lion with an 8-bit momentum on a list of tensors: reference/steps/lion_int8.py, one pass over p, g and the codes.
//
// PARAM, GRAD: float or bf16. ROUNDING: see common.h. CAUTIOUS, ALIGNED, MAXIMIZE, SKIP, FP8: 0 or 1.
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
    PARAM* p, const GRAD* g, Code* codes, float* scales, StateT* state, int64_t n, const Settings& given,
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

#if ISA >= 3 && !FP8
constexpr bool IN_REGISTERS = all_bf16<PARAM, GRAD> && ROUNDING != KAHAN && ROUNDING != MASTER;

// move() of 16 entries
static inline void move(__m512 gradient, __m512& momentum, __m512& weight, const Settings& settings) {
    const auto scalar = [&](int i) { return _mm512_set1_ps(settings.scalars[i]); };
    const auto average = [&](int m, int g) {
        return _mm512_add_ps(_mm512_mul_ps(scalar(m), momentum), _mm512_mul_ps(scalar(g), gradient));
    };
    const __m512 c = average(2, 3), zero = _mm512_setzero_ps();
    __m512 decayed = _mm512_mul_ps(weight, scalar(1));
    // 1 with the sign of c, 0 for zeros and NaN. Four bits per class, from the lowest: NaN (quiet, signalling), 0, 1,
    // -inf, inf, negative, positive; 8: 0, 9: -1, 10: 1
    __m512 update = _mm512_fixupimm_ps(c, c, all(0xA9A9A888u), 0);
    if (CAUTIOUS) {
        const __mmask16 agrees = _mm512_cmp_ps_mask(_mm512_mul_ps(update, gradient), zero, _CMP_GT_OQ);
        update = _mm512_maskz_mul_ps(agrees, update, _mm512_set1_ps(settings.cautious_scale));
    }
    if (ALIGNED) {
        const __mmask16 aligned = _mm512_cmp_ps_mask(_mm512_mul_ps(update, weight), zero, _CMP_GE_OQ);
        decayed = _mm512_mask_mov_ps(weight, aligned, decayed);
    }
    momentum = average(4, 5);
    if (CAUTIOUS) {
        weight = _mm512_sub_ps(decayed, _mm512_mul_ps(scalar(0), update));
    } else {
        weight = _mm512_fnmadd_ps(scalar(0), update, decayed);  // a product with 1, 0 or -1 is exact
    }
}

static inline Lanes signed_gradients(Lanes x) {
    if (!MAXIMIZE) return x;
    const __m512 sign = _mm512_castsi512_ps(all(SIGN));
    return {_mm512_xor_ps(x.low, sign), _mm512_xor_ps(x.high, sign)};
}

// new momenta of a piece, and its old weights
struct Updates {
    alignas(64) PARAM weights[PIECE];
    alignas(64) StateT state[PIECE];
    Momenta momenta[BLOCKS];
    __m128 largest;  // momenta of the blocks
    bool sound;      // whether all gradients are finite
};

// updates PIECE entries; a template, since it is compiled for parameters of bf16 alone
template <typename Param>
static inline void update(
    Param* __restrict p, const GRAD* __restrict g, const int8_t* __restrict codes, const float* __restrict scales,
    StateT* __restrict state, const Settings& settings, uint32_t index, Updates& updates
) {
    __m512 largest[BLOCKS];
    __m512i gradients = _mm512_setzero_si512();
    for (int64_t b = 0; b < BLOCKS; ++b) {
        const __m512 scale = _mm512_set1_ps(scales[b]);
        __m512 most = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
#pragma GCC unroll 2
        for (int64_t from = 0; from < SCALED; from += 64) {
            __m512i units[2];
            units_of(_mm512_loadu_si512(codes + b * SCALED + from), units);
#pragma GCC unroll 2
            for (int64_t j = from; j < from + 64; j += 32) {
                const int64_t i = b * SCALED + j;
                const __m512i words = _mm512_loadu_si512(g + i);
                gradients = _mm512_max_epu16(gradients, _mm512_and_si512(words, all(0x7FFF7FFFu)));
                const Lanes gradient = signed_gradients(widen(words)), unit = widen(units[(j - from) / 32]);
                Lanes momentum{_mm512_mul_ps(unit.low, scale), _mm512_mul_ps(unit.high, scale)};
                Lanes weight = weights_of<ROUNDING>(p + i, state + i);
                std::memcpy(updates.weights + i, p + i, 32 * sizeof(PARAM));
                if (is_split<ROUNDING, PARAM>) std::memcpy(updates.state + i, state + i, 32);
                move(gradient.low, momentum.low, weight.low, settings);
                move(gradient.high, momentum.high, weight.high, settings);
                store_weights<ROUNDING>(weight, p + i, state + i, index + static_cast<uint32_t>(i), settings.seed);
                _mm512_store_ps(updates.momenta[b].low + j / 2, momentum.low);
                _mm512_store_ps(updates.momenta[b].high + j / 2, momentum.high);
                // magnitudes. NaN yields to numbers: a momentum is NaN with its gradient, or with its whole block.
                most = _mm512_range_ps(_mm512_range_ps(momentum.low, momentum.high, 0xB), most, 0xB);
            }
        }
        largest[b] = most;
    }
    updates.largest = largest_lanes(largest);
    updates.sound = !_mm512_cmpge_epu16_mask(gradients, all(0x7F807F80u));
}

// with SKIP, undoes the updates of entries with a non-finite gradient; finds the largest momenta, NaN among them
static void repair(
    PARAM* p, const GRAD* g, const int8_t* codes, const float* scales, StateT* state, Updates& updates
) {
    alignas(16) float largest[BLOCKS];
    for (int64_t b = 0; b < BLOCKS; ++b) {
        uint32_t most = 0;
        for (int64_t j = 0; j < SCALED; ++j) {
            const int64_t i = b * SCALED + j;
            float& momentum = (j % 2 ? updates.momenta[b].high : updates.momenta[b].low)[j / 2];
            if (SKIP && !is_finite(widen(g[i]))) {
                momentum = value_of(codes[i], scales[b]), p[i] = updates.weights[i];
                if (is_split<ROUNDING, PARAM>) state[i] = updates.state[i];
            }
            most = larger(most, momentum);
        }
        largest[b] = from_bits(most);
    }
    updates.largest = _mm_load_ps(largest);
}

// steps PIECE entries; returns whether all gradients are finite
template <typename Param>
static bool step_piece(
    Param* p, const GRAD* g, int8_t* codes, float* scales, StateT* state, const Settings& settings, uint32_t index,
    uint32_t first_pair
) {
    Updates updates;
    update(p, g, codes, scales, state, settings, index, updates);
    if (!updates.sound) repair(p, g, codes, scales, state, updates);
    quantize_piece(updates.momenta, updates.largest, codes, scales, first_pair, settings.seed);
    return updates.sound;
}

// steps n entries of adjacent blocks, fewer than PIECE, in copies
template <typename Param>
static bool step_short(
    Param* p, const GRAD* g, int8_t* codes, float* scales, StateT* state, int64_t n, const Settings& settings,
    uint32_t index, uint32_t first_pair
) {
    alignas(64) PARAM weights[PIECE] = {};
    alignas(64) GRAD gradients[PIECE] = {};
    alignas(64) int8_t of_momenta[PIECE] = {};
    StateT of_weights[PIECE] = {};
    float of_blocks[BLOCKS] = {};
    const int64_t blocks = (n + SCALED - 1) / SCALED;
    std::copy(p, p + n, weights), std::copy(g, g + n, gradients), std::copy(codes, codes + n, of_momenta);
    std::copy(scales, scales + blocks, of_blocks);
    if (state) std::copy(state, state + n, of_weights);
    const bool sound = step_piece(weights, gradients, of_momenta, of_blocks, of_weights, settings, index, first_pair);
    std::copy(weights, weights + n, p), std::copy(of_momenta, of_momenta + n, codes);
    std::copy(of_blocks, of_blocks + blocks, scales);
    if (state) std::copy(of_weights, of_weights + n, state);
    return sound;
}
#endif

// steps n entries of adjacent blocks; returns whether all gradients are finite, or count as such
template <typename Param>
static bool step_blocks(
    Param* p, const GRAD* g, Code* codes, float* scales, StateT* state, int64_t n, const Settings& settings,
    uint32_t index, uint32_t first_pair
) {
#if ISA >= 3 && !FP8
    if constexpr (IN_REGISTERS) {
        if (n == PIECE) return step_piece(p, g, codes, scales, state, settings, index, first_pair);
        return step_short(p, g, codes, scales, state, n, settings, index, first_pair);
    }
#endif
    const bool masked = SKIP && any_nonfinite(g, n);
    (masked ? step<true> : step<false>)(p, g, codes, scales, state, n, settings, index, first_pair);
    return !masked;
}

extern "C" void lion_step_int8(
    int64_t count, PARAM** params, const GRAD** grads, Code** codes, float** scales, StateT** states,
    const int64_t* rows, const int64_t* columns, const float* scalars, const float* cautious_scale,
    const int64_t* seeds, const int64_t* offsets, int32_t* flags, int threads
) {
    // pieces of a thread's share: divisions take as long as the step of a few entries
    for_pieces<BLOCK>(count, rows, columns, threads, [=](int64_t t, int64_t block, int64_t from, int64_t size) {
        Settings settings{{}, cautious_scale ? cautious_scale[t] : 1.0f, static_cast<uint32_t>(seeds[t])};
        std::copy(scalars, scalars + 6, settings.scalars);
        const int64_t offset = offsets ? offsets[t] : 0;
        const int64_t first_pair = (offset / columns[t] * blocks_of(columns[t]) + block) * (SCALED / 2);
        bool sound = true;
        for (int64_t at = from; at < from + size; at += PIECE, block += BLOCKS) {
            const int64_t n = std::min(PIECE, from + size - at);
            sound &= step_blocks(
                params[t] + at, grads[t] + at, codes[t] + at, scales[t] + block, states ? states[t] + at : nullptr, n,
                settings, static_cast<uint32_t>(offset + at), static_cast<uint32_t>(first_pair + (at - from) / 2)
            );
        }
        if (SKIP && !sound) raise_flag(flags + t);
    });
}

extern "C" void lion_agreement_int8(
    int64_t count, const GRAD** grads, const Code** codes, const float** scales, const int64_t* rows,
    const int64_t* columns, const float* scalars, int64_t* counts, int threads
) {
    const float beta1 = scalars[2], rest1 = scalars[3];
    for_pieces(count, rows, columns, threads, [=](int64_t t, int64_t block, int64_t from, int64_t n) {
        int32_t agreeing = 0;
        for (int64_t first = 0; first < n; first += SCALED, ++block) {
            const GRAD* g = grads[t] + from + first;
            const Code* m = codes[t] + from + first;
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
