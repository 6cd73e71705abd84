// SelectBlocks, CoarseRoute and FineRoute. Included once per instruction set.

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
  int64_t own, scorable, visible;  // own block; blocks that may be scored; blocks with a visible token
  int64_t partial = -1;            // the block that is kept because only its first tokens are visible

  Position(const RouteArguments& a, int64_t b, int64_t i) {
    const int64_t position = a.past_len[b] + i;
    const int64_t horizon = a.causal ? position + 1 : a.past_len[b] + a.new_len[b];
    own = position / a.block_size;
    scorable = horizon / a.block_size;
    visible = (horizon + a.block_size - 1) / a.block_size;
    if (a.partial_block == PartialBlock::kAlwaysKept && scorable < visible) partial = scorable;
    if (a.partial_block == PartialBlock::kScored) scorable = visible;
  }

  bool is_local(const RouteArguments& a, int64_t block) const { return block <= own && block > own - a.local_blocks; }

  bool is_forced(const RouteArguments& a, int64_t block) const {
    return is_local(a, block) || block < std::min(a.init_blocks, visible) || block == partial;
  }

  // The forced blocks, most important first, at most topk of them.
  int64_t forced(const RouteArguments& a, int32_t* out) const {
    int64_t count = 0;
    if (partial >= 0 && !is_local(a, partial)) out[count++] = static_cast<int32_t>(partial);
    for (int64_t j = own; j >= 0 && j > own - a.local_blocks && count < a.topk; --j) out[count++] = static_cast<int32_t>(j);
    for (int64_t j = 0; j < std::min(a.init_blocks, visible) && count < a.topk; ++j)
      if (!is_local(a, j) && j != partial) out[count++] = static_cast<int32_t>(j);
    return count;
  }
};

struct RouteScratch {
  std::vector<float> query;   // queries summed by the key head that they read
  std::vector<int64_t> head;  // those key heads
  std::vector<float> scores;
  std::vector<uint64_t> ranks;
  std::vector<int32_t> blocks;

  static RouteScratch& of_this_thread() {
    thread_local RouteScratch scratch;
    return scratch;
  }
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

// Keep the `room` best of `ranks`, in any order.
static void keep_highest(std::vector<uint64_t>& ranks, int64_t room) {
  if (room >= static_cast<int64_t>(ranks.size())) return;
  std::nth_element(ranks.begin(), ranks.begin() + room, ranks.end(), std::greater<uint64_t>());
  ranks.resize(room);
}

// Write the forced blocks that begin the route and the ranked ones in ascending order, -1 behind.
static void write_route(const RouteArguments& a, const std::vector<uint64_t>& ranks, int64_t forced, int32_t* route) {
  for (const uint64_t rank : ranks) route[forced++] = block_of(rank);
  std::sort(route, route + forced);
  std::fill(route + forced, route + a.topk, -1);
}

// The best of a stream of scores. Most of a long one lies below the least that is kept, which one comparison shows.
struct Best {
  std::vector<uint64_t>& ranks;
  int64_t room;
  float least = -INFINITY;  // a score must be above it to be kept

  Best(std::vector<uint64_t>& ranks, int64_t room) : ranks(ranks), room(room) { ranks.clear(); }

  // Blocks [first, last), which come after all earlier ones: of equal scores the earlier block stays.
  void add(const float* scores, int64_t first, int64_t last) {
    if (room == 0) return;
    int64_t j = first;
    for (; j + kLanes <= last; j += kLanes)
      if (any(load(scores + j) > splat(least))) offer(scores, j, j + kLanes);
    offer(scores, j, last);
  }

 private:
  static bool any(Ints mask) {
    int32_t hit = 0;
    for (int lane = 0; lane < kLanes; ++lane) hit |= mask[lane];
    return hit != 0;
  }

  void offer(const float* scores, int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      if (!(scores[j] > least)) continue;  // NaN too
      ranks.push_back(rank_of(scores[j], j));
      if (static_cast<int64_t>(ranks.size()) < 2 * room + kLanes) continue;
      keep_highest(ranks, room);
      const int64_t last_kept = block_of(*std::min_element(ranks.begin(), ranks.end()));
      least = std::min(scores[last_kept], 3.402823466e38f);  // +inf ranks as the largest finite number
    }
  }
};

// Adds to scores [count] those of `blocks` (null: of first, first + 1, ...) for the summed queries in `scratch`.
static void score_blocks(const RouteArguments& a, int64_t b, const RouteScratch& scratch, const int32_t* blocks, int64_t first,
                         int64_t count, float* scores) {
  for (size_t h = 0; h < scratch.head.size(); ++h) {
    const float* keys = a.unit_key + (b * a.key_heads + scratch.head[h]) * a.units * a.width;
    for (int64_t j = 0; j < count; j += kLanes) {
      const int64_t some = std::min<int64_t>(kLanes, count - j);
      const float* key[kLanes];
      float part[kLanes];
      for (int64_t n = 0; n < some; ++n) key[n] = keys + (blocks ? blocks[j + n] : first + j + n) * a.width;
      dots(scratch.query.data() + h * a.width, key, some, a.width, part);
      for (int64_t n = 0; n < some; ++n) scores[j + n] += part[n];
    }
  }
}

