// CoarseRoute and FineRoute. Included once per instruction set.

// A score and its block as one number that orders as the contract says: score descending, index ascending. 0: never selected.
BILEVEL_INLINE uint64_t rank_of(float score, int64_t block) {
  uint32_t bits;
  const float bounded = score > 3.402823466e38f ? 3.402823466e38f : score + 0.0f;  // +inf is the largest finite; -0 is 0
  std::memcpy(&bits, &bounded, 4);
  if (std::isnan(score) || bits == 0xff800000u) return 0;
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (static_cast<uint64_t>(bits) << 32) | (0xffffffffu - static_cast<uint32_t>(block));
}

BILEVEL_INLINE int32_t block_of(uint64_t rank) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank)); }

// What one position may see, and which blocks it keeps whatever their score.
struct Position {
  int64_t own, complete, visible;  // own block; blocks that may be scored; blocks with a visible token

  Position(const RouteArguments& a, int64_t b, int64_t i) {
    const int64_t position = a.past_len[b] + i;
    const int64_t horizon = a.causal ? position + 1 : a.past_len[b] + a.new_len[b];
    own = position / a.block_size;
    complete = horizon / a.block_size;
    visible = (horizon + a.block_size - 1) / a.block_size;
  }

  bool is_forced(const RouteArguments& a, int64_t block) const {
    return (block <= own && block > own - a.local_blocks) || block < std::min(a.init_blocks, visible);
  }

  // The forced blocks, most important first, at most topk of them.
  int64_t forced(const RouteArguments& a, int32_t* out) const {
    int64_t count = 0;
    for (int64_t j = own; j >= 0 && j > own - a.local_blocks && count < a.topk; --j) out[count++] = static_cast<int32_t>(j);
    for (int64_t j = 0; j < std::min(a.init_blocks, visible) && count < a.topk; ++j)
      if (j > own || j <= own - a.local_blocks) out[count++] = static_cast<int32_t>(j);
    return count;
  }
};

struct RouteScratch {
  std::vector<float> query;   // queries summed by the key head that they read
  std::vector<int64_t> head;  // those key heads
  std::vector<float> scores;
  std::vector<uint64_t> ranks;
  std::vector<int32_t> blocks;
};

// q1.k + q2.k = (q1 + q2).k: the route heads of a selection head that read one key head are summed first.
static void sum_queries(const RouteArguments& a, int64_t b, int64_t s, int64_t i, RouteScratch& scratch) {
  scratch.head.clear();
  scratch.query.clear();
  for (int64_t r = 0; r < a.route_heads; ++r) {
    if (r * a.selection_heads / a.route_heads != s) continue;
    const int64_t key_head = r * a.key_heads / a.route_heads;
    const float* query = a.query + ((b * a.route_heads + r) * a.length + i) * a.width;
    if (!scratch.head.empty() && scratch.head.back() == key_head) {
      float* total = scratch.query.data() + (scratch.head.size() - 1) * a.width;
      for (int64_t d = 0; d < a.width; ++d) total[d] += query[d];
    } else {
      scratch.head.push_back(key_head);
      scratch.query.insert(scratch.query.end(), query, query + a.width);
    }
  }
}

// Keep the topk best of the forced blocks and the ranked ones; write them ascending, -1 behind.
static void write_route(const RouteArguments& a, const Position& at, std::vector<uint64_t>& ranks, int32_t* route) {
  int64_t count = at.forced(a, route);
  const int64_t room = a.topk - count;
  if (room < static_cast<int64_t>(ranks.size()))
    std::nth_element(ranks.begin(), ranks.begin() + room, ranks.end(), std::greater<uint64_t>());
  const int64_t taken = std::min<int64_t>(room, ranks.size());
  for (int64_t n = 0; n < taken; ++n) route[count++] = block_of(ranks[n]);
  std::sort(route, route + count);
  std::fill(route + count, route + a.topk, -1);
}

