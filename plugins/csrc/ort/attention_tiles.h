// RoutedAttention for long calls: blocks are visited one by one with the tile of rows that kept them (see attention.h).

// A tile of rows: their queries transposed [D, kTileRows], scores [R, kTileRows], and where each row's result goes.
struct Tile {
  std::vector<float> queries, scores;
  float* out[kTileRows];
  float *peak[kTileRows], *total[kTileRows];
  int32_t keys[kTileRows];  // how many tokens of the block each row sees
  int rows = 0;
};

// scores [n, rows] of n keys: each key's numbers are broadcast over the vectors of rows.
template <int Keys>
BILEVEL_INLINE void score_keys(const float* queries, const float* k, int64_t width, float* scores) {
  Vector total[Keys][kTileVectors] = {};
  for (int64_t d = 0; d < width; ++d) {
    Vector query[kTileVectors];
    for (int n = 0; n < kTileVectors; ++n) query[n] = load(queries + d * kTileRows + n * kLanes);
    for (int j = 0; j < Keys; ++j)
      for (int n = 0; n < kTileVectors; ++n) total[j][n] += k[j * width + d] * query[n];
  }
  for (int j = 0; j < Keys; ++j)
    for (int n = 0; n < kTileVectors; ++n) store(scores + j * kTileRows + n * kLanes, total[j][n]);
}

// Scores to softmax weights against the rows' new peaks; factor: what the rows' earlier results are multiplied by.
BILEVEL_INLINE void weigh(Tile& tile, int64_t keys, float* factor) {
  float peaks[kTileRows], totals[kTileRows], limits[kTileRows];
  int32_t fewest = static_cast<int32_t>(keys);
  for (int r = 0; r < kTileRows; ++r) {
    const bool used = r < tile.rows;
    peaks[r] = used ? *tile.peak[r] : 0.0f;
    totals[r] = used ? *tile.total[r] : 0.0f;
    limits[r] = static_cast<float>(used ? tile.keys[r] : keys);
    if (used) fewest = std::min(fewest, tile.keys[r]);
  }
  for (int n = 0; n < kTileVectors; ++n) {
    float* scores = tile.scores.data() + n * kLanes;
    const Vector limit = load(limits + n * kLanes), old = load(peaks + n * kLanes);
    for (int64_t j = fewest; j < keys; ++j) {
      const Vector value = load(scores + j * kTileRows);
      store(scores + j * kTileRows, splat(static_cast<float>(j)) < limit ? value : splat(-INFINITY));
    }
    Vector peak = old;
    for (int64_t j = 0; j < keys; ++j) peak = larger(load(scores + j * kTileRows), peak);
    Vector total = {};
    for (int64_t j = 0; j < keys; ++j) {
      const Vector weight = exp_nonpositive(load(scores + j * kTileRows) - peak);
      store(scores + j * kTileRows, weight);
      total += weight;
    }
    const Vector scale = exp_nonpositive(old - peak);
    store(factor + n * kLanes, scale);
    store(peaks + n * kLanes, peak);
    store(totals + n * kLanes, load(totals + n * kLanes) * scale + total);
  }
  for (int r = 0; r < tile.rows; ++r) *tile.peak[r] = peaks[r], *tile.total[r] = totals[r];
}

// out rows = out * factor + weights^T v, for Rows rows and Vectors vectors of the width at once.
template <int Rows, int Vectors>
BILEVEL_INLINE void mix(const Tile& tile, int first, const float* factor, const float* v, int64_t keys, int64_t width, int64_t d) {
  Vector total[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int n = 0; n < Vectors; ++n) total[r][n] = load(tile.out[first + r] + d + n * kLanes) * factor[first + r];
  for (int64_t j = 0; j < keys; ++j) {
    const float* weights = tile.scores.data() + j * kTileRows + first;
    Vector value[Vectors];
    for (int n = 0; n < Vectors; ++n) value[n] = load(v + j * width + d + n * kLanes);
    for (int r = 0; r < Rows; ++r)
      for (int n = 0; n < Vectors; ++n) total[r][n] += weights[r] * value[n];
  }
  for (int r = 0; r < Rows; ++r)
    for (int n = 0; n < Vectors; ++n) store(tile.out[first + r] + d + n * kLanes, total[r][n]);
}

