// RoutedAttention, exact. Included once per instruction set.
//
// A long call sorts the (token, block) pairs of a kv head by block and visits block after block: each visit multiplies the tile
// of all rows that kept the block with its keys and values, and folds the result into the rows' running softmax (Milakov and
// Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135). A short call visits each token's blocks directly. Nothing is
// gathered or copied: keys and values are read where the cache has them; those of a packed cache are unpacked block by block.
//
// "Virtual head": the query heads that share one kv head and one selection head. "Row": one query head at one token.

constexpr int kTileVectors = 2;                      // vectors of rows per tile
constexpr int kTileRows = kTileVectors * kLanes;     // rows per tile
constexpr int kKeys = kLanes == 8 ? 6 : 8;           // keys per register block: what 16 or 32 registers hold
constexpr int64_t kDirectTokens = 4;                 // calls of at most this many tokens visit blocks directly

struct VirtualHead {
  int64_t first, count, kv_head, list;  // query heads [first, first + count)
};

static std::vector<VirtualHead> virtual_heads(const AttentionArguments& a) {
  std::vector<VirtualHead> heads;
  for (int64_t h = 0; h < a.heads; ++h) {
    const int64_t kv = h * a.kv_heads / a.heads, list = h * a.selection_heads / a.heads;
    if (!heads.empty() && heads.back().kv_head == kv && heads.back().list == list)
      ++heads.back().count;
    else
      heads.push_back({h, 1, kv, list});
  }
  return heads;
}

BILEVEL_INLINE int64_t horizon_of(const AttentionArguments& a, int64_t b, int64_t i) {
  return a.causal ? a.past_len[b] + i + 1 : a.past_len[b] + a.new_len[b];
}

// The blocks of one token that exist and are visible, each once; returns how many.
static int64_t visible_blocks(const AttentionArguments& a, int64_t b, int64_t list, int64_t i, int32_t* out) {
  const int32_t* route = a.routes + ((b * a.selection_heads + list) * a.length + i) * a.kept;
  const int64_t blocks = std::min(a.capacity, horizon_of(a, b, i) + a.block_size - 1) / a.block_size;
  int64_t count = 0;
  bool ascending = true;
  for (int64_t n = 0; n < a.kept; ++n) {
    if (route[n] < 0 || route[n] >= blocks) continue;
    ascending = ascending && (count == 0 || out[count - 1] < route[n]);
    out[count++] = route[n];
  }
  if (ascending) return count;
  std::sort(out, out + count);
  return std::unique(out, out + count) - out;
}

// ---- short calls -------------------------------------------------------------------------------------------------------

// Rows and keys of one register block of a short call: as many scores as a vector has lanes.
constexpr int kDirectKeys = 4, kDirectRows = kLanes / kDirectKeys;

// What a unit of a short call works with.
struct DirectScratch {
  std::vector<int32_t> blocks;
  std::vector<float> scores;  // [rows, stride]
  std::vector<float> block;   // keys or values of a packed cache
};

// scores [rows, stride] of `keys` keys (at most kDirectKeys) for rows [first, first + count) of q, which lie `step` apart.
BILEVEL_INLINE void score_direct(const float* q, int64_t step, int64_t count, const float* k, int64_t keys, int64_t width,
                                 float scale, float* scores, int64_t stride) {
  Vector total[kLanes] = {};
  const float *query[kDirectRows], *key[kDirectKeys];
  for (int r = 0; r < kDirectRows; ++r) query[r] = q + std::min<int64_t>(r, count - 1) * step;
  for (int j = 0; j < kDirectKeys; ++j) key[j] = k + std::min<int64_t>(j, keys - 1) * width;
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    Vector value[kDirectKeys];
    for (int j = 0; j < kDirectKeys; ++j) value[j] = load(key[j] + d);
    for (int r = 0; r < kDirectRows; ++r) {
      const Vector factor = load(query[r] + d);
      for (int j = 0; j < kDirectKeys; ++j) total[r * kDirectKeys + j] += factor * value[j];
    }
  }
  float dot[kLanes];
  store(dot, sums(total));
  for (; d < width; ++d)
    for (int r = 0; r < kDirectRows; ++r)
      for (int j = 0; j < kDirectKeys; ++j) dot[r * kDirectKeys + j] += query[r][d] * key[j][d];
  for (int64_t r = 0; r < count; ++r)
    for (int64_t j = 0; j < keys; ++j) scores[r * stride + j] = dot[r * kDirectKeys + j] * scale;
}

