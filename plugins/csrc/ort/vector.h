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

// Two vectors laid side by side, in groups of 2 * width lanes: which lane goes to `lane` of the vector of their left halves.
constexpr int left_half(int width, int lane) {
  const int group = lane / (2 * width) * 2 * width, at = lane - group;
  return group + (at < width ? at : at - width + kLanes);
}

// The left halves (Shift 0) or right halves (Shift Width) of a and b.
template <int Width, int Shift, int... Lane>
BILEVEL_INLINE Vector halves(Vector a, Vector b, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (left_half(Width, Lane) + Shift)...);
#else
  return __builtin_shuffle(a, b, Ints{(left_half(Width, Lane) + Shift)...});  // GCC before 12 lacks the other one
#endif
}

// Lane i of the result is the sum of all lanes of values[i]: a tree that folds pairs of vectors into one.
template <int Count>
BILEVEL_INLINE void fold(Vector* values) {
  constexpr int kWidth = Count / 2;
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  for (int n = 0; n < kWidth; ++n) {
    const Vector a = values[n], b = values[n + kWidth];
    values[n] = halves<kWidth, 0>(a, b, lanes) + halves<kWidth, kWidth>(a, b, lanes);
  }
  if constexpr (kWidth > 1) fold<kWidth>(values);
}

BILEVEL_INLINE Vector sums(Vector (&values)[kLanes]) {
  fold<kLanes>(values);
  return values[0];
}

// Dot products of `one` with `count` (at most kLanes) other vectors of the same width, into out [count].
BILEVEL_INLINE void dots(const float* one, const float* const* others, int64_t count, int64_t width, float* out) {
  const float* other[kLanes];
  for (int n = 0; n < kLanes; ++n) other[n] = others[n < count ? n : 0];
  Vector total[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    const Vector factor = load(one + d);
    for (int n = 0; n < kLanes; ++n) total[n] += factor * load(other[n] + d);
  }
  float result[kLanes];
  store(result, sums(total));
  for (; d < width; ++d)
    for (int64_t n = 0; n < count; ++n) result[n] += one[d] * other[n][d];
  std::copy(result, result + count, out);
}
