// The instructions that linear.cpp is compiled to: ISA, or 4 for NEON.
#include "instructions.h"

#if defined(__aarch64__) && ISA == 1
extern "C" int instructions() { return 4; }
#else
extern "C" int instructions() { return ISA; }
#endif