// acc [Rows, D] += weights [Rows, keys] v [keys, D], Vectors vectors of the width.
template <int Rows, int Vectors>
BILEVEL_INLINE void add_direct(const float* weights, int64_t stride, const float* v, int64_t keys, int64_t width, float* acc) {
  Vector total[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int n = 0; n < Vectors; ++n) total[r][n] = load(acc + r * width + n * kLanes);
  for (int64_t j = 0; j < keys; ++j)
    for (int n = 0; n < Vectors; ++n) {
      const Vector value = load(v + j * width + n * kLanes);
      for (int r = 0; r < Rows; ++r) total[r][n] += weights[r * stride + j] * value;
    }
  for (int r = 0; r < Rows; ++r)
    for (int n = 0; n < Vectors; ++n) store(acc + r * width + n * kLanes, total[r][n]);
}

template <int Rows>
BILEVEL_INLINE void add_rows(const float* weights, int64_t stride, const float* v, int64_t keys, int64_t width, float* acc) {
  constexpr int kWide = kLanes == 8 ? 2 : 4;
  int64_t d = 0;
  for (; d + kWide * kLanes <= width; d += kWide * kLanes)
    add_direct<Rows, kWide>(weights, stride, v + d, keys, width, acc + d);
  for (; d + kLanes <= width; d += kLanes) add_direct<Rows, 1>(weights, stride, v + d, keys, width, acc + d);
  for (; d < width; ++d)
    for (int r = 0; r < Rows; ++r)
      for (int64_t j = 0; j < keys; ++j) acc[r * width + d] += weights[r * stride + j] * v[j * width + d];
}

// Scores to softmax weights, in place; the row is padded to whole vectors. No score at all: peak -inf, total 0; only scores of
// -inf: total 0, but a finite peak.
BILEVEL_INLINE void weigh_direct(float* scores, int64_t count, float* peak, float* total) {
  std::fill(scores + count, scores + count + kLanes, -INFINITY);
  Vector most = splat(-3.402823466e38f), sum_of = {};
  for (int64_t j = 0; j < count; j += kLanes) most = larger(load(scores + j), most);
  float lane[kLanes];
  store(lane, most);
  *peak = count > 0 ? *std::max_element(lane, lane + kLanes) : -INFINITY;
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vector weight = exp_nonpositive(load(scores + j) - splat(*peak));
    store(scores + j, weight);
    sum_of += weight;
  }
  *total = sum(sum_of);
}

// Partial attention of one token's rows over some of its blocks: acc [rows, D], peak [rows], total [rows] (0: saw nothing).
static void attend_blocks(const AttentionArguments& a, int64_t b, const VirtualHead& head, int64_t i, const int32_t* blocks,
                          int64_t count, DirectScratch& scratch, float* acc, float* peak, float* total) {
  std::vector<float>& scores = scratch.scores;
  const int64_t rows = head.count, horizon = horizon_of(a, b, i), stride = count * a.block_size + kLanes;
  const int64_t cache = (b * a.kv_heads + head.kv_head) * a.capacity, step = a.length * a.width;
  const float* q = a.q + ((b * a.heads + head.first) * a.length + i) * a.width;
  scores.resize(rows * stride);
  int64_t seen = 0;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t start = blocks[n] * a.block_size, keys = std::min(a.block_size, horizon - start);
    const float* k = rows_of(a, a.k, a.packed_k, cache + start, keys, a.width, scratch.block);
    const auto* v = a.packed_v ? a.packed_v + (cache + start) * a.rows.bytes()
                               : reinterpret_cast<const uint8_t*>(a.v + (cache + start) * a.value_width);
    const int64_t bytes = a.packed_v ? a.rows.bytes() : 4 * a.value_width;  // of a value
    for (int64_t j = 0; j < keys; j += kDirectKeys) {
      for (int64_t d = 0; d < kDirectKeys * bytes; d += 64) __builtin_prefetch(v + j * bytes + d, 0, 2);
      for (int64_t r = 0; r < rows; r += kDirectRows)
        score_direct(q + r * step, step, std::min<int64_t>(kDirectRows, rows - r), k + j * a.width,
                     std::min<int64_t>(kDirectKeys, keys - j), a.width, a.scale, scores.data() + r * stride + seen + j, stride);
    }
    seen += keys;
  }
  for (int64_t r = 0; r < rows; ++r) weigh_direct(scores.data() + r * stride, seen, peak + r, total + r);
  const int64_t width = a.value_width;
  std::fill(acc, acc + rows * width, 0.0f);
  int64_t done = 0;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t start = blocks[n] * a.block_size, keys = std::min(a.block_size, horizon - start);
    const float* v = rows_of(a, a.v, a.packed_v, cache + start, keys, width, scratch.block);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add_rows<4>(scores.data() + r * stride + done, stride, v, keys, width, acc + r * width);
    for (; r + 3 <= rows; r += 3) add_rows<3>(scores.data() + r * stride + done, stride, v, keys, width, acc + r * width);
    for (; r < rows; ++r) add_rows<1>(scores.data() + r * stride + done, stride, v, keys, width, acc + r * width);
    done += keys;
  }
}

