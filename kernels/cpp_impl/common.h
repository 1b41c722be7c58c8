// Number types, the four ways to round, and the split of a list of tensors over threads.
//
// Plain loops that the compiler vectorises; products and sums are not contracted (-ffp-contract=off), so that results
// are those of the definitions in kernels/reference, bit for bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <omp.h>

namespace {

// a scalar of its own type: selections between structs are not vectorised
enum bf16 : uint16_t {};

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline bool is_finite(float value) { return std::fabs(value) < std::numeric_limits<float>::infinity(); }

inline float widen(float value) { return value; }
inline float widen(bf16 value) { return from_bits(static_cast<uint32_t>(value) << 16); }

// to the nearest, ties to even
inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, bf16& out) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    out = static_cast<bf16>(value != value ? 0x7FC0u : rounded);
}

// two rounds of xor-shift and multiply: reference.rounding.hash32
inline uint32_t hash32(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
}

// up with the probability of the fraction that the upper 16 bits drop; the caller then rounds, which is exact
inline float round_stochastic(float value, uint32_t random) {
    const uint32_t pattern = (to_bits(value) + (random & 0xFFFFu)) & 0xFFFF0000u;
    return is_finite(value) ? from_bits(pattern) : value;
}

enum Rounding { NEAREST, STOCHASTIC, KAHAN, MASTER };

// parameter's dtype for Kahan's compensation, fp32 for a master copy
template <typename Param, int rounding>
struct Extra {
    using type = float;
};
template <typename Param>
struct Extra<Param, KAHAN> {
    using type = Param;
};

template <int rounding, typename Param, typename ExtraT>
inline float weight_of(Param param, const ExtraT* extra, int64_t i) {
    if constexpr (rounding == MASTER) return extra[i];
    if constexpr (rounding == KAHAN) return widen(param) + widen(extra[i]);
    return widen(param);
}

// writes the new weight where `keep` is false
template <int rounding, typename Param, typename ExtraT>
inline void store_weight(float value, bool keep, Param* param, ExtraT* extra, int64_t i, uint32_t index, uint32_t seed) {
    Param rounded;
    if constexpr (rounding == STOCHASTIC && sizeof(Param) == 2) {
        narrow(round_stochastic(value, hash32(index ^ seed)), rounded);
    } else {
        narrow(value, rounded);
    }
    if constexpr (rounding == KAHAN) {
        ExtraT lost;
        narrow(value - widen(rounded), lost);
        extra[i] = keep ? extra[i] : lost;
    }
    if constexpr (rounding == MASTER) extra[i] = keep ? extra[i] : value;
    param[i] = keep ? param[i] : rounded;
}

// elements a thread takes at a time: small enough to balance, large enough for the prefetcher
constexpr int64_t BLOCK = 16384;

// floats at an address that no vector read from it crosses a cache line
class Buffer {
public:
    explicit Buffer(int64_t size) : memory_(size + 16) {
        const auto address = reinterpret_cast<uintptr_t>(memory_.data());
        data_ = memory_.data() + (64 - address % 64) % 64 / sizeof(float);
    }
    float* data() { return data_; }

private:
    std::vector<float> memory_;
    float* data_;
};

// n floats, and what is left of the last cache line
constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// calls work(t, begin, end) for pieces of 0..sizes[t], each of block(t) or less; a thread's pieces are neighbours
template <typename Block, typename Work>
void for_blocks(int64_t count, const int64_t* sizes, int threads, Block block, Work work) {
    std::vector<int64_t> first(count + 1, 0);
    for (int64_t t = 0; t < count; ++t) first[t + 1] = first[t] + (sizes[t] + block(t) - 1) / block(t);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < first[count]; ++b) {
        const int64_t t = std::upper_bound(first.begin(), first.end(), b) - first.begin() - 1;
        const int64_t begin = (b - first[t]) * block(t);
        work(t, begin, std::min(begin + block(t), sizes[t]));
    }
}

template <typename Work>
void for_blocks(int64_t count, const int64_t* sizes, int threads, Work work) {
    for_blocks(count, sizes, threads, [](int64_t) { return BLOCK; }, work);
}

// elements that are fetched ahead, looked at and updated at a time
constexpr int64_t CHUNK = 256;

template <typename T>
inline bool any_nonfinite(const T* x, int64_t n) {
    int32_t bad = 0;
#pragma omp simd reduction(| : bad)
    for (int64_t i = 0; i < n; ++i) bad |= !is_finite(widen(x[i]));
    return bad != 0;
}

// asks for elements begin..end: the processor's own prefetching ends at every page
template <typename T>
inline void fetch(const T* x, int64_t begin, int64_t end) {
    const char* last = reinterpret_cast<const char*>(x + end);
    for (const char* line = reinterpret_cast<const char*>(x + begin); line < last; line += 64) __builtin_prefetch(line);
}

inline void raise_flag(int32_t* flag) {
#pragma omp atomic write
    *flag = 1;
}

}  // namespace
