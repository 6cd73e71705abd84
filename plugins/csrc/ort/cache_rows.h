// Rows of packed caches: written, read, and unpacked for attention. Included once per instruction set.

constexpr int kBias = 120, kNotFinite = 255;
constexpr float kSmallest = 7.888609052210118e-31f;  // 2^-100: a group with no larger number counts as zeros

// 2^exponent, for exponents of normal numbers.
BILEVEL_INLINE float power_of_two(int exponent) {
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// m * 2^(e - 120); NaN for a group that held one.
BILEVEL_INLINE float scale_of(const uint8_t* scale) {
  return scale[1] == kNotFinite ? NAN : scale[0] * power_of_two(std::min(scale[1] - kBias, 128));
}

template <int Bits>
BILEVEL_INLINE void unpack_group(const uint8_t* codes, int64_t size, float scale, float* to) {
  constexpr int kHalf = 1 << (Bits - 1);
  const int64_t bytes = size * Bits / 8;
  const Ints half = Ints{} + kHalf;
  const Vector factor = splat(scale);
  int64_t n = 0;
  for (; n + kLanes <= bytes; n += kLanes) {
    const Ints wide = widened(codes + n);
    if constexpr (Bits == 4) {
      store(to + n, numbers(wide & 15, half) * factor);
      store(to + n + bytes, numbers(wide >> 4, half) * factor);
    } else {
      store(to + n, numbers(wide, half) * factor);
    }
  }
  for (; n < bytes; ++n) {
    if constexpr (Bits == 4) {
      to[n] = static_cast<float>((codes[n] & 15) - kHalf) * scale;
      to[n + bytes] = static_cast<float>((codes[n] >> 4) - kHalf) * scale;
    } else {
      to[n] = static_cast<float>(codes[n] - kHalf) * scale;
    }
  }
}

// `count` rows as numbers [count, D].
BILEVEL_INLINE void unpack_rows(const CacheRows& rows, const uint8_t* packed, int64_t count, float* to) {
  const int64_t size = rows.width / rows.groups, bytes = rows.bytes(), step = size * rows.bits / 8;
  for (int64_t row = 0; row < count; ++row, packed += bytes, to += rows.width) {
    const uint8_t* scales = packed + rows.code_bytes();
    for (int64_t g = 0; g < rows.groups; ++g) {
      if (rows.bits == 8)
        unpack_group<8>(packed + g * step, size, scale_of(scales + 2 * g), to + g * size);
      else
        unpack_group<4>(packed + g * step, size, scale_of(scales + 2 * g), to + g * size);
    }
  }
}

// The largest magnitude of `size` numbers; NaN where one of them is not finite.
BILEVEL_INLINE float peak_of(const float* from, int64_t size) {
  float peak = 0.0f, zero = 0.0f;
  for (int64_t d = 0; d < size; ++d) {
    peak = std::max(peak, std::fabs(from[d]));
    zero += from[d] * 0.0f;
  }
  return zero == 0.0f ? peak : NAN;
}

// The least m * 2^exponent, 128 <= m <= 255, that is not below `least`, a normal number.
BILEVEL_INLINE int scale_above(float least, int* exponent) {
  uint32_t bits;
  std::memcpy(&bits, &least, 4);
  *exponent = static_cast<int>(bits >> 23) - 127 - 7;
  const int m = static_cast<int>(std::ceil(least * power_of_two(-*exponent)));
  if (m <= 255) return m;
  ++*exponent;
  return 128;
}

BILEVEL_INLINE void pack_row(const CacheRows& rows, const float* from, uint8_t* to) {
  const int64_t size = rows.width / rows.groups, bytes = size * rows.bits / 8;
  const int half = 1 << (rows.bits - 1);
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest whole number, ties to even
  uint8_t* scales = to + rows.code_bytes();
  for (int64_t g = 0; g < rows.groups; ++g, from += size, to += bytes, scales += 2) {
    const float peak = peak_of(from, size);
    scales[0] = 0, scales[1] = std::isnan(peak) ? kNotFinite : 0;
    if (!(peak >= kSmallest)) {
      std::memset(to, rows.bits == 8 ? half : half | half << 4, bytes);
      continue;
    }
    int exponent = 0;
    scales[0] = static_cast<uint8_t>(scale_above(peak / static_cast<float>(half - 1), &exponent));
    scales[1] = static_cast<uint8_t>(exponent + kBias);
    const float scale = scales[0] * power_of_two(exponent);
    const auto code = [&](int64_t d) { return static_cast<int>((from[d] / scale + kRounder) - kRounder) + half; };
    for (int64_t n = 0; n < bytes; ++n)
      to[n] = static_cast<uint8_t>(rows.bits == 8 ? code(n) : code(n) | code(n + bytes) << 4);
  }
}

constexpr int64_t kRowsAtOnce = 64;  // rows per unit of work

static void write_cache(const CacheWriteArguments& a, const Parallel& parallel) {
  const int64_t pieces = (a.length + kRowsAtOnce - 1) / kRowsAtOnce, bytes = a.rows.bytes();
  const auto write = [&](size_t unit) {
    const int64_t head = unit / pieces, first = unit % pieces * kRowsAtOnce, last = std::min(first + kRowsAtOnce, a.length);
    uint8_t* to = a.cache + (head * a.capacity + a.start[head / a.heads]) * bytes;
    for (int64_t i = first; i < last; ++i) pack_row(a.rows, a.update + (head * a.length + i) * a.rows.width, to + i * bytes);
  };
  const int64_t units = a.batch * a.heads * pieces;
  if (a.batch * a.heads * a.length > kRowsAtOnce) return parallel.each(units, write);
  for (int64_t unit = 0; unit < units; ++unit) write(unit);  // less work than handing it out
}

static void read_cache(const CacheReadArguments& a, const Parallel& parallel) {
  parallel.each((a.count + kRowsAtOnce - 1) / kRowsAtOnce, [&](size_t unit) {
    const int64_t first = unit * kRowsAtOnce, count = std::min(kRowsAtOnce, a.count - first);
    unpack_rows(a.rows, a.packed + first * a.rows.bytes(), count, a.out + first * a.rows.width);
  });
}

// `count` keys or values of `width` numbers from row `first` of a cache on: where it has them, or unpacked into `buffer`.
BILEVEL_INLINE const float* rows_of(const AttentionArguments& a, const float* floats, const uint8_t* packed, int64_t first,
                                    int64_t count, int64_t width, std::vector<float>& buffer) {
  if (!packed) return floats + first * width;
  buffer.resize(a.block_size * width);
  unpack_rows(a.rows, packed + first * a.rows.bytes(), count, buffer.data());
  return buffer.data();
}
