// Lion with an 8-bit momentum on a list of tensors: reference/steps/lion_int8.py, one pass over p, g and the codes.
//
// PARAM, GRAD: float or bf16. ROUNDING: see common.h. CAUTIOUS, ALIGNED, MAXIMIZE, SKIP: 0 or 1.
#include "lion.h"

using StateT = RoundingState<PARAM, ROUNDING>::type;

// entries with one scale, and blocks that are updated, then quantized, at a time: the latencies of their largest entries
// and inverse scales overlap
constexpr int64_t SCALED = 128, BLOCKS = 8, PIECE = BLOCKS * SCALED;
constexpr float SMALLEST_SCALE = 0x1p-100f;
// codes are bits 19 to 25 of the fp32 pattern of 1 + |value| / scale, which is at most LARGEST
constexpr float LARGEST = 248.0f;
constexpr int DROPPED = 19;
constexpr uint32_t ONE = 0x3F800000u >> DROPPED;

static inline float value_of(int32_t code, float scale) {
    const uint32_t pattern = (static_cast<uint32_t>(std::abs(code)) + ONE) << DROPPED;
    const float magnitude = (from_bits(pattern) - 1.0f) * scale;
    return from_bits(to_bits(magnitude) ^ (static_cast<uint32_t>(code) & 0x80000000u));
}

// rounds up where 16 random bits are larger than the dropped bits
static inline int32_t code_of(float value, float inverse, uint32_t random) {
    const uint32_t pattern = to_bits(1.0f + std::fabs(value) * inverse) + (random << (DROPPED - 16));
    const int32_t code = std::min<int32_t>(static_cast<int32_t>((pattern >> DROPPED) - ONE), 127);
    return value < 0.0f ? -code : code;
}

// momenta of a block, neighbours in two arrays: vectors then need no permutation
struct Momenta {
    alignas(64) float low[SCALED / 2], high[SCALED / 2];
    float largest;
};

// writes the codes and the scale of n momenta
static inline void quantize(
    const Momenta& momenta, int64_t n, int8_t* __restrict codes, float* scale, uint32_t first_pair, uint32_t seed
) {
    const float unit = momenta.largest * (1.0f / (LARGEST - 1.0f));
    if (!(is_finite(unit) && unit >= SMALLEST_SCALE)) {
        *scale = is_finite(unit) ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        std::fill(codes, codes + n, int8_t{0});
        return;
    }
    *scale = unit;
    const float inverse = 1.0f / unit;
#pragma omp simd
    for (int64_t j = 0; j < n / 2; ++j) {
        const uint32_t random = hash32((first_pair + static_cast<uint32_t>(j)) ^ ~seed);
        const int32_t low = code_of(momenta.low[j], inverse, random & 0xFFFFu);
        const int32_t high = code_of(momenta.high[j], inverse, random >> 16);
        const uint16_t word = static_cast<uint16_t>((low & 0xFF) | (high << 8));
        std::memcpy(codes + 2 * j, &word, sizeof word);
    }
    if (n % 2) {
        const uint32_t random = hash32((first_pair + static_cast<uint32_t>(n / 2)) ^ ~seed);
        codes[n - 1] = static_cast<int8_t>(code_of(momenta.low[n / 2], inverse, random & 0xFFFFu));
    }
}

struct Settings {
    float scalars[6], cautious_scale;
    uint32_t seed;
};

// updates the n parameters of one block; with `skipping`, not those whose gradient is not finite
template <bool skipping>
static inline void update(
    PARAM* __restrict p, const GRAD* __restrict g, const int8_t* __restrict codes, float scale,
    StateT* __restrict state, int64_t n, const Settings& settings, uint32_t index, Momenta& momenta
) {
    constexpr bool in_pairs = !skipping && all_bf16<PARAM, GRAD>;
    const uint32_t seed = settings.seed;
    uint32_t largest = 0;
    // updates entry i, and returns its momentum
    const auto one = [&](int64_t i) {
        const float gradient = signed_gradient(widen(g[i])), momentum = value_of(codes[i], scale);
        const float weight = weight_of<ROUNDING>(p[i], state, i);
        const Moved moved = move(gradient, momentum, weight, settings.scalars, settings.cautious_scale);
        const bool keep = skipping && !is_finite(gradient);
        store_weight<ROUNDING>(moved.weight, keep, p, state, i, index + static_cast<uint32_t>(i), seed);
        return keep ? momentum : moved.momentum;
    };
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < n / 2; ++j) {
        float low, high;
        if constexpr (in_pairs) {
            int16_t word;
            std::memcpy(&word, codes + 2 * j, sizeof word);
            const int32_t second = word >> 8, first = static_cast<int32_t>(static_cast<uint32_t>(word) << 24) >> 24;
            const Pair gradient = load_pair(g, j), weight = weights_of<ROUNDING>(p, state, j);
            const Moved even = move(signed_gradient(gradient.low), value_of(first, scale), weight.low,
                                    settings.scalars, settings.cautious_scale);
            const Moved odd = move(signed_gradient(gradient.high), value_of(second, scale), weight.high,
                                   settings.scalars, settings.cautious_scale);
            const uint32_t i = index + static_cast<uint32_t>(2 * j);
            store_weights<ROUNDING>({even.weight, odd.weight}, p, state, j, i, seed);
            low = even.momentum, high = odd.momentum;
        } else {
            low = one(2 * j), high = one(2 * j + 1);
        }
        momenta.low[j] = low, momenta.high[j] = high;
        largest = std::max(largest, std::max(to_bits(low) & 0x7FFFFFFFu, to_bits(high) & 0x7FFFFFFFu));
    }
    if (n % 2) {
        momenta.low[n / 2] = one(n - 1);
        largest = std::max(largest, to_bits(momenta.low[n / 2]) & 0x7FFFFFFFu);
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
    Momenta momenta[BLOCKS];
    for (int64_t b = 0, from = 0; from < n; ++b, from += SCALED) {
        update<skipping>(p + from, g + from, codes + from, scales[b], state ? state + from : nullptr,
                         std::min(SCALED, n - from), settings, index + static_cast<uint32_t>(from), momenta[b]);
    }
    for (int64_t b = 0, from = 0; from < n; ++b, from += SCALED) {
        quantize(momenta[b], std::min(SCALED, n - from), codes + from, scales + b,
                 first_pair + static_cast<uint32_t>(from / 2), settings.seed);
    }
}

static int64_t blocks_of(int64_t columns) { return (columns + SCALED - 1) / SCALED; }

// calls work(t, first block, first entry, entries) for adjacent blocks of every tensor [rows, columns]
template <typename Work>
static void for_pieces(int64_t count, const int64_t* rows, const int64_t* columns, int threads, Work work) {
    std::vector<int64_t> blocks(count);
    for (int64_t t = 0; t < count; ++t) blocks[t] = rows[t] * blocks_of(columns[t]);
    const auto share = [](int64_t) { return BLOCK / SCALED; };
    for_blocks(count, blocks.data(), threads, share, [&](int64_t t, int64_t begin, int64_t end) {
        // the blocks of several rows are adjacent if none is short
        const bool whole = columns[t] % SCALED == 0;
        const int64_t width = whole ? rows[t] * columns[t] : columns[t], per_row = blocks_of(width);
        for (int64_t block = begin; block < end;) {
            const int64_t column = block % per_row * SCALED, most = std::min(PIECE, (end - block) * SCALED);
            const int64_t n = std::min(most, width - column);
            work(t, block, block / per_row * width + column, n);
            block += blocks_of(n);
        }
    });
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
