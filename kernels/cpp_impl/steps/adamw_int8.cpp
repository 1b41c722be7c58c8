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

// updates the n parameters of one block
static inline void update(
    PARAM* __restrict p, const GRAD* __restrict g, const Code* __restrict codes, float scale,
    const uint8_t* __restrict square_codes, float square_scale, StateT* __restrict state, int64_t n,
    const Settings& settings, uint32_t index, Momenta& averages, Momenta& squares
) {
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

extern "C" void adamw_step_int8(
    int64_t count, PARAM** params, const GRAD** grads, Code** codes, float** scales, uint8_t** square_codes,
    float** square_scales, StateT** states, const int64_t* rows, const int64_t* columns, const float* scalars,
    const float* corrections, const int64_t* seeds, const int64_t* offsets, int64_t aligned, int64_t maximize, int threads
) {
    for_pieces(count, rows, columns, threads, [=](int64_t t, int64_t block, int64_t from, int64_t n) {
        const Settings settings{
            scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5],
            corrections[2 * t], corrections[2 * t + 1], maximize ? -1.0f : 1.0f, static_cast<uint32_t>(seeds[t]), aligned != 0
        };
        const int64_t offset = offsets ? offsets[t] : 0;
        const int64_t first_block = offset / columns[t] * blocks_of(columns[t]) + block;
        Momenta averages[BLOCKS], squares[BLOCKS];
        for (int64_t b = 0, at = from; b * SCALED < n; ++b, at += SCALED) {
            update(params[t] + at, grads[t] + at, codes[t] + at, scales[t][block + b], square_codes[t] + at,
                   square_scales[t][block + b], states ? states[t] + at : nullptr, std::min(SCALED, n - b * SCALED),
                   settings, static_cast<uint32_t>(offset + at), averages[b], squares[b]);
        }
        for (int64_t b = 0, at = from; b * SCALED < n; ++b, at += SCALED) {
            const uint32_t first_pair = static_cast<uint32_t>((first_block + b) * (SCALED / 2));
            const int64_t size = std::min(SCALED, n - b * SCALED);
            quantize(averages[b], size, codes[t] + at, scales[t] + block + b, first_pair, settings.seed);
            quantize(squares[b], size, square_codes[t] + at, square_scales[t] + block + b, first_pair, settings.seed);
        }
    });
}
