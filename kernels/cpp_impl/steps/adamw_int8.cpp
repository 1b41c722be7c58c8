// AdamW with 8-bit moments on a list of tensors: reference/steps/adamw_int8.py, one pass over p, g and the codes.
//
// PARAM, GRAD: float or bf16. ROUNDING: see common.h. FP8: 0 or 1.
#include "quantized.h"

using StateT = RoundingState<PARAM, ROUNDING>::type;

struct Settings {
    float decay, beta1, rest1, beta2, rest2, eps, size, inverse_root, direction;
    uint32_t seed;
    bool aligned;
};

// updates the n parameters of one block, and computes their moments
static inline void update(
    PARAM* __restrict p, const GRAD* __restrict g, const Code* __restrict codes, float scale,
    const uint8_t* __restrict square_codes, float square_scale, StateT* __restrict state, int64_t n,
    const Settings& given, uint32_t index, Momenta& averages, Momenta& squares
) {
    // a copy, which no pointer to float can change: the loop is not in vectors otherwise
    const Settings settings = given;
    uint32_t largest = 0, largest_square = 0;
    // updates entry i, and writes its moments
    const auto one = [&](int64_t i, float& average, float& square) {
        const float gradient = settings.direction * widen(g[i]);
        average = settings.beta1 * value_of(codes[i], scale) + settings.rest1 * gradient;
        square = settings.beta2 * value_of(square_codes[i], square_scale) + (settings.rest2 * gradient) * gradient;
        // an infinite square would make its block NaN
        constexpr float most = std::numeric_limits<float>::max();
        square = square > most ? most : square;
        const float step = settings.size * (average / (std::sqrt(square) * settings.inverse_root + settings.eps));
        const float weight = weight_of<ROUNDING>(p[i], state, i);
        const float decayed = settings.aligned & !(average * weight >= 0.0f) ? weight : weight * settings.decay;
        store_weight<ROUNDING>(decayed - step, false, p, state, i, index + static_cast<uint32_t>(i), settings.seed);
    };
#pragma omp simd reduction(max : largest, largest_square)
    for (int64_t j = 0; j < n / 2; ++j) {
        one(2 * j, averages.low[j], squares.low[j]);
        one(2 * j + 1, averages.high[j], squares.high[j]);
        largest = larger(larger(largest, averages.low[j]), averages.high[j]);
        largest_square = larger(larger(largest_square, squares.low[j]), squares.high[j]);
    }
    if (n % 2) {
        one(n - 1, averages.low[n / 2], squares.low[n / 2]);
        averages.high[n / 2] = squares.high[n / 2] = 0.0f;
        largest = larger(largest, averages.low[n / 2]);
        largest_square = larger(largest_square, squares.low[n / 2]);
    }
    averages.largest = from_bits(largest);
    squares.largest = from_bits(largest_square);
}

// codes and scales of one moment, from the first entry of a block on
template <typename Any>
struct Moments {
    Any* codes;
    float* scales;
    Moments from(int64_t entry) const { return {codes + entry, scales + entry / SCALED}; }
};

// steps n entries of adjacent blocks, at most PIECE
static void step_blocks(
    PARAM* p, const GRAD* g, Moments<Code> average, Moments<uint8_t> square, StateT* state, int64_t n,
    const Settings& settings, uint32_t index, uint32_t first_pair
) {
    Momenta averages[BLOCKS], squares[BLOCKS];
    for (int64_t b = 0, at = 0; at < n; ++b, at += SCALED) {
        update(p + at, g + at, average.codes + at, average.scales[b], square.codes + at, square.scales[b],
               state ? state + at : nullptr, std::min(SCALED, n - at), settings, index + static_cast<uint32_t>(at),
               averages[b], squares[b]);
    }
    for (int64_t b = 0, at = 0; at < n; ++b, at += SCALED) {
        const uint32_t pair = first_pair + static_cast<uint32_t>(at / 2);
        const int64_t size = std::min(SCALED, n - at);
        quantize(averages[b], size, average.codes + at, average.scales + b, pair, settings.seed);
        quantize(squares[b], size, square.codes + at, square.scales + b, pair, settings.seed);
    }
}

