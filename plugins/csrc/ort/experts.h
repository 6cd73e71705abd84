// ExpertRoute and RoutedExperts. Included once per instruction set.

struct ExpertScratch {
  std::vector<float> scores;              // [E], unbiased
  std::vector<uint64_t> choices, groups;  // ranks: score descending, index ascending; 0: never selected
  std::vector<float> best;
};

// sqrt(log(1 + e^x)). Far below 0 the logarithm is e^x, which underflows where its root does not.
static float sqrt_softplus(float x) {
  return x < -20.0f ? std::exp(0.5f * x) : std::sqrt(std::max(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))));
}

// Scores of one token's experts from their logits: one by one, or softmax over all of them.
static void expert_scores(const ExpertRouteArguments& a, const float* logits, float* scores) {
  if (a.score_func == ScoreFunc::kSigmoid) {
    for (int64_t e = 0; e < a.experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    return;
  }
  if (a.score_func == ScoreFunc::kSqrtSoftplus) {
    for (int64_t e = 0; e < a.experts; ++e) scores[e] = sqrt_softplus(logits[e]);
    return;
  }
  float peak = -INFINITY, total = 0.0f;
  for (int64_t e = 0; e < a.experts; ++e) peak = std::max(peak, logits[e]);
  for (int64_t e = 0; e < a.experts; ++e) total += scores[e] = std::exp(logits[e] - peak);
  for (int64_t e = 0; e < a.experts; ++e) scores[e] /= total;
}

// A score as the selection sees it: NaN is -inf, +inf the largest finite number.
BILEVEL_INLINE float bounded(float score) { return std::isnan(score) ? -INFINITY : std::min(score, 3.402823466e38f); }

static float group_value(const ExpertRouteArguments& a, const float* choice, int64_t size, float given) {
  if (a.group_score == GroupScore::kExternal) return given;
  float first = -INFINITY, second = -INFINITY;
  for (int64_t n = 0; n < size; ++n) {
    const float value = bounded(choice[n]);
    second = std::max(second, std::min(first, value));
    first = std::max(first, value);
  }
  return a.group_score == GroupScore::kMax || size == 1 ? first : first + second;
}

static void keep_best(std::vector<uint64_t>& ranks, int64_t count) {
  ranks.erase(std::remove(ranks.begin(), ranks.end(), uint64_t{0}), ranks.end());
  std::sort(ranks.begin(), ranks.end(), std::greater<uint64_t>());
  if (static_cast<int64_t>(ranks.size()) > count) ranks.resize(count);
}

// Experts of groups that are not kept compete with 0, but for those that are never chosen.
static void fill_dropped_groups(const ExpertRouteArguments& a, ExpertScratch& s) {
  const int64_t size = a.experts / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {
    const auto is_g = [&](uint64_t group) { return block_of(group) == g; };
    if (std::any_of(s.groups.begin(), s.groups.end(), is_g)) continue;
    for (int64_t e = g * size; e < (g + 1) * size; ++e)
      if (rank_of(s.best[e], e)) s.choices.push_back(rank_of(0.0f, e));
  }
}

static void route_token(const ExpertRouteArguments& a, int64_t t, ExpertScratch& s) {
  const int64_t size = a.experts / a.groups;
  s.scores.resize(a.experts);
  s.best.resize(a.experts);
  expert_scores(a, a.logits + t * a.experts, s.scores.data());
  for (int64_t e = 0; e < a.experts; ++e) s.best[e] = s.scores[e] + a.select_bias[e];
  s.groups.clear();
  for (int64_t g = 0; g < a.groups; ++g)
    s.groups.push_back(rank_of(group_value(a, s.best.data() + g * size, size, a.group_logits[t * a.groups + g]), g));
  keep_best(s.groups, a.topk_group);
  s.choices.clear();
  for (const uint64_t group : s.groups)
    for (int64_t e = block_of(group) * size; e < (block_of(group) + 1) * size; ++e) s.choices.push_back(rank_of(s.best[e], e));
  if (a.zero_fill) fill_dropped_groups(a, s);
  keep_best(s.choices, a.top_k);
  float total = 1e-20f;
  for (const uint64_t choice : s.choices) total += s.scores[block_of(choice)];
  total = std::max(total, a.norm_floor);
  for (int64_t n = 0; n < a.top_k; ++n) {
    const bool used = n < static_cast<int64_t>(s.choices.size());
    const int32_t expert = used ? block_of(s.choices[n]) : -1;
    a.ids[t * a.top_k + n] = expert;
    a.weights[t * a.top_k + n] = used ? s.scores[expert] / (a.normalize ? total : 1.0f) * a.scale : 0.0f;
  }
}

static void expert_route(const ExpertRouteArguments& a, const Parallel& parallel) {
  constexpr int64_t kTokens = 64;  // tokens per unit of work
  parallel.each((a.tokens + kTokens - 1) / kTokens, [&](size_t unit) {
    thread_local ExpertScratch scratch;
    const int64_t last = std::min<int64_t>((unit + 1) * kTokens, a.tokens);
    for (int64_t t = unit * kTokens; t < last; ++t) route_token(a, t, scratch);
  });
}

constexpr int64_t kFew = 2;  // that few columns are cheaper as dot products

// Up to kTileRows (token, slot) pairs of one expert: a matrix with a column for each of them.
struct ExpertTile {
  int64_t expert, first, rows;  // pairs [first, first + rows) of the sorted list

  bool is_few() const { return rows <= kFew; }
  // Where number d of column r lies: d * step() + r * column(length). Few columns are stored one behind the other, for `dots`.
  int64_t step() const { return is_few() ? 1 : kTileRows; }
  int64_t column(int64_t length) const { return is_few() ? length : 1; }
};

// out [count, rows] = rows [first, first + count) of `matrix` times the columns of x, of matrix.padded() numbers; length: of a column
// that `out` is part of.
template <typename Matrix>
static void times_tile(const Matrix& matrix, int64_t first, int64_t count, const float* x, const ExpertTile& tile, float* out,
                       int64_t length) {
  if (tile.is_few()) {
    for (int64_t r = 0; r < tile.rows; ++r) matrix.dots(x + r * matrix.padded(), first, count, out + r * length);
    return;
  }
  thread_local std::vector<float> buffer;
  buffer.resize(kKeys * matrix.width + kSlack);
  int64_t n = 0;
  for (; n + kKeys <= count; n += kKeys)
    score_keys<kKeys>(x, matrix.floats(first + n, kKeys, buffer.data()), matrix.width, out + n * kTileRows);
  for (; n < count; ++n) score_keys<1>(x, matrix.floats(first + n, 1, buffer.data()), matrix.width, out + n * kTileRows);
}

// The pairs sorted by expert: pairs[n] = token * k + slot; returns the tiles.
static std::vector<ExpertTile> expert_tiles(const ExpertsArguments& a, std::vector<int64_t>& pairs) {
  std::vector<int64_t> start(a.experts + 2, 0);
  for (int64_t n = 0; n < a.tokens * a.kept; ++n)
    if (a.ids[n] >= 0 && a.ids[n] < a.experts) ++start[a.ids[n] + 2];
  for (int64_t e = 1; e <= a.experts; ++e) start[e + 1] += start[e];
  pairs.resize(start[a.experts + 1]);
  for (int64_t n = 0; n < a.tokens * a.kept; ++n)
    if (a.ids[n] >= 0 && a.ids[n] < a.experts) pairs[start[a.ids[n] + 1]++] = n;
  std::vector<ExpertTile> tiles;
  for (int64_t e = 0; e < a.experts; ++e)
    for (int64_t first = start[e]; first < start[e + 1]; first += kTileRows)
      tiles.push_back({e, first, std::min<int64_t>(kTileRows, start[e + 1] - first)});
  return tiles;
}

// Three passes, each shared out among the threads: SwiGLU of every tile, its product with `down`, the weighted sum per token.
template <typename Matrix>
static void experts_of(const ExpertsArguments& a, const Matrix& gate_up, const Matrix& down, const Parallel& parallel) {
  constexpr int64_t kRows = 64;  // rows of a weight matrix per unit of work
  std::vector<int64_t> pairs, place(a.tokens * a.kept, -1), step(place.size());
  const std::vector<ExpertTile> tiles = expert_tiles(a, pairs);
  const int64_t width = gate_up.padded(), hidden_width = down.padded();
  // Not cleared: a tile of few columns touches little of its memory.
  const auto floats = [&](int64_t length) { return std::unique_ptr<float[]>(new float[tiles.size() * length * kTileRows]); };
  const auto all_x = floats(width), all_hidden = floats(hidden_width), all_y = floats(a.width);
  parallel.each(tiles.size(), [&](size_t n) {
    const ExpertTile& tile = tiles[n];
    float *x = all_x.get() + n * width * kTileRows, *hidden = all_hidden.get() + n * hidden_width * kTileRows;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t pair = pairs[tile.first + r];
      const float* from = a.x + pair / a.kept * a.width;
      for (int64_t d = 0; d < a.width; ++d) x[d * tile.step() + r * tile.column(width)] = from[d];
      place[pair] = n * a.width * kTileRows + r * tile.column(a.width), step[pair] = tile.step();
      if (!tile.is_few()) continue;
      std::fill(x + r * width + a.width, x + (r + 1) * width, 0.0f);
      std::fill(hidden + r * hidden_width + a.hidden, hidden + (r + 1) * hidden_width, 0.0f);
    }
    if (!tile.is_few())  // columns that nobody reads: their products shall be finite
      for (int64_t d = 0; d < a.width; ++d) std::fill(x + d * kTileRows + tile.rows, x + (d + 1) * kTileRows, 0.0f);
  });
  const int64_t pieces = (a.hidden + kRows - 1) / kRows;
  parallel.each(tiles.size() * pieces, [&](size_t unit) {
    thread_local std::vector<float> up;
    const size_t n = unit / pieces;
    const ExpertTile& tile = tiles[n];
    const int64_t first = unit % pieces * kRows, count = std::min(kRows, a.hidden - first);
    const int64_t row = tile.expert * 2 * a.hidden + first;
    const float* x = all_x.get() + n * width * kTileRows;
    float* gate = all_hidden.get() + n * hidden_width * kTileRows + first * tile.step();
    up.resize(count * kTileRows);
    times_tile(gate_up, row, count, x, tile, gate, hidden_width);
    times_tile(gate_up, row + a.hidden, count, x, tile, up.data(), count);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t r = 0; r < tile.rows; ++r) {
        float& value = gate[j * tile.step() + r * tile.column(hidden_width)];
        const float bounded_gate = std::min(value, a.limit);  // NaN stays, as it is the first
        const float bounded_up = std::max(std::min(up[j * tile.step() + r * tile.column(count)], a.limit), -a.limit);
        value = bounded_gate / (1.0f + std::exp(-a.gate_scale * bounded_gate)) * (bounded_up + a.up_shift);
      }
    if (!tile.is_few())
      for (int64_t j = 0; j < count; ++j) std::fill(gate + j * kTileRows + tile.rows, gate + (j + 1) * kTileRows, 0.0f);
  });
  const int64_t parts = (a.width + kRows - 1) / kRows;
  parallel.each(tiles.size() * parts, [&](size_t unit) {
    const size_t n = unit / parts;
    const ExpertTile& tile = tiles[n];
    const int64_t first = unit % parts * kRows, count = std::min(kRows, a.width - first);
    times_tile(down, tile.expert * a.width + first, count, all_hidden.get() + n * hidden_width * kTileRows, tile,
               all_y.get() + n * a.width * kTileRows + first * tile.step(), a.width);
  });
  parallel.each(a.tokens, [&](size_t t) {
    float* out = a.out + t * a.width;
    std::fill(out, out + a.width, 0.0f);
    for (int64_t slot = 0; slot < a.kept; ++slot) {
      const int64_t pair = t * a.kept + slot;
      if (place[pair] < 0) continue;
      const float* y = all_y.get() + place[pair];
      for (int64_t d = 0; d < a.width; ++d) out[d] += a.weights[pair] * y[d * step[pair]];
    }
  });
}

template <int Bits, int Block>
static void packed_experts(const ExpertsArguments& a, const Parallel& parallel) {
  using Matrix = Packed<Bits, Block>;
  experts_of(a, Matrix{a.packed_gate_up, a.width}, Matrix{a.packed_down, a.hidden}, parallel);
}

static void experts(const ExpertsArguments& a, const Parallel& parallel) {
  const bool is_usual = a.packed_gate_up.block == 32;
  switch (a.packed_gate_up.bits) {
    case 4: return is_usual ? packed_experts<4, 32>(a, parallel) : packed_experts<4, 0>(a, parallel);
    case 8: return is_usual ? packed_experts<8, 32>(a, parallel) : packed_experts<8, 0>(a, parallel);
    default: experts_of(a, FloatRows{a.gate_up, a.width}, FloatRows{a.down, a.hidden}, parallel);
  }
}
