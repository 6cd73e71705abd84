// Vectors of floats as GCC and Clang provide them: no intrinsics, so one source serves AVX-512, AVX2, SSE and NEON.
// Included once per instruction set, inside that set's namespace; BILEVEL_VECTOR_BYTES is its register width.

constexpr int kLanes = BILEVEL_VECTOR_BYTES / 4;
typedef float Vector __attribute__((vector_size(BILEVEL_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(BILEVEL_VECTOR_BYTES), aligned(4), may_alias));

#define BILEVEL_INLINE static inline __attribute__((always_inline))

BILEVEL_INLINE Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
BILEVEL_INLINE void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
BILEVEL_INLINE Vector splat(float value) { return value - Vector{}; }
BILEVEL_INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }

BILEVEL_INLINE float sum(Vector value) {
  float total[kLanes];
  store(total, value);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) total[i] += total[i + width];
  return total[0];
}

// e^x to about 2 ulp for x <= 0 (what a softmax needs); 0 below -87.3, NaN stays NaN. Reduction x = n ln 2 + r, |r| <= ln 2 / 2,
// and the Taylor polynomial of degree 7 in r (its remainder is below 1e-8 there).
BILEVEL_INLINE Vector exp_nonpositive(Vector x) {
  const Vector rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vector whole = (x * splat(1.44269504088896341f) + rounder) - rounder;
  const Vector rest = (x - whole * splat(0.693359375f)) + whole * splat(2.12194440e-4f);
  Vector power = splat(1.98412698e-4f);
  power = power * rest + splat(1.38888889e-3f);
  power = power * rest + splat(8.33333333e-3f);
  power = power * rest + splat(4.16666667e-2f);
  power = power * rest + splat(1.66666667e-1f);
  power = power * rest + splat(0.5f);
  power = power * rest + splat(1.0f);
  power = power * rest + splat(1.0f);
  const Vector bounded = whole < splat(-126.0f) ? splat(-126.0f) : whole;
  const Ints exponent = (__builtin_convertvector(bounded, Ints) + 127) << 23;
  const Vector result = power * reinterpret_cast<const Vector&>(exponent);
  return x < splat(-87.3f) ? Vector{} : result;
}

// Lane i of the result is the sum of all lanes of values[i]: a tree that folds pairs of vectors into one.
template <int Count>
BILEVEL_INLINE void fold(Vector* values) {
  constexpr int kWidth = Count / 2;
  Ints low, high;
  for (int i = 0; i < kLanes; ++i) {
    const int group = i / (2 * kWidth) * 2 * kWidth, at = i - group;
    low[i] = group + (at < kWidth ? at : at - kWidth + kLanes);
    high[i] = low[i] + kWidth;
  }
  for (int n = 0; n < kWidth; ++n) {
    const Vector a = values[n], b = values[n + kWidth];
    values[n] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  }
  if constexpr (kWidth > 1) fold<kWidth>(values);
}

BILEVEL_INLINE Vector sums(Vector (&values)[kLanes]) {
  fold<kLanes>(values);
  return values[0];
}

// Dot products of one vector of `width` floats with `Rows` others, `stride` floats apart.
template <int Rows>
BILEVEL_INLINE void dots(const float* one, const float* others, int64_t stride, int64_t width, float* out) {
  Vector total[Rows] = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    const Vector factor = load(one + d);
    for (int r = 0; r < Rows; ++r) total[r] += factor * load(others + r * stride + d);
  }
  for (int r = 0; r < Rows; ++r) {
    float value = sum(total[r]);
    for (int64_t tail = d; tail < width; ++tail) value += one[tail] * others[r * stride + tail];
    out[r] = value;
  }
}