#if ISA >= 3
constexpr bool IN_REGISTERS = all_bf16<PARAM, GRAD> && ROUNDING != KAHAN && ROUNDING != MASTER;

// updates 16 entries and their moments
static inline void update(
    __m512 gradient, __m512& average, __m512& square, __m512& weight, const Settings& settings
) {
    const auto scaled = [](float factor, __m512 x) { return _mm512_mul_ps(_mm512_set1_ps(factor), x); };
    gradient = scaled(settings.direction, gradient);
    average = _mm512_add_ps(scaled(settings.beta1, average), scaled(settings.rest1, gradient));
    square = _mm512_add_ps(scaled(settings.beta2, square), _mm512_mul_ps(scaled(settings.rest2, gradient), gradient));
    // NaN passes; an infinite square would make its block NaN
    square = _mm512_min_ps(_mm512_set1_ps(std::numeric_limits<float>::max()), square);
    const __m512 root = scaled(settings.inverse_root, _mm512_sqrt_ps(square));
    const __m512 denominator = _mm512_add_ps(root, _mm512_set1_ps(settings.eps));
    const __m512 step = scaled(settings.size, _mm512_div_ps(average, denominator));
    __m512 decayed = scaled(settings.decay, weight);
    if (settings.aligned) {
        const __m512 product = _mm512_mul_ps(average, weight);
        const __mmask16 aligned = _mm512_cmp_ps_mask(product, _mm512_setzero_ps(), _CMP_GE_OQ);
        decayed = _mm512_mask_mov_ps(weight, aligned, decayed);
    }
    weight = _mm512_sub_ps(decayed, step);
}

// the larger magnitudes. NaN yields to numbers: moments of finite gradients are NaN with their whole block alone.
static inline __m512 larger(__m512 x, __m512 y) { return _mm512_range_ps(x, y, 0xB); }

static inline Lanes scaled(Lanes x, __m512 by) { return {_mm512_mul_ps(x.low, by), _mm512_mul_ps(x.high, by)}; }

// updates PIECE entries with finite gradients, and writes the scales of their new moments
template <typename Param, typename Grad>
static inline void update_piece(
    Param* __restrict p, const Grad* __restrict g, Moments<Code> average, Moments<uint8_t> square,
    StateT* __restrict state, const Settings& settings, uint32_t index, NewMomenta& averages, NewMomenta& squares
) {
    __m512 largest[BLOCKS], largest_square[BLOCKS];
    for (int64_t b = 0; b < BLOCKS; ++b) {
        const __m512 scale = _mm512_set1_ps(average.scales[b]), square_scale = _mm512_set1_ps(square.scales[b]);
        __m512 most = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()), most_square = most;
        for (int64_t from = 0; from < SCALED; from += 64) {
            __m512i units[2];
            units_of<Code>(_mm512_loadu_si512(average.codes + b * SCALED + from), units);
#pragma GCC unroll 2
            for (int64_t j = from; j < from + 64; j += 32) {
                const int64_t i = b * SCALED + j;
                const Lanes gradient = widen(_mm512_loadu_si512(g + i)), unit = widen(units[(j - from) / 32]);
                const Lanes unit_square = units_of_squares(square.codes + i);
                Lanes mean = scaled(unit, scale), mean_square = scaled(unit_square, square_scale);
                Lanes weight = weights_of<ROUNDING>(p + i, state + i);
                update(gradient.low, mean.low, mean_square.low, weight.low, settings);
                update(gradient.high, mean.high, mean_square.high, weight.high, settings);
                store_weights<ROUNDING>(weight, p + i, state + i, index + static_cast<uint32_t>(i), settings.seed);
                _mm512_store_ps(averages.momenta[b].low + j / 2, mean.low);
                _mm512_store_ps(averages.momenta[b].high + j / 2, mean.high);
                _mm512_store_ps(squares.momenta[b].low + j / 2, mean_square.low);
                _mm512_store_ps(squares.momenta[b].high + j / 2, mean_square.high);
                most = larger(larger(mean.low, mean.high), most);
                most_square = larger(larger(mean_square.low, mean_square.high), most_square);
            }
        }
        largest[b] = most, largest_square[b] = most_square;
    }
    scale<Code>(averages, largest_lanes(largest), average.scales);
    scale<uint8_t>(squares, largest_lanes(largest_square), square.scales);
}

