// p = p * decay - step * ((r_i * G_ij) * c_j) on some rows of a matrix: reference/steps/scaled_step.py, one pass.
//
// PARAM, MAT: float or bf16. ROUNDING: see common.h. SKIP: do not update matrices with a NaN column scale. ALIGNED: decay
// only entries whose update and value agree in sign.
#pragma once

#include "common.h"

namespace {

// elements of a row that are updated at a time, while the next parameters are fetched; gradients are in the cache
constexpr int64_t PIECE = 4 * CHUNK;

using StateT = RoundingState<PARAM, ROUNDING>::type;

inline float moved(float weight, float update, float size, float decay) {
    float decayed = weight * decay;
    if (ALIGNED) decayed = update * weight >= 0.0f ? decayed : weight;
    return decayed - size * update;
}

void step_row(
    PARAM* __restrict p, const MAT* __restrict g, const float* __restrict c, StateT* __restrict state, int64_t n,
    float r, const float* scalars, uint32_t seed, uint32_t offset
) {
    const float size = scalars[0], decay = scalars[1];
    int64_t done = 0;
    // pairs of a master are as slow as elements
    if constexpr (all_bf16<PARAM, MAT> && ROUNDING != MASTER) {
        done = n / 2 * 2;
#pragma omp simd
        for (int64_t j = 0; j < n / 2; ++j) {
            const Pair gradient = load_pair(g, j), weight = weights_of<ROUNDING>(p, state, j);
            const uint32_t index = offset + static_cast<uint32_t>(2 * j);
            const float low = moved(weight.low, (r * gradient.low) * c[2 * j], size, decay);
            const float high = moved(weight.high, (r * gradient.high) * c[2 * j + 1], size, decay);
            store_weights<ROUNDING>({low, high}, p, state, j, index, seed);
        }
    }
#pragma omp simd
    for (int64_t j = done; j < n; ++j) {
        const float update = (r * widen(g[j])) * c[j];
        const float value = moved(weight_of<ROUNDING>(p[j], state, j), update, size, decay);
        store_weight<ROUNDING>(value, false, p, state, j, offset + static_cast<uint32_t>(j), seed);
    }
}

// A list of contiguous matrices. owners[t]: index of matrix t's tensor in the caller's list. offsets[t]: index of the
// matrix's first element in the whole tensor. all_runs: null, or the runs of every tensor; a matrix begins a run.
struct Targets {
    PARAM** params;
    const MAT** mats;
    float** rows;
    float** cols;
    StateT** states;
    const int64_t* widths;
    const float* scalars;
    const int64_t* seeds;
    const int64_t* offsets;
    const int64_t* all_runs;
    const int64_t* owners;
    int32_t* flags;

    bool bad(int64_t t) const {
        return SKIP && std::any_of(cols[t], cols[t] + widths[t], [](float c) { return c != c; });
    }

    // rows begin..end of matrix t
    void step(int64_t t, int64_t begin, int64_t end) const {
        const int64_t n = widths[t];
        const Runs runs{all_runs ? all_runs + 4 * owners[t] : nullptr};
        int64_t length;
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t from = 0; from < n; from += length) {
                const int64_t here = i * n + from;
                length = runs.rest(here, std::min(PIECE, n - from));
                const int64_t next = std::min(here + PIECE, end * n);
                fetch(params[t], next, std::min(next + PIECE, end * n));
                step_row(params[t] + here, mats[t] + here, cols[t] + from, states ? states[t] + here : nullptr, length,
                         rows[t][i], scalars, seeds ? static_cast<uint32_t>(seeds[t]) : 0u,
                         static_cast<uint32_t>(offsets[t] + runs.index(here)));
            }
        }
    }
};

}  // namespace
