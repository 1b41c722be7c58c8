// The instructions that linear.cpp is compiled to.
#include "instructions.h"

extern "C" int instructions() { return ISA; }
