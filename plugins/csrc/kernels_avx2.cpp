// Every standard header comes first: what follows the pragma may use the wider instructions, shared inline code may not.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define BILEVEL_ISA avx2
#define BILEVEL_VECTOR_BYTES 32
#include "kernels.inc"
#endif
