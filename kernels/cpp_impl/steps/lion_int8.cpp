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

#if ISA >= 3
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

// updates PIECE entries with finite gradients, and writes the scales of their new momenta; a template, since it is compiled
// for parameters of bf16 alone
template <typename Param>
static inline void update(
    Param* __restrict p, const GRAD* __restrict g, const Code* __restrict codes, float* __restrict scales,
    StateT* __restrict state, const Settings& settings, uint32_t index, NewMomenta& updated
) {
    __m512 largest[BLOCKS];
    for (int64_t b = 0; b < BLOCKS; ++b) {
        const __m512 scale = _mm512_set1_ps(scales[b]);
        __m512 most = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
#pragma GCC unroll 2
        for (int64_t from = 0; from < SCALED; from += 64) {
            __m512i units[2];
            units_of<Code>(_mm512_loadu_si512(codes + b * SCALED + from), units);
#pragma GCC unroll 2
            for (int64_t j = from; j < from + 64; j += 32) {
                const int64_t i = b * SCALED + j;
                const Lanes gradient = signed_gradients(widen(_mm512_loadu_si512(g + i)));
                const Lanes unit = widen(units[(j - from) / 32]);
                Lanes momentum{_mm512_mul_ps(unit.low, scale), _mm512_mul_ps(unit.high, scale)};
                Lanes weight = weights_of<ROUNDING>(p + i, state + i);
                move(gradient.low, momentum.low, weight.low, settings);
                move(gradient.high, momentum.high, weight.high, settings);
                store_weights<ROUNDING>(weight, p + i, state + i, index + static_cast<uint32_t>(i), settings.seed);
                _mm512_store_ps(updated.momenta[b].low + j / 2, momentum.low);
                _mm512_store_ps(updated.momenta[b].high + j / 2, momentum.high);
                // magnitudes. NaN yields to numbers: momenta are NaN with their whole block alone.
                most = _mm512_range_ps(_mm512_range_ps(momentum.low, momentum.high, 0xB), most, 0xB);
            }
        }
        largest[b] = most;
    }
    ::scale<Code>(updated, largest_lanes(largest), scales);
}

// Steps n entries of adjacent blocks, a multiple of PIECE; returns whether all gradients are finite.
//
// The codes of a piece are written after the update of the next one, which hides the latency of the inverse scales.
template <typename Param>
static bool step_pieces(
    Param* p, const GRAD* g, Code* codes, float* scales, StateT* state, int64_t n, const Settings& settings,
    uint32_t index, uint32_t first_pair
) {
    NewMomenta pieces[2];
    NewMomenta *updated = pieces, *waiting = pieces + 1;
    Code* codes_of_waiting = nullptr;
    bool sound = true;
    for (int64_t at = 0; at < n; at += PIECE) {
        const auto i = index + static_cast<uint32_t>(at);
        const auto pair = first_pair + static_cast<uint32_t>(at / 2);
        StateT* of_weights = state ? state + at : nullptr;
        if (any_large<PIECE>(g + at) && any_nonfinite(g + at, PIECE)) {
            step<SKIP>(p + at, g + at, codes + at, scales + at / SCALED, of_weights, PIECE, settings, i, pair);
            sound = false;
            continue;
        }
        updated->first_pair = pair;
        update(p + at, g + at, codes + at, scales + at / SCALED, of_weights, settings, i, *updated);
        if (codes_of_waiting) encode(*waiting, settings.seed, codes_of_waiting);
        std::swap(updated, waiting), codes_of_waiting = codes + at;
    }
    if (codes_of_waiting) encode(*waiting, settings.seed, codes_of_waiting);
    return sound;
}

// steps n entries of adjacent blocks, fewer than PIECE, in copies
template <typename Param>
static bool step_short(
    Param* p, const GRAD* g, Code* codes, float* scales, StateT* state, int64_t n, const Settings& settings,
    uint32_t index, uint32_t first_pair
) {
    alignas(64) PARAM weights[PIECE] = {};
    alignas(64) GRAD gradients[PIECE] = {};
    alignas(64) Code of_momenta[PIECE] = {};
    StateT of_weights[PIECE] = {};
    float of_blocks[BLOCKS] = {};
    const int64_t blocks = (n + SCALED - 1) / SCALED;
    std::copy(p, p + n, weights), std::copy(g, g + n, gradients), std::copy(codes, codes + n, of_momenta);
    std::copy(scales, scales + blocks, of_blocks);
    if (state) std::copy(state, state + n, of_weights);
    const bool sound = step_pieces(
        weights, gradients, of_momenta, of_blocks, of_weights, PIECE, settings, index, first_pair);
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
    const auto from = [&](int64_t at, int64_t count, auto step_part) {
        return step_part(p + at, g + at, codes + at, scales + at / SCALED, state ? state + at : nullptr, count, settings,
                         index + static_cast<uint32_t>(at), first_pair + static_cast<uint32_t>(at / 2));
    };
#if ISA >= 3
    if constexpr (IN_REGISTERS) {
        const int64_t whole = n / PIECE * PIECE;
        const bool sound = !whole || from(0, whole, step_pieces<Param>);
        return (whole == n || from(whole, n - whole, step_short<Param>)) && sound;
    }
#endif
    bool sound = true;
    for (int64_t at = 0; at < n; at += PIECE) {
        const int64_t size = std::min(PIECE, n - at);
        const bool masked = SKIP && any_nonfinite(g + at, size);
        from(at, size, masked ? step<true> : step<false>);
        sound &= !masked;
    }
    return sound;
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
        const bool sound = step_blocks(
            params[t] + from, grads[t] + from, codes[t] + from, scales[t] + block, states ? states[t] + from : nullptr,
            size, settings, static_cast<uint32_t>(offset + from), static_cast<uint32_t>(first_pair)
        );
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
