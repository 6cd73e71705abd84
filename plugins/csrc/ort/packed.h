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

typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

// `kLanes` bytes as whole numbers.
BILEVEL_INLINE Ints widened(const uint8_t* from) { return __builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Ints); }
BILEVEL_INLINE Vector numbers(Ints codes, Ints zero) { return __builtin_convertvector(codes - zero, Vector); }

template <int Bits>
struct Packed {
  const PackedRows& rows;
  int64_t width;

  int64_t padded() const { return rows.blocks * rows.block; }
  int64_t block_bytes() const { return rows.block * Bits / 8; }

  // take(n, v): lanes [n, n + kLanes) of block b of a row, without its scale.
  template <typename Take>
  BILEVEL_INLINE void each(const uint8_t* codes, int zero, int64_t bytes, const Take& take) {
    const Ints zeros = Ints{} + zero;
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
      for (int64_t b = 0; b < rows.blocks; ++b, to += rows.block) {
        const int64_t at = row * rows.blocks + b;
        const Vector scale = splat(rows.scales[at]);
        each(rows.codes + at * block_bytes(), rows.zeros[at], block_bytes(), [&](int64_t n, Vector v) { store(to + n, v * scale); });
      }
    }
    return buffer;
  }

  template <int Rows>
  void dots_of(const float* one, int64_t first, float* out) const {
    Vector total[Rows] = {};
    for (int64_t b = 0; b < rows.blocks; ++b)
      for (int j = 0; j < Rows; ++j) {
        const int64_t at = (first + j) * rows.blocks + b;
        const float* x = one + b * rows.block;
        Vector sum = {};
        each(rows.codes + at * block_bytes(), rows.zeros[at], block_bytes(), [&](int64_t n, Vector v) { sum += v * load(x + n); });
        total[j] += sum * splat(rows.scales[at]);
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
