// Selects the vector instructions of the kernels that are written with intrinsics. A test defines ISA as a lower number.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(ISA)
#if defined(__AVX512VBMI__) && defined(__AVX512VBMI2__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__) && \
    defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ISA 3
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define ISA 2
#elif defined(__AVX2__) && defined(__FMA__)
#define ISA 1
#else
#define ISA 0
#endif
#endif
