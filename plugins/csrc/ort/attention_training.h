// RoutedAttention with its gradients, for training. Included once per instruction set, after attention_tiles.h.
//
// As there, the (token, block) pairs of a virtual head are sorted by block, and each block meets all rows that kept it, some at a
// time. Keys and values of the block are transposed once for all of them, so that every product reads rows of queries, gradients
// and scores where they lie. The backward pass computes the softmax's weights again from each row's log-sum-exp (arXiv 2307.08691).
// A key that a row does not see is not read for it: 0 * NaN would not be 0.

constexpr int kTrainRows = 48;                        // rows that meet a block at a time: a multiple of kBlockRows
constexpr int kBlockRows = 6;                         // rows and vectors of a register block
constexpr int kBlockVectors = kLanes == 16 ? 4 : 2;

// The left side of a product, element (m, d): rows that lie anywhere, or columns of rows that lie `stride` apart.
struct Rows {
  const float* const* row;
  template <int Count>
  struct View {
    const float* row[Count];
    float operator()(int m, int64_t d) const { return row[m][d]; }
  };
  template <int Count>
  View<Count> view(int64_t first) const {
    View<Count> made;
    for (int m = 0; m < Count; ++m) made.row[m] = row[first + m];
    return made;
  }
};

struct Columns {
  const float* from;
  int64_t stride;
  template <int Count>
  struct View {
    const float* from;
    int64_t stride;
    float operator()(int m, int64_t d) const { return from[d * stride + m]; }
  };
  template <int Count>
  View<Count> view(int64_t first) const { return {from + first, stride}; }
};

// The right side, row d: rows that lie `width` apart, or anywhere.
struct Together {
  const float* from;
  int64_t width;
  const float* operator()(int64_t d) const { return from + d * width; }
};

struct Apart {
  const float* const* row;
  const float* operator()(int64_t d) const { return row[d]; }
};

enum class Into { kFresh, kAdded, kFaded };  // what becomes of what is there: overwritten, added to, multiplied by the row's factor

// c[m][n] (+)= sum over d < depth of a(m, d) * b(d)[n], for Count rows and Vectors vectors from n on.
template <int Count, int Vectors, Into Mode, typename A, typename B>
BILEVEL_INLINE void product_block(int64_t depth, int64_t n, const A& a, const B& b, float* const* c, const float* factor) {
  Vector total[Count][Vectors];
  for (int m = 0; m < Count; ++m)
    for (int i = 0; i < Vectors; ++i) {
      if constexpr (Mode == Into::kFresh) total[m][i] = Vector{};
      if constexpr (Mode == Into::kAdded) total[m][i] = load(c[m] + n + i * kLanes);
      if constexpr (Mode == Into::kFaded) total[m][i] = load(c[m] + n + i * kLanes) * factor[m];
    }
  for (int64_t d = 0; d < depth; ++d) {
    Vector value[Vectors];
    const float* row = b(d) + n;
    for (int i = 0; i < Vectors; ++i) value[i] = load(row + i * kLanes);
    for (int m = 0; m < Count; ++m)
      for (int i = 0; i < Vectors; ++i) total[m][i] += a(m, d) * value[i];
  }
  for (int m = 0; m < Count; ++m)
    for (int i = 0; i < Vectors; ++i) store(c[m] + n + i * kLanes, total[m][i]);
}

template <int Count, Into Mode, typename A, typename B>
BILEVEL_INLINE void product_rows(int64_t depth, int64_t width, const A& a, const B& b, float* const* c, const float* factor) {
  int64_t n = 0;
  for (; n + kBlockVectors * kLanes <= width; n += kBlockVectors * kLanes)
    product_block<Count, kBlockVectors, Mode>(depth, n, a, b, c, factor);
  for (; n + kLanes <= width; n += kLanes) product_block<Count, 1, Mode>(depth, n, a, b, c, factor);
  for (; n < width; ++n)
    for (int m = 0; m < Count; ++m) {
      float total = Mode == Into::kFresh ? 0.0f : Mode == Into::kAdded ? c[m][n] : c[m][n] * factor[m];
      for (int64_t d = 0; d < depth; ++d) total += a(m, d) * b(d)[n];
      c[m][n] = total;
    }
}

// The same for any number of rows.
template <Into Mode, typename A, typename B>
static void product(int64_t rows, int64_t depth, int64_t width, const A& a, const B& b, float* const* c, const float* factor = nullptr) {
  int64_t m = 0;
  for (; m + kBlockRows <= rows; m += kBlockRows)
    product_rows<kBlockRows, Mode>(depth, width, a.template view<kBlockRows>(m), b, c + m, factor + m);
  for (; m + 2 <= rows; m += 2) product_rows<2, Mode>(depth, width, a.template view<2>(m), b, c + m, factor + m);
  for (; m < rows; ++m) product_rows<1, Mode>(depth, width, a.template view<1>(m), b, c + m, factor + m);
}

