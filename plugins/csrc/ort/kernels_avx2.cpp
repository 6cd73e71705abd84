// Every standard header comes first: what follows the pragma may use the wider instructions, shared inline code may not.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define BILEVEL_ISA avx2
#define BILEVEL_VECTOR_BYTES 32
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
