// RoutedAttention with its gradients, for training. Included once per instruction set, after attention_tiles.h.
//
// As there, the (token, block) pairs of a virtual head are sorted by block, and each block meets all rows that kept it, some at a
// time. Keys and values of the block are transposed once for all of them, so that every product reads rows of queries, gradients
// and scores where they lie. The backward pass computes the softmax's weights again from each row's log-sum-exp (arXiv 2307.08691).
// A key that a row does not see is not read for it: 0 * NaN would not be 0.

constexpr int kTrainRows = 48;                        // rows that meet a block at a time: a multiple of kBlockRows
constexpr int kBlockRows = 6;                         // rows and vectors of a register block
constexpr int kBlockVectors = kLanes == 16 ? 4 : 2;

// c(m)[n] = factor(m) * c(m)[n] + sum over d < depth of a(m, d) * b(d)[n], for Rows rows and Vectors vectors from n on.
template <int Rows, int Vectors, typename A, typename B, typename C, typename Factor>
BILEVEL_INLINE void product_block(int64_t depth, int64_t n, const A& a, const B& b, const C& c, const Factor& factor) {
  Vector total[Rows][Vectors];
  for (int m = 0; m < Rows; ++m)
    for (int i = 0; i < Vectors; ++i) total[m][i] = factor(m) == 0.0f ? Vector{} : load(c(m) + n + i * kLanes) * factor(m);
  for (int64_t d = 0; d < depth; ++d) {
    Vector value[Vectors];
    const float* row = b(d) + n;
    for (int i = 0; i < Vectors; ++i) value[i] = load(row + i * kLanes);
    for (int m = 0; m < Rows; ++m)
      for (int i = 0; i < Vectors; ++i) total[m][i] += a(m, d) * value[i];
  }
  for (int m = 0; m < Rows; ++m)
    for (int i = 0; i < Vectors; ++i) store(c(m) + n + i * kLanes, total[m][i]);
}

template <int Rows, typename A, typename B, typename C, typename Factor>
BILEVEL_INLINE void product_rows(int64_t depth, int64_t width, const A& a, const B& b, const C& c, const Factor& factor) {
  int64_t n = 0;
  for (; n + kBlockVectors * kLanes <= width; n += kBlockVectors * kLanes)
    product_block<Rows, kBlockVectors>(depth, n, a, b, c, factor);
  for (; n + kLanes <= width; n += kLanes) product_block<Rows, 1>(depth, n, a, b, c, factor);
  for (; n < width; ++n)
    for (int m = 0; m < Rows; ++m) {
      float total = factor(m) == 0.0f ? 0.0f : c(m)[n] * factor(m);
      for (int64_t d = 0; d < depth; ++d) total += a(m, d) * b(d)[n];
      c(m)[n] = total;
    }
}

// The same for any number of rows. A factor of 0 does not read c.
template <typename A, typename B, typename C, typename Factor>
BILEVEL_INLINE void product(int64_t rows, int64_t depth, int64_t width, const A& a, const B& b, const C& c, const Factor& factor) {
  int64_t m = 0;
  const auto from = [&](auto rows_at_once) {
    constexpr int kRows = decltype(rows_at_once)::value;
    for (; m + kRows <= rows; m += kRows)
      product_rows<kRows>(
          depth, width, [&](int r, int64_t d) { return a(m + r, d); }, b, [&](int r) { return c(m + r); },
          [&](int r) { return factor(m + r); });
  };
  from(std::integral_constant<int, kBlockRows>{});
  from(std::integral_constant<int, 2>{});
  from(std::integral_constant<int, 1>{});
}

// Rows that meet one block: where they lie, and how many of its keys each sees.
struct TrainTile {
  int64_t at[kTrainRows];      // (b*Hq + h)*L + i
  int32_t keys[kTrainRows];
  int64_t rows, fewest, most;  // least and greatest of keys
};

struct TrainScratch {
  TileScratch pairs;
  std::vector<float> keys, values;      // transposed: [D, padded], [E, padded]
  std::vector<float> scores, changes;   // [kTrainRows, padded]
  std::vector<float> peak, total;       // per row of the unit
  TrainTile tile;
  bool is_finite = true;  // all keys and values of the block that some row sees
};

static int64_t padded_keys(const AttentionArguments& a) { return (a.block_size + kLanes - 1) / kLanes * kLanes; }

// A block [keys, width] as [width, padded]; returns whether all of it is finite.
static bool transpose(const float* from, int64_t keys, int64_t width, int64_t padded, std::vector<float>& to) {
  to.assign(width * padded, 0.0f);
  float check = 0.0f;  // stays 0: anything not finite times 0 is NaN
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t d = 0; d < width; ++d) {
      const float value = from[j * width + d];
      to[d * padded + j] = value;
      check += value * 0.0f;
    }
  return check == 0.0f;
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
    for (int64_t row = 0; row < rows;) {
      tile.fewest = a.block_size, tile.most = 0;
      for (tile.rows = 0; tile.rows < kTrainRows && row < rows; ++tile.rows, ++row) {
        const int64_t i = s.pairs.tokens[begin + row / head.count], h = head.first + row % head.count;
        const int64_t keys = std::min(a.block_size, horizon_of(a, b, i) - block);
        tile.at[tile.rows] = (b * a.heads + h) * a.length + i;
        tile.keys[tile.rows] = static_cast<int32_t>(keys);
        tile.fewest = std::min(tile.fewest, keys), tile.most = std::max(tile.most, keys);
      }
      each();
    }
  }
}