// Rows that meet one block: where they lie, and how many of its keys each sees.
struct TrainTile {
  int64_t at[kTrainRows];      // (b*Hq + h)*L + i
  int64_t own[kTrainRows];     // (i - first)*count + (h - head.first), in what the unit keeps of each row
  int32_t keys[kTrainRows];
  int64_t rows, fewest, most;  // least and greatest of keys
};

struct TrainScratch {
  TileScratch pairs;
  std::vector<float> keys, values;      // transposed: [D, padded], [E, padded]
  std::vector<float> scores, changes;   // [kTrainRows, padded]
  std::vector<float> peak, total;       // per row of the unit; backward: inner products of gradient and output in total
  std::vector<float*> grad_keys, grad_values;  // the block's rows
  TrainTile tile;
  bool is_finite = true;  // all keys and values of the block that some row sees
};

static int64_t padded_keys(const AttentionArguments& a) { return (a.block_size + kLanes - 1) / kLanes * kLanes; }

// A block [keys, width] as [width, padded].
static void transpose(const float* from, int64_t keys, int64_t width, int64_t padded, std::vector<float>& to) {
  to.assign(width * padded, 0.0f);
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t d = 0; d < width; ++d) to[d * padded + j] = from[j * width + d];
}

// Visits every block that tokens [first, last) of a virtual head kept, tile by tile: begin(block, keys), then tile() for each.
template <typename Begin, typename Each>
static void each_tile(const AttentionArguments& a, int64_t b, const VirtualHead& head, int64_t first, int64_t last, TrainScratch& s,
                      const Begin& begin_block, const Each& each) {
  sort_pairs(a, b, head.list, first, last, s.pairs);
  TrainTile& tile = s.tile;
  for (int64_t j = 0; j < a.capacity / a.block_size; ++j) {
    // sort_pairs has moved each start on to its block's end, which is where the next block starts.
    const int64_t begin = s.pairs.start[j], rows = (s.pairs.start[j + 1] - begin) * head.count, block = j * a.block_size;
    if (rows == 0) continue;
    const int64_t newest = s.pairs.tokens[s.pairs.start[j + 1] - 1];  // tokens ascend
    begin_block(block, std::min(a.block_size, horizon_of(a, b, newest) - block));
    const int32_t* token = s.pairs.tokens.data() + begin;
    int64_t h = 0;
    for (int64_t row = 0; row < rows;) {
      tile.fewest = a.block_size, tile.most = 0;
      for (tile.rows = 0; tile.rows < kTrainRows && row < rows; ++tile.rows, ++row) {
        const int64_t i = *token, keys = std::min(a.block_size, horizon_of(a, b, i) - block);
        tile.at[tile.rows] = (b * a.heads + head.first + h) * a.length + i;
        tile.own[tile.rows] = (i - first) * head.count + h;
        tile.keys[tile.rows] = static_cast<int32_t>(keys);
        tile.fewest = std::min(tile.fewest, keys), tile.most = std::max(tile.most, keys);
        if (++h == head.count) h = 0, ++token;
      }
      each();
    }
  }
}

// target rows (+)= weights [rows, most] times block [most, width], each row's own keys only.
template <Into Mode>
static void gather_rows(const TrainScratch& s, float* const* weights, const float* block, int64_t width, float* const* target,
                        const float* factor = nullptr) {
  const TrainTile& tile = s.tile;
  if (s.is_finite || tile.fewest == tile.most)
    return product<Mode>(tile.rows, tile.most, width, Rows{weights}, Together{block, width}, target, factor);
  for (int64_t r = 0; r < tile.rows; ++r)
    product<Mode>(1, tile.keys[r], width, Rows{weights + r}, Together{block, width}, target + r, factor + r);
}

// Addresses of the tile's rows in a tensor [B, Hq, L, width].
template <typename Element>
static void rows_of(const TrainTile& tile, Element* from, int64_t width, Element** rows) {
  for (int64_t r = 0; r < tile.rows; ++r) rows[r] = from + tile.at[r] * width;
}

// Room for [kTrainRows, padded] numbers, and the addresses of its rows.
static void make_rows(std::vector<float>& numbers, int64_t padded, float** rows) {
  numbers.resize(kTrainRows * padded);
  for (int64_t r = 0; r < kTrainRows; ++r) rows[r] = numbers.data() + r * padded;
}