template <int Rows>
BILEVEL_INLINE void mix_rows(const Tile& tile, int first, const float* factor, const float* v, int64_t keys, int64_t width) {
  constexpr int kWide = kLanes == 8 ? 2 : 4;
  int64_t d = 0;
  for (; d + kWide * kLanes <= width; d += kWide * kLanes) mix<Rows, kWide>(tile, first, factor, v, keys, width, d);
  for (; d + kLanes <= width; d += kLanes) mix<Rows, 1>(tile, first, factor, v, keys, width, d);
  for (; d < width; ++d)
    for (int r = first; r < first + Rows; ++r) {
      float total = tile.out[r][d] * factor[r];
      for (int64_t j = 0; j < keys; ++j) total += tile.scores[j * kTileRows + r] * v[j * width + d];
      tile.out[r][d] = total;
    }
}

// Whether all of `count` numbers are finite: 0 times each is 0, or NaN.
BILEVEL_INLINE bool all_finite(const float* v, int64_t count) {
  float sum_of = 0.0f;
  for (int64_t n = 0; n < count; ++n) sum_of += v[n] * 0.0f;
  return sum_of == 0.0f;
}

// One visit: the tile's rows attend to one block.
static void visit(Tile& tile, const float* k, const float* v, int64_t keys, int64_t width, int64_t value_width) {
  float* scores = tile.scores.data();
  int64_t j = 0;
  for (; j + kKeys <= keys; j += kKeys) score_keys<kKeys>(tile.queries.data(), k + j * width, width, scores + j * kTileRows);
  for (; j < keys; ++j) score_keys<1>(tile.queries.data(), k + j * width, width, scores + j * kTileRows);
  float factor[kTileRows];
  weigh(tile, keys, factor);
  int r = 0;
  const int64_t fewest = *std::min_element(tile.keys, tile.keys + tile.rows);
  if (!all_finite(v + fewest * value_width, (keys - fewest) * value_width))  // what a row does not see has the weight 0, and 0 * NaN is NaN
    for (; r < tile.rows; ++r) mix_rows<1>(tile, r, factor, v, tile.keys[r], value_width);
  for (; r + 6 <= tile.rows; r += 6) mix_rows<6>(tile, r, factor, v, keys, value_width);
  for (; r + 2 <= tile.rows; r += 2) mix_rows<2>(tile, r, factor, v, keys, value_width);
  for (; r < tile.rows; ++r) mix_rows<1>(tile, r, factor, v, keys, value_width);
}

struct TileScratch {
  std::vector<int32_t> blocks, tokens;  // blocks of one token; tokens sorted by block
  std::vector<int32_t> counts, pairs;   // per token: how many blocks, and which
  std::vector<int64_t> start;           // where each block's tokens start
  std::vector<float> peak, total;       // per row
  std::vector<float> keys, values;      // a block of packed caches
  Tile tile;
};

// The pairs of tokens [first, last) sorted by block: tokens[start[j] .. start[j + 1]) kept block j.
static void sort_pairs(const AttentionArguments& a, int64_t b, int64_t list, int64_t first, int64_t last, TileScratch& s) {
  const int64_t blocks = a.capacity / a.block_size;
  s.start.assign(blocks + 2, 0);
  s.counts.resize(last - first);
  s.pairs.resize((last - first) * a.kept);
  for (int64_t i = first; i < last; ++i) {
    int32_t* own = s.pairs.data() + (i - first) * a.kept;
    s.counts[i - first] = static_cast<int32_t>(visible_blocks(a, b, list, i, own));
    for (int n = 0; n < s.counts[i - first]; ++n) ++s.start[own[n] + 2];
  }
  for (int64_t j = 1; j <= blocks; ++j) s.start[j + 1] += s.start[j];
  s.tokens.resize(s.start[blocks + 1]);
  for (int64_t i = first; i < last; ++i)
    for (int n = 0; n < s.counts[i - first]; ++n)
      s.tokens[s.start[s.pairs[(i - first) * a.kept + n] + 1]++] = static_cast<int32_t>(i);
}