// target rows = factor * target rows + weights [rows, most] times block [most, width], each row's own keys only.
template <typename Target, typename Factor>
static void gather_rows(const TrainScratch& s, const float* weights, const float* block, int64_t width, int64_t padded,
                        const Target& target, const Factor& factor) {
  const TrainTile& tile = s.tile;
  const auto row = [&](int64_t d) { return block + d * width; };
  if (s.is_finite || tile.fewest == tile.most)
    return product(
        tile.rows, tile.most, width, [&](int64_t m, int64_t d) { return weights[m * padded + d]; }, row, target, factor);
  for (int64_t r = 0; r < tile.rows; ++r)
    product(
        1, tile.keys[r], width, [&](int64_t, int64_t d) { return weights[r * padded + d]; }, row,
        [&](int64_t) { return target(r); }, [&](int64_t) { return factor(r); });
}

// scores [rows, padded] = rows of `from` [., width] times the transposed block.
static void score_rows(const TrainTile& tile, const float* from, int64_t width, const std::vector<float>& block, int64_t padded,
                       std::vector<float>& scores) {
  product(
      tile.rows, width, padded, [&](int64_t m, int64_t d) { return from[tile.at[m] * width + d]; },
      [&](int64_t d) { return block.data() + d * padded; }, [&](int64_t m) { return scores.data() + m * padded; },
      [](int64_t) { return 0.0f; });
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
  const float highest = *std::max_element(lane, lane + kLanes);
  Vector sum_of = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vector weight = exp_nonpositive(load(scores + j) - splat(highest));
    store(scores + j, weight);
    sum_of += weight;
  }
  const Vector fade = exp_nonpositive(splat(peak) - splat(highest));
  peak = highest;
  total = total * fade[0] + sum(sum_of);
  return fade[0];
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
  s.scores.resize(kTrainRows * padded);
  s.peak.assign((end - first) * head.count, -3.402823466e38f);
  s.total.assign((end - first) * head.count, 0.0f);
  const auto local = [&](int64_t at) {  // a row's place in peak and total
    const int64_t i = at % a.length, h = at / a.length % a.heads - head.first;
    return (i - first) * head.count + h;
  };
  const float* values = nullptr;
  each_tile(
      a, b, head, first, end, s,
      [&](int64_t block, int64_t keys) {
        values = a.v + (kv + block) * t.value_width;
        transpose(a.k + (kv + block) * a.width, keys, a.width, padded, s.keys);
        s.is_finite = true;
        for (int64_t n = 0; n < keys * t.value_width; ++n) s.is_finite = s.is_finite && values[n] * 0.0f == 0.0f;
      },
      [&] {
        const TrainTile& tile = s.tile;
        float factor[kTrainRows];
        score_rows(tile, a.q, a.width, s.keys, padded, s.scores);
        for (int64_t r = 0; r < tile.rows; ++r) {
          const int64_t own = local(tile.at[r]);
          factor[r] = weigh_row(s.scores.data() + r * padded, tile.keys[r], padded, a.scale, s.peak[own], s.total[own]);
        }
        gather_rows(
            s, s.scores.data(), values, t.value_width, padded, [&](int64_t r) { return a.out + tile.at[r] * t.value_width; },
            [&](int64_t r) { return factor[r]; });
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
  s.scores.resize(kTrainRows * padded);
  s.changes.resize(kTrainRows * padded);
  int64_t block_at = 0;
  each_tile(
      a, b, head, first, end, s,
      [&](int64_t block, int64_t keys) {
        block_at = block;
        s.is_finite = transpose(a.k + (kv + block) * a.width, keys, a.width, padded, s.keys);
        transpose(a.v + (kv + block) * t.value_width, keys, t.value_width, padded, s.values);
      },
      [&] {
        const TrainTile& tile = s.tile;
        score_rows(tile, a.q, a.width, s.keys, padded, s.scores);
        score_rows(tile, t.grad_out, t.value_width, s.values, padded, s.changes);
        for (int64_t r = 0; r < tile.rows; ++r) {
          const float *grad = t.grad_out + tile.at[r] * t.value_width, *out = a.out + tile.at[r] * t.value_width;
          float inner = 0.0f;
          for (int64_t d = 0; d < t.value_width; ++d) inner += grad[d] * out[d];
          weigh_back(s.scores.data() + r * padded, s.changes.data() + r * padded, tile.keys[r], padded, a.scale, t.lse[tile.at[r]],
                     inner);
        }
        const float *weights = s.scores.data(), *changes = s.changes.data();
        const auto one = [](int64_t) { return 1.0f; };
        gather_rows(
            s, changes, a.k + (kv + block_at) * a.width, a.width, padded,
            [&](int64_t r) { return t.grad_q + tile.at[r] * a.width; }, one);
        product(
            tile.most, tile.rows, a.width, [&](int64_t j, int64_t r) { return changes[r * padded + j]; },
            [&](int64_t r) { return a.q + tile.at[r] * a.width; }, [&](int64_t j) { return grad_k + (block_at + j) * a.width; }, one);
        product(
            tile.most, tile.rows, t.value_width, [&](int64_t j, int64_t r) { return weights[r * padded + j]; },
            [&](int64_t r) { return t.grad_out + tile.at[r] * t.value_width; },
            [&](int64_t j) { return grad_v + (block_at + j) * t.value_width; }, one);
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