BILEVEL_INLINE Vector lanes_from(int64_t first) {
  Vector lane;
  for (int n = 0; n < kLanes; ++n) lane[n] = static_cast<float>(first + n);
  return lane;
}

// One row's scores to weights against its new peak; returns what its earlier result is multiplied by.
static float weigh_row(float* scores, int64_t keys, int64_t padded, float scale, float& peak, float& total) {
  Vector most = splat(peak);
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vector value = lanes_from(j) < splat(static_cast<float>(keys)) ? load(scores + j) * scale : splat(-INFINITY);
    store(scores + j, value);
    most = larger(value, most);
  }
  float lane[kLanes];
  store(lane, most);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  const float highest = lane[0];
  Vector sum_of = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vector weight = exp_nonpositive(load(scores + j) - splat(highest));
    store(scores + j, weight);
    sum_of += weight;
  }
  const float fade = peak == highest ? 1.0f : exp_nonpositive(splat(peak) - splat(highest))[0];
  peak = highest;
  total = total * fade + sum(sum_of);
  return fade;
}

// Tokens [first, last) of one virtual head: output and log-sum-exp.
static void train_forward(const TrainingArguments& t, int64_t b, const VirtualHead& head, int64_t first, int64_t last,
                          TrainScratch& s) {
  const AttentionArguments& a = t.call;
  const int64_t padded = padded_keys(a), kv = (b * a.kv_heads + head.kv_head) * a.capacity, end = std::min<int64_t>(last, a.new_len[b]);
  for (int64_t h = head.first; h < head.first + head.count; ++h) {
    const int64_t at = (b * a.heads + h) * a.length;
    std::fill(a.out + (at + first) * t.value_width, a.out + (at + last) * t.value_width, 0.0f);
    std::fill(t.lse + at + first, t.lse + at + last, -INFINITY);
  }
  if (first >= end) return;
  float* scores[kTrainRows];
  make_rows(s.scores, padded, scores);
  s.peak.assign((end - first) * head.count, -3.402823466e38f);
  s.total.assign((end - first) * head.count, 0.0f);
  const float* values = nullptr;
  each_tile(
      a, b, head, first, end, s,
      [&](int64_t block, int64_t keys) {
        values = a.v + (kv + block) * t.value_width;
        transpose(a.k + (kv + block) * a.width, keys, a.width, padded, s.keys);
        s.is_finite = all_finite(values, keys * t.value_width);
      },
      [&] {
        const TrainTile& tile = s.tile;
        const float* query[kTrainRows];
        float *out[kTrainRows], factor[kTrainRows];
        rows_of(tile, a.q, a.width, query);
        rows_of(tile, a.out, t.value_width, out);
        product<Into::kFresh>(tile.rows, a.width, padded, Rows{query}, Together{s.keys.data(), padded}, scores);
        for (int64_t r = 0; r < tile.rows; ++r)
          factor[r] = weigh_row(scores[r], tile.keys[r], padded, a.scale, s.peak[tile.own[r]], s.total[tile.own[r]]);
        gather_rows<Into::kFaded>(s, scores, values, t.value_width, out, factor);
      });
  for (int64_t row = 0; row < (end - first) * head.count; ++row) {
    if (s.pairs.counts[row / head.count] == 0) continue;  // no visible token
    const int64_t at = (b * a.heads + head.first + row % head.count) * a.length + first + row / head.count;
    float* out = a.out + at * t.value_width;
    for (int64_t d = 0; d < t.value_width; ++d) out[d] /= s.total[row];
    t.lse[at] = s.peak[row] + std::log(s.total[row]);
  }
}

// Scores and products with the output's gradient -> weights (in place of the scores) and the scores' gradients (of the products).
static void weigh_back(float* scores, float* products, int64_t keys, int64_t padded, float scale, float lse, float inner) {
  for (int64_t j = 0; j < padded; j += kLanes) {
    const auto seen = lanes_from(j) < splat(static_cast<float>(keys));
    const Vector weight = exp_nonpositive(load(scores + j) * scale - splat(lse));
    store(products + j, seen ? weight * (load(products + j) - splat(inner)) * scale : Vector{});
    store(scores + j, seen ? weight : Vector{});
  }
}

BILEVEL_INLINE float dot(const float* a, const float* b, int64_t width) {
  Vector total = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) total += load(a + d) * load(b + d);
  float result = sum(total);
  for (; d < width; ++d) result += a[d] * b[d];
  return result;
}

