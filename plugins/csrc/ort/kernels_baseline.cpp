// Every standard header comes first: what follows the pragma may use the wider instructions, shared inline code may not.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"

#define BILEVEL_ISA baseline
#define BILEVEL_VECTOR_BYTES 16
#include "kernels.inc"