// Tokens [first, last) of one virtual head, all their blocks.
static void attend_range(const AttentionArguments& a, int64_t b, const VirtualHead& head, int64_t first, int64_t last,
                         TileScratch& s) {
  Tile& tile = s.tile;
  tile.queries.resize(a.width * kTileRows);
  tile.scores.resize(a.block_size * kTileRows);
  s.peak.assign((last - first) * head.count, -3.402823466e38f);
  s.total.assign((last - first) * head.count, 0.0f);
  for (int64_t h = head.first; h < head.first + head.count; ++h) {
    float* out = a.out + ((b * a.heads + h) * a.length + first) * a.value_width;
    std::fill(out, out + (last - first) * a.value_width, 0.0f);
  }
  last = std::min<int64_t>(last, a.new_len[b]);
  if (first >= last) return;
  sort_pairs(a, b, head.list, first, last, s);
  const int64_t cache = (b * a.kv_heads + head.kv_head) * a.capacity;
  for (int64_t j = 0; j < a.capacity / a.block_size; ++j) {
    // sort_pairs has moved each start on to its block's end, which is where the next block starts.
    const int64_t begin = s.start[j], rows = (s.start[j + 1] - begin) * head.count, block = j * a.block_size;
    if (rows == 0) continue;
    const int64_t filled = std::min(a.block_size, a.past_len[b] + a.new_len[b] - block);
    const float* k = rows_of(a, a.k, a.packed_k, cache + block, filled, a.width, s.keys);
    const float* v = rows_of(a, a.v, a.packed_v, cache + block, filled, a.value_width, s.values);
    for (int64_t row = 0; row < rows;) {
      int64_t keys = 1;
      for (tile.rows = 0; tile.rows < kTileRows && row < rows; ++tile.rows, ++row) {
        const int64_t i = s.tokens[begin + row / head.count], h = row % head.count, r = (i - first) * head.count + h;
        const int64_t at = (b * a.heads + head.first + h) * a.length + i;
        for (int64_t d = 0; d < a.width; ++d) tile.queries[d * kTileRows + tile.rows] = a.q[at * a.width + d] * a.scale;
        tile.out[tile.rows] = a.out + at * a.value_width;
        tile.peak[tile.rows] = &s.peak[r];
        tile.total[tile.rows] = &s.total[r];
        tile.keys[tile.rows] = static_cast<int32_t>(std::min(a.block_size, horizon_of(a, b, i) - block));
        keys = std::max<int64_t>(keys, tile.keys[tile.rows]);
      }
      visit(tile, k, v, keys, a.width, a.value_width);
    }
  }
  for (int64_t row = 0; row < (last - first) * head.count; ++row) {
    const int64_t i = first + row / head.count, h = head.first + row % head.count;
    float* out = a.out + ((b * a.heads + h) * a.length + i) * a.value_width;
    if (s.counts[row / head.count] == 0) continue;  // no visible token: 0
    float factor = 1.0f, total = s.total[row];
    if (a.sinks) {
      const float peak = std::max(s.peak[row], a.sinks[h]);
      factor = std::exp(s.peak[row] - peak);
      total = total * factor + std::exp(a.sinks[h] - peak);
    }
    for (int64_t d = 0; d < a.value_width; ++d) out[d] = out[d] * factor / total;
  }
}

static void attention(const AttentionArguments& a, const Parallel& parallel) {
  const std::vector<VirtualHead> heads = virtual_heads(a);
  if (a.length <= kDirectTokens) return attend_direct(a, heads, parallel);
  constexpr int64_t kUnits = 16, kTokens = 512;  // units wanted per call, but no unit of fewer tokens than this
  const int64_t lists = heads.size();
  const int64_t wanted = (a.batch * lists * a.length + kUnits - 1) / kUnits;
  const int64_t tokens = std::max(kTokens, wanted), pieces = (a.length + tokens - 1) / tokens;
  parallel.each(a.batch * lists * pieces, [&](size_t unit) {
    thread_local TileScratch scratch;
    const int64_t v = unit / pieces % lists, b = unit / (pieces * lists), first = unit % pieces * tokens;
    attend_range(a, b, heads[v], first, std::min(first + tokens, a.length), scratch);
  });
}