// Tokens [first, last) of one virtual head: their grad_q, and what they add to grad_k [M, D] and grad_v [M, E] of the kv head.
static void train_backward(const TrainingArguments& t, int64_t b, const VirtualHead& head, int64_t first, int64_t last,
                           float* grad_k, float* grad_v, TrainScratch& s) {
  const AttentionArguments& a = t.call;
  const int64_t padded = padded_keys(a), kv = (b * a.kv_heads + head.kv_head) * a.capacity, end = std::min<int64_t>(last, a.new_len[b]);
  for (int64_t h = head.first; h < head.first + head.count; ++h) {
    float* from = t.grad_q + (b * a.heads + h) * a.length * a.width;
    std::fill(from + first * a.width, from + last * a.width, 0.0f);
  }
  if (first >= end) return;
  float *weights[kTrainRows], *changes[kTrainRows];
  s.grad_keys.resize(a.block_size);
  s.grad_values.resize(a.block_size);
  make_rows(s.scores, padded, weights);
  make_rows(s.changes, padded, changes);
  s.total.resize((end - first) * head.count);
  for (int64_t i = first; i < end; ++i)
    for (int64_t h = 0; h < head.count; ++h) {
      const int64_t at = ((b * a.heads + head.first + h) * a.length + i) * t.value_width;
      s.total[(i - first) * head.count + h] = dot(t.grad_out + at, a.out + at, t.value_width);
    }
  const float* keys_at = nullptr;
  each_tile(
      a, b, head, first, end, s,
      [&](int64_t block, int64_t keys) {
        keys_at = a.k + (kv + block) * a.width;
        transpose(keys_at, keys, a.width, padded, s.keys);
        transpose(a.v + (kv + block) * t.value_width, keys, t.value_width, padded, s.values);
        s.is_finite = all_finite(keys_at, keys * a.width);
        for (int64_t j = 0; j < keys; ++j) {
          s.grad_keys[j] = grad_k + (block + j) * a.width;
          s.grad_values[j] = grad_v + (block + j) * t.value_width;
        }
      },
      [&] {
        const TrainTile& tile = s.tile;
        const float *query[kTrainRows], *grad[kTrainRows];
        float* grad_query[kTrainRows];
        rows_of(tile, a.q, a.width, query);
        rows_of(tile, t.grad_out, t.value_width, grad);
        rows_of(tile, t.grad_q, a.width, grad_query);
        product<Into::kFresh>(tile.rows, a.width, padded, Rows{query}, Together{s.keys.data(), padded}, weights);
        product<Into::kFresh>(tile.rows, t.value_width, padded, Rows{grad}, Together{s.values.data(), padded}, changes);
        for (int64_t r = 0; r < tile.rows; ++r)
          weigh_back(weights[r], changes[r], tile.keys[r], padded, a.scale, t.lse[tile.at[r]], s.total[tile.own[r]]);
        gather_rows<Into::kAdded>(s, changes, keys_at, a.width, grad_query);
        product<Into::kAdded>(tile.most, tile.rows, a.width, Columns{changes[0], padded}, Apart{query}, s.grad_keys.data());
        product<Into::kAdded>(tile.most, tile.rows, t.value_width, Columns{weights[0], padded}, Apart{grad}, s.grad_values.data());
      });
}

// Pieces of the tokens are units of work whose number follows the sizes alone: results do not depend on how many threads there are.
static void train_attention(const TrainingArguments& t, const Parallel& parallel) {
  const AttentionArguments& a = t.call;
  const std::vector<VirtualHead> heads = virtual_heads(a);
  const int64_t lists = heads.size(), tokens = (a.length + t.pieces - 1) / t.pieces;
  if (!t.grad_out)
    return parallel.each(a.batch * lists * t.pieces, [&](size_t unit) {
      thread_local TrainScratch scratch;
      const int64_t v = unit / t.pieces % lists, b = unit / (t.pieces * lists), first = unit % t.pieces * tokens;
      if (first < a.length) train_forward(t, b, heads[v], first, std::min(first + tokens, a.length), scratch);
    });
  parallel.each(a.batch * a.kv_heads * t.pieces, [&](size_t unit) {
    thread_local TrainScratch scratch;
    const int64_t piece = unit % t.pieces, kv = unit / t.pieces % a.kv_heads, b = unit / (t.pieces * a.kv_heads);
    const int64_t first = piece * tokens, cache = ((piece * a.batch + b) * a.kv_heads + kv) * a.capacity;
    if (first >= a.length) return;
    for (const VirtualHead& head : heads)
      if (head.kv_head == kv)
        train_backward(t, b, head, first, std::min(first + tokens, a.length), t.grad_k + cache * a.width,
                       t.grad_v + cache * t.value_width, scratch);
  });
}