// Scores of blocks [0, count) for the summed queries in `scratch`.
static void score_all(const RouteArguments& a, int64_t b, int64_t count, RouteScratch& scratch) {
  scratch.scores.assign(count, 0.0f);
  for (size_t h = 0; h < scratch.head.size(); ++h) {
    const float* query = scratch.query.data() + h * a.width;
    const float* keys = a.unit_key + (b * a.key_heads + scratch.head[h]) * a.units * a.width;
    float four[4];
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
      dots<4>(query, keys + j * a.width, a.width, a.width, four);
      for (int n = 0; n < 4; ++n) scratch.scores[j + n] += four[n];
    }
    for (; j < count; ++j) {
      dots<1>(query, keys + j * a.width, a.width, a.width, four);
      scratch.scores[j] += four[0];
    }
  }
}

static void route_coarse(const RouteArguments& a, int64_t b, int64_t s, int64_t i, RouteScratch& scratch, int32_t* route) {
  const Position at(a, b, i);
  const int64_t count = std::min(at.complete, a.units);
  scratch.ranks.clear();
  // All of them fit: no score is needed, unless one could be NaN or -inf, which are never selected.
  sum_queries(a, b, s, i, scratch);
  score_all(a, b, count, scratch);
  for (int64_t j = 0; j < count; ++j) {
    if (at.is_forced(a, j)) continue;
    if (const uint64_t rank = rank_of(scratch.scores[j], j)) scratch.ranks.push_back(rank);
  }
  write_route(a, at, scratch.ranks, route);
}

static void route_fine(const RouteArguments& a, int64_t b, int64_t s, int64_t i, RouteScratch& scratch, int32_t* route) {
  const Position at(a, b, i);
  const int64_t list = s * a.candidate_heads / a.selection_heads;
  const int32_t* given = a.candidates + ((b * a.candidate_heads + list) * a.length + i) * a.candidates_kept;
  const int64_t limit = std::min(at.complete, a.units);
  scratch.blocks.clear();
  for (int64_t n = 0; n < a.candidates_kept; ++n)
    if (given[n] >= 0 && given[n] < limit && !at.is_forced(a, given[n])) scratch.blocks.push_back(given[n]);
  std::sort(scratch.blocks.begin(), scratch.blocks.end());
  scratch.blocks.erase(std::unique(scratch.blocks.begin(), scratch.blocks.end()), scratch.blocks.end());
  sum_queries(a, b, s, i, scratch);
  scratch.ranks.clear();
  for (const int32_t block : scratch.blocks) {
    float score = 0.0f, part;
    for (size_t h = 0; h < scratch.head.size(); ++h) {
      const float* key = a.unit_key + ((b * a.key_heads + scratch.head[h]) * a.units + block) * a.width;
      dots<1>(scratch.query.data() + h * a.width, key, 0, a.width, &part);
      score += part;
    }
    if (const uint64_t rank = rank_of(score, block)) scratch.ranks.push_back(rank);
  }
  write_route(a, at, scratch.ranks, route);
}

static void route(const RouteArguments& a, const Parallel& parallel) {
  constexpr int64_t kTokens = 16;  // positions per unit of work
  const int64_t pieces = (a.length + kTokens - 1) / kTokens;
  parallel.each(a.batch * a.selection_heads * pieces, [&](size_t unit) {
    thread_local RouteScratch scratch;
    const int64_t b = unit / (a.selection_heads * pieces), s = unit / pieces % a.selection_heads;
    const int64_t first = unit % pieces * kTokens, last = std::min(first + kTokens, a.length);
    for (int64_t i = first; i < last; ++i) {
      int32_t* route = a.routes + ((b * a.selection_heads + s) * a.length + i) * a.topk;
      if (i >= a.new_len[b]) {
        std::fill(route, route + a.topk, -1);
      } else if (a.candidates) {
        route_fine(a, b, s, i, scratch, route);
      } else {
        route_coarse(a, b, s, i, scratch, route);
      }
    }
  });
}