// Steps n entries of adjacent blocks, a multiple of PIECE.
//
// The codes of a piece are written after the update of the next one, which hides the latency of the inverse scales.
template <typename Param, typename Grad>
static void step_pieces(
    Param* p, const Grad* g, Moments<Code> average, Moments<uint8_t> square, StateT* state, int64_t n,
    const Settings& settings, uint32_t index, uint32_t first_pair
) {
    NewMomenta averages[2], squares[2];
    int64_t waiting = -1;  // the first entry of the piece whose codes are not written
    int slot = 0;          // of the piece to update; the one that waits has the other
    const auto write = [&] {
        if (waiting < 0) return;
        encode(averages[1 - slot], settings.seed, average.codes + waiting);
        encode(squares[1 - slot], settings.seed ^ SQUARES, square.codes + waiting);
    };
    for (int64_t at = 0; at < n; at += PIECE) {
        const auto i = index + static_cast<uint32_t>(at);
        const auto pair = first_pair + static_cast<uint32_t>(at / 2);
        StateT* of_weights = state ? state + at : nullptr;
        if (any_large<PIECE>(g + at) && any_nonfinite(g + at, PIECE)) {
            step_blocks(p + at, g + at, average.from(at), square.from(at), of_weights, PIECE, settings, i, pair);
            continue;
        }
        averages[slot].first_pair = squares[slot].first_pair = pair;
        update_piece(p + at, g + at, average.from(at), square.from(at), of_weights, settings, i, averages[slot],
                     squares[slot]);
        write();
        slot = 1 - slot, waiting = at;
    }
    write();
}
#endif

// steps n entries of adjacent blocks; a template, since pieces are compiled for parameters of bf16 alone
template <typename Param, typename Grad>
static void step(
    Param* p, const Grad* g, Moments<Code> average, Moments<uint8_t> square, StateT* state, int64_t n,
    const Settings& settings, uint32_t index, uint32_t first_pair
) {
    int64_t at = 0;
#if ISA >= 3
    if constexpr (IN_REGISTERS) {
        at = n / PIECE * PIECE;
        step_pieces(p, g, average, square, state, at, settings, index, first_pair);
    }
#endif
    for (; at < n; at += PIECE) {
        step_blocks(p + at, g + at, average.from(at), square.from(at), state ? state + at : nullptr,
                    std::min(PIECE, n - at), settings, index + static_cast<uint32_t>(at),
                    first_pair + static_cast<uint32_t>(at / 2));
    }
}

extern "C" void adamw_step_int8(
    int64_t count, PARAM** params, const GRAD** grads, Code** codes, float** scales, uint8_t** square_codes,
    float** square_scales, StateT** states, const int64_t* rows, const int64_t* columns, const float* scalars,
    const float* corrections, const int64_t* seeds, const int64_t* offsets, int64_t aligned, int64_t maximize,
    int threads
) {
    for_pieces<BLOCK>(count, rows, columns, threads, [=](int64_t t, int64_t block, int64_t from, int64_t n) {
        const Settings settings{
            scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5],
            corrections[2 * t], corrections[2 * t + 1], maximize ? -1.0f : 1.0f, static_cast<uint32_t>(seeds[t]),
            aligned != 0
        };
        const int64_t offset = offsets ? offsets[t] : 0;
        const int64_t first_pair = (offset / columns[t] * blocks_of(columns[t]) + block) * (SCALED / 2);
        step(params[t] + from, grads[t] + from, Moments<Code>{codes[t] + from, scales[t] + block},
             Moments<uint8_t>{square_codes[t] + from, square_scales[t] + block}, states ? states[t] + from : nullptr, n,
             settings, static_cast<uint32_t>(offset + from), static_cast<uint32_t>(first_pair));
    });
}
