// Rows of a weight matrix as the experts' products read them: floats, or packed in 4 or 8 bits and unpacked in registers. Included
// once per instruction set.
//
// Both give `floats`, the rows [first, first + count) as floats (where need be in a buffer of at least count * width + kSlack), and
// `dots`, their products with one vector of `padded()` floats that is zero behind the width.

constexpr int64_t kSlack = 128;  // what an unpacked row may write behind its width: less than a block

struct FloatRows {
  const float* weights;
  int64_t width;

  int64_t padded() const { return width; }
  const float* floats(int64_t first, int64_t, float*) const { return weights + first * width; }
  void dots(const float* one, int64_t first, int64_t count, float* out) const {
    const float* row[kLanes];
    for (int64_t n = 0; n < count; n += kLanes) {
      const int64_t some = std::min<int64_t>(kLanes, count - n);
      for (int64_t m = 0; m < some; ++m) row[m] = weights + (first + n + m) * width;
      float result[kLanes];
      BILEVEL_ISA::dots(one, row, some, width, result);
      std::copy(result, result + some, out + n);
    }
  }
};

// `kLanes` bytes as whole numbers. GCC takes a conversion by four widths apart into single bytes: here, and only here, x86 is named.
#if defined(__x86_64__) && BILEVEL_VECTOR_BYTES == 64
BILEVEL_INLINE Ints widened(const uint8_t* from) {
  return reinterpret_cast<Ints>(_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
#elif defined(__x86_64__) && BILEVEL_VECTOR_BYTES == 32
BILEVEL_INLINE Ints widened(const uint8_t* from) {
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
#else
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes), aligned(1), may_alias));
BILEVEL_INLINE Ints widened(const uint8_t* from) {
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Shorts), Ints);
}
#endif
BILEVEL_INLINE Vector numbers(Ints codes, Ints zero) { return __builtin_convertvector(codes - zero, Vector); }

// Block: the block size where the compiler shall know it, 0: that of `rows`.
template <int Bits, int Block>
struct Packed {
  const PackedRows& rows;
  int64_t width;

  int64_t block() const { return Block ? Block : rows.block; }
  int64_t bytes() const { return block() * Bits / 8; }
  int64_t padded() const { return rows.blocks * block(); }

  // take(n, v): lanes [n, n + kLanes) of a block, without its scale.
  template <typename Take>
  BILEVEL_INLINE void each(const uint8_t* codes, int zero, int64_t bytes, const Take& take) {
    const Ints zeros = Ints{} + zero;
#pragma GCC unroll 8
    for (int64_t n = 0; n < bytes; n += kLanes) {
      const Ints wide = widened(codes + n);
      if constexpr (Bits == 4) {
        take(n, numbers(wide & 15, zeros));
        take(n + bytes, numbers(wide >> 4, zeros));
      } else {
        take(n, numbers(wide, zeros));
      }
    }
  }

  const float* floats(int64_t first, int64_t count, float* buffer) const {
    for (int64_t row = first; row < first + count; ++row) {  // in order: a row's padding is overwritten by the next one
      float* to = buffer + (row - first) * width;
      for (int64_t b = 0; b < rows.blocks; ++b, to += block()) {
        const int64_t at = row * rows.blocks + b;
        const Vector scale = splat(rows.scales[at]);
        each(rows.codes + at * bytes(), rows.zeros[at], bytes(), [&](int64_t n, Vector v) { store(to + n, v * scale); });
      }
    }
    return buffer;
  }

  template <int Rows>
  void dots_of(const float* one, int64_t first, float* out) const {
    const uint8_t *codes[Rows], *zeros[Rows];
    const float* scales[Rows];
    for (int j = 0; j < Rows; ++j) {
      const int64_t at = (first + j) * rows.blocks;
      codes[j] = rows.codes + at * bytes(), zeros[j] = rows.zeros + at, scales[j] = rows.scales + at;
    }
    Vector total[Rows] = {};
    for (int64_t b = 0; b < rows.blocks; ++b) {
      const float* x = one + b * block();
#pragma GCC unroll 8
      for (int j = 0; j < Rows; ++j) {
        Vector part = {};
        each(codes[j] + b * bytes(), zeros[j][b], bytes(), [&](int64_t n, Vector v) { part += v * load(x + n); });
        total[j] += part * splat(scales[j][b]);
      }
    }
    for (int j = 0; j < Rows; ++j) out[j] = sum(total[j]);
  }

  void dots(const float* one, int64_t first, int64_t count, float* out) const {
    constexpr int kAtOnce = 4;
    int64_t n = 0;
    for (; n + kAtOnce <= count; n += kAtOnce) dots_of<kAtOnce>(one, first + n, out + n);
    for (; n < count; ++n) dots_of<1>(one, first + n, out + n);
  }
};