// From the scores of every block that may be chosen to the route.
static void select_blocks(const RouteArguments& a, const Position& at, const float* scores, RouteScratch& scratch, int32_t* route) {
  const int64_t forced = at.forced(a, route), limit = std::min(at.scorable, a.units), init = std::min(a.init_blocks, limit);
  Best best(scratch.ranks, std::min(a.topk - forced, a.scored_topk));
  // Between the initial blocks and the local ones, and behind the own one. A partial block that is kept is not among them.
  best.add(scores, init, std::min(limit, std::max(init, at.own - a.local_blocks + 1)));
  best.add(scores, std::max(init, at.own + 1), limit);
  keep_highest(scratch.ranks, best.room);
  write_route(a, scratch.ranks, forced, route);
}

static void route_coarse(const RouteArguments& a, int64_t b, int64_t s, int64_t i, RouteScratch& scratch, int32_t* route) {
  const Position at(a, b, i);
  const int64_t count = std::min(at.scorable, a.units);
  sum_queries(a, b, s, i, scratch);
  scratch.scores.assign(count, 0.0f);
  score_blocks(a, b, scratch, nullptr, 0, count, scratch.scores.data());
  select_blocks(a, at, scratch.scores.data(), scratch, route);
}

static void route_fine(const RouteArguments& a, int64_t b, int64_t s, int64_t i, RouteScratch& scratch, int32_t* route) {
  const Position at(a, b, i);
  const int64_t list = s * a.candidate_heads / a.selection_heads;
  const int32_t* given = a.candidates + ((b * a.candidate_heads + list) * a.length + i) * a.candidates_kept;
  const int64_t limit = std::min(at.scorable, a.units);
  std::vector<int32_t>& blocks = scratch.blocks;
  blocks.clear();
  bool ascending = true;  // CoarseRoute writes them so
  for (int64_t n = 0; n < a.candidates_kept; ++n) {
    if (given[n] < 0 || given[n] >= limit || at.is_forced(a, given[n])) continue;
    ascending = ascending && (blocks.empty() || blocks.back() < given[n]);
    blocks.push_back(given[n]);
  }
  if (!ascending) {
    std::sort(blocks.begin(), blocks.end());
    blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
  }
  sum_queries(a, b, s, i, scratch);
  scratch.scores.assign(blocks.size(), 0.0f);
  score_blocks(a, b, scratch, blocks.data(), 0, blocks.size(), scratch.scores.data());
  scratch.ranks.clear();
  for (size_t n = 0; n < blocks.size(); ++n)
    if (const uint64_t rank = rank_of(scratch.scores[n], blocks[n])) scratch.ranks.push_back(rank);
  const int64_t forced = at.forced(a, route);
  keep_highest(scratch.ranks, a.topk - forced);
  write_route(a, scratch.ranks, forced, route);
}

// One position's place in the batch.
struct RouteRow {
  int64_t b, s, i;
  int32_t* route;

  RouteRow(const RouteArguments& a, int64_t row)
      : b(row / (a.selection_heads * a.length)), s(row / a.length % a.selection_heads), i(row % a.length),
        route(a.routes + row * a.topk) {}
};

// A few positions against many blocks: the blocks are shared out among the threads, then every position selects.
static void route_few(const RouteArguments& a, int64_t rows, const Parallel& parallel) {
  constexpr int64_t kBlocks = 256;  // blocks per unit of work
  const int64_t pieces = (a.units + kBlocks - 1) / kBlocks;
  std::vector<float> scores(rows * a.units);
  parallel.each(rows * pieces, [&](size_t unit) {
    RouteScratch& scratch = RouteScratch::of_this_thread();
    const RouteRow row(a, unit / pieces);
    if (row.i >= a.new_len[row.b]) return;
    const int64_t first = unit % pieces * kBlocks;
    const int64_t last = std::min({first + kBlocks, Position(a, row.b, row.i).scorable, a.units});
    sum_queries(a, row.b, row.s, row.i, scratch);
    if (first < last)
      score_blocks(a, row.b, scratch, nullptr, first, last - first, scores.data() + unit / pieces * a.units + first);
  });
  for (int64_t n = 0; n < rows; ++n) {
    const RouteRow row(a, n);
    if (row.i >= a.new_len[row.b])
      std::fill(row.route, row.route + a.topk, -1);
    else
      select_blocks(a, Position(a, row.b, row.i), scores.data() + n * a.units, RouteScratch::of_this_thread(), row.route);
  }
}

static void route(const RouteArguments& a, const Parallel& parallel) {
  constexpr int64_t kRows = 16;  // positions per unit of work
  const int64_t rows = a.batch * a.selection_heads * a.length;
  if (!a.scores && !a.candidates && rows <= kRows) return route_few(a, rows, parallel);
  parallel.each((rows + kRows - 1) / kRows, [&](size_t unit) {
    RouteScratch& scratch = RouteScratch::of_this_thread();
    const int64_t last = std::min<int64_t>((unit + 1) * kRows, rows);
    for (int64_t n = unit * kRows; n < last; ++n) {
      const RouteRow row(a, n);
      if (row.i >= a.new_len[row.b])
        std::fill(row.route, row.route + a.topk, -1);
      else if (a.scores)
        select_blocks(a, Position(a, row.b, row.i), a.scores + n * a.units, scratch, row.route);
      else if (a.candidates)
        route_fine(a, row.b, row.s, row.i, scratch, row.route);
      else
        route_coarse(a, row.b, row.s, row.i, scratch, row.route);
    }
  });
}
