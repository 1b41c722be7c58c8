// Selects the vector instructions of the kernels that are written with intrinsics. A test defines ISA as a lower number.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(ISA)
#if defined(__AVX512VBMI__) && defined(__AVX512VBMI2__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__) && \
    defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ISA 3
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define ISA 2
#elif (defined(__AVX2__) && defined(__FMA__)) || defined(__aarch64__)
#define ISA 1
#else
#define ISA 0
#endif
#endif

#if ISA >= 2
namespace {

// The first numbers of a vector, moved to the lanes of a mask; the other lanes are zero.
//
// Zen 4 makes an expansion wait for what its destination held before, even where all of it is overwritten. The compiler
// writes all expansions of a loop to one register, and each then takes 5 cycles; into a cleared register it takes 1.3.
inline __m512 expand_ps(__mmask16 mask, __m512 from) {
    __m512 to = _mm512_setzero_ps();
    asm("vexpandps %2, %0%{%1%}%{z%}" : "+v"(to) : "Yk"(mask), "v"(from));
    return to;
}

#if ISA == 3
inline __m512i expand_epi16(__mmask32 mask, __m512i from) {
    __m512i to = _mm512_setzero_si512();
    asm("vpexpandw %2, %0%{%1%}%{z%}" : "+v"(to) : "Yk"(mask), "v"(from));
    return to;
}

inline __m512i expand_epi8(__mmask64 mask, __m512i from) {
    __m512i to = _mm512_setzero_si512();
    asm("vpexpandb %2, %0%{%1%}%{z%}" : "+v"(to) : "Yk"(mask), "v"(from));
    return to;
}
#endif

}  // namespace
#endif