// Each token's blocks are cut into pieces for the threads; the pieces' partial softmaxes are merged by their log-sum-exp.
static void attend_direct(const AttentionArguments& a, const std::vector<VirtualHead>& heads, const Parallel& parallel) {
  const int64_t blocks = std::max<int64_t>(8, (a.kept + 31) / 32);  // per unit of work; at most 32 partial results
  const int64_t pieces = (a.kept + blocks - 1) / blocks, lists = heads.size();
  int64_t most = 0;
  for (const VirtualHead& head : heads) most = std::max(most, head.count);
  const int64_t width = a.value_width, record = most * (width + 2);  // acc [most, Dv], peak [most], total [most]
  std::vector<float> partial(a.batch * lists * a.length * pieces * record);
  parallel.each(a.batch * lists * a.length * pieces, [&](size_t unit) {
    thread_local DirectScratch scratch;
    const int64_t piece = unit % pieces, i = unit / pieces % a.length;
    const int64_t v = unit / (pieces * a.length) % lists, b = unit / (pieces * a.length * lists);
    float* acc = partial.data() + unit * record;
    float *peak = acc + most * width, *total = peak + most;
    scratch.blocks.resize(a.kept);
    const int64_t all = i < a.new_len[b] ? visible_blocks(a, b, heads[v].list, i, scratch.blocks.data()) : 0;
    const int64_t first = std::min(piece * blocks, all), count = std::min(blocks, all - first);
    attend_blocks(a, b, heads[v], i, scratch.blocks.data() + first, count, scratch, acc, peak, total);
  });
  for (int64_t token = 0; token < a.batch * lists * a.length; ++token) {
    const int64_t i = token % a.length, v = token / a.length % lists, b = token / (a.length * lists);
    const float* records = partial.data() + token * pieces * record;
    for (int64_t r = 0; r < heads[v].count; ++r) {
      const int64_t h = heads[v].first + r;
      float* out = a.out + ((b * a.heads + h) * a.length + i) * width;
      float peak = a.sinks ? a.sinks[h] : -INFINITY;
      for (int64_t n = 0; n < pieces; ++n) peak = std::max(peak, records[n * record + most * width + r]);
      float total = a.sinks ? std::exp(a.sinks[h] - peak) : 0.0f;
      std::fill(out, out + width, 0.0f);
      for (int64_t n = 0; n < pieces; ++n) {
        const float* acc = records + n * record;
        const float share = acc[most * (width + 1) + r];
        if (share == 0.0f) continue;  // this piece saw no token, or gives none any weight
        const float factor = std::exp(acc[most * width + r] - peak);
        total += factor * share;
        for (int64_t d = 0; d < width; ++d) out[d] += factor * acc[r * width + d];
      }
      if (peak != -INFINITY)  // else 0: the row has no visible token; 0 / 0 where all its scores are -inf, as in a softmax
        for (int64_t d = 0; d < width; ++d) out[d] /= total;
    }
  }
}
