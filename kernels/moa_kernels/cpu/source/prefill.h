// Attention of many queries at once: blocks of rows against tiles of packed keys, with a running softmax.
#pragma once
#include "layer.h"
#include "products.h"

namespace moa {

// Positions that a block of rows reads: [sink_from, sink_until), then [begin, end). A column of the block is a place in
// this row of positions.
struct Reach {
  int64_t sink_from, sink_until, begin, end;

  Reach(const Spans& s, int64_t sliding, int64_t lowest, int64_t first, int64_t last) {
    end = last + 1;
    begin = most(oldest_key(s, sliding, first), lowest);
    sink_from = most(first - sliding + 1, lowest);
    sink_until = least(s.sink, end);
    if (sink_until > sink_from && begin <= sink_until) begin = least(begin, sink_from);
    if (sink_until <= sink_from || begin <= sink_from) sink_from = sink_until = 0;
  }
  int64_t count() const { return sink_until - sink_from + end - begin; }
  int64_t position(int64_t column) const {
    const int64_t sunk = sink_until - sink_from;
    return column < sunk ? sink_from + column : begin + column - sunk;
  }
  int64_t column(int64_t position) const {
    return position < sink_until ? position - sink_from : position - begin + sink_until - sink_from;
  }
};

// What the rows of a strip attend among a tile's columns: from low to high, and of the sink.
struct Strip {
  int ranges[2][2];  // columns that some row attends, in whole steps; the first one is the sink's, or empty
  bool masked;       // whether some row doesn't attend all of them
  int32_t low[MOST_ROWS], high[MOST_ROWS], sink_low[MOST_ROWS], sink_high[MOST_ROWS];

  Strip(const Reach& reach, const Spans& s, int64_t sliding, int64_t lowest, int64_t tile, int count, int64_t position,
        int rows, int most_rows, int step) {
    int from = count, until = 0, sink_from = count, sink_until = 0;
    auto starts = [&](int64_t position) { return (int)clamp(reach.column(position) - tile, 0, count); };
    auto ends = [&](int64_t position) { return (int)clamp(reach.column(position) + 1 - tile, 0, count); };
    for (int r = 0; r < most_rows; r++) {
      low[r] = high[r] = sink_low[r] = sink_high[r] = 0;
      if (r >= rows) continue;
      const int64_t i = position + r, oldest = most(oldest_key(s, sliding, i), lowest);
      low[r] = starts(oldest), high[r] = ends(i);
      if (low[r] < high[r]) from = low[r] < from ? low[r] : from, until = high[r] > until ? high[r] : until;
      const int64_t hidden = most(i - sliding + 1, lowest), sunk = least(s.sink, i + 1);
      if (hidden < sunk) sink_low[r] = starts(hidden), sink_high[r] = ends(sunk - 1);
      if (sink_low[r] < sink_high[r]) {
        sink_from = sink_low[r] < sink_from ? sink_low[r] : sink_from;
        sink_until = sink_high[r] > sink_until ? sink_high[r] : sink_until;
      }
    }
    auto whole = [&](int a, int b, int* range) {
      range[0] = a < b ? a / step * step : 0, range[1] = a < b ? (b + step - 1) / step * step : 0;
    };
    whole(sink_from, sink_until, ranges[0]);
    whole(from, until, ranges[1]);
    if (ranges[0][1] && ranges[1][1] && ranges[1][0] <= ranges[0][1]) {  // they touch: one range
      ranges[1][0] = ranges[0][0] < ranges[1][0] ? ranges[0][0] : ranges[1][0];
      ranges[1][1] = ranges[0][1] > ranges[1][1] ? ranges[0][1] : ranges[1][1];
      ranges[0][0] = ranges[0][1] = 0;
    }
    masked = false;
    for (int r = 0; r < rows; r++)
      for (auto& range : ranges)
        masked |= range[0] < range[1] && !(low[r] <= range[0] && high[r] >= range[1]) &&
                  !(sink_low[r] <= range[0] && sink_high[r] >= range[1]);
  }
  bool empty() const { return ranges[0][1] == 0 && ranges[1][1] == 0; }
};

// Scores of a strip -> weights, in place or as pairs, and the factors by which the sums so far shrink.
template <class P, bool MASK>
INLINE void soften(float* scores, typename P::Unit* weights, const Strip& s, float* tops, F* totals, float* factors,
                   float scale, float softcap) {
  constexpr int MR = P::ROWS, LANES = (MR + L - 1) / L * L;
  const float unit = (softcap > 0 ? 1.f : scale) * LOG2_E;  // tops are in powers of 2
  float before[LANES] = {}, now[LANES] = {};
  for (int r = 0; r < MR; r++) {
    float* row = scores + r * TILE_KEYS;
    F highest = splat(MASKED);
    for (auto& range : s.ranges)
      for (int c = range[0]; c < range[1]; c += L) {
        F x = load<F>(row + c);
        if (softcap > 0) x = splat(softcap) * tanh(x * splat(scale / softcap));
        if (MASK) {
          const I column = iota() + splat_int(c);
          I seen = (column >= splat_int(s.low[r])) & (column < splat_int(s.high[r]));
          seen |= (column >= splat_int(s.sink_low[r])) & (column < splat_int(s.sink_high[r]));
          x = select(seen, x, splat(MASKED));
        }
        if (MASK || softcap > 0) store(row + c, x);
        highest = max(highest, x);
      }
    const float peak = top(highest) * unit;
    now[r] = peak > tops[r] ? peak : tops[r];
    before[r] = tops[r];
    tops[r] = now[r];
  }
  for (int r = 0; r < LANES; r += L) store(factors + r, exp2<false>(load<F>(before + r) - load<F>(now + r)));
  for (int r = 0; r < MR; r++) {
    float* row = scores + r * TILE_KEYS;
    F total = totals[r] * factors[r];
    const F minus = splat(now[r]);
    for (auto& range : s.ranges)
      for (int c = range[0]; c < range[1]; c += L) {
        const F p = exp2<P::PER == 2>(load<F>(row + c) * splat(unit) - minus);
        total += p;
        if constexpr (P::PER == 2)
          store(weights + r * (TILE_KEYS / 2) + c / 2, narrow_bf16(p));
        else
          store(row + c, p);
      }
    totals[r] = total;
  }
}

// Memory of one block of rows.
template <class P, class T>
struct Block {
  typedef typename P::Unit Unit;
  int64_t width, panels;  // dim in whole steps, and in whole panels
  Unit *queries, *packed_keys, *packed_values, *weights;
  float *sums, *tops, *scores;
  F* totals;
  T *zeros, *room;

  // Returns the bytes that it takes.
  size_t arrange(char* base, int64_t dim, int64_t rows) {
    Parts parts{base};
    width = round_up(dim, P::STEP), panels = round_up(dim, PANEL);
    queries = parts.template take<Unit>(rows * width / P::PER);
    sums = parts.take<float>(rows * panels);
    totals = parts.take<F>(rows);
    tops = parts.take<float>(rows);
    packed_keys = parts.template take<Unit>(TILE_KEYS * width / P::PER);
    packed_values = parts.template take<Unit>(TILE_KEYS / P::PER * panels);
    scores = parts.take<float>(P::ROWS * TILE_KEYS);
    weights = P::PER == 2 ? parts.template take<Unit>(P::ROWS * TILE_KEYS / 2) : (Unit*)scores;
    zeros = parts.template take<T>(width);
    room = parts.template take<T>(dim == width ? 0 : 2 * TILE_KEYS * width);
    return parts.used;
  }
};

// Queries `first` to `last` among the real new tokens of a sample, for the heads of one KV head.
template <class T>
void attend_block(const Call& a, int64_t b, int64_t kv, int64_t first, int64_t last, int64_t rows) {
  typedef typename ProductOf<T>::Kind P;
  constexpr int MR = P::ROWS;
  const int64_t group = a.heads / a.kv_heads, dim = a.dim, here = last - first, all_rows = group * rows;
  Block<P, T> m;
  m.arrange(workspace(m.arrange(nullptr, dim, all_rows)), dim, all_rows);
  const int64_t units = m.width / P::PER;
  const int64_t past = a.lens ? a.lens[b] : 0, lowest = a.rings ? 0 : past;
  const Spans& spans = a.spans[kv];
  const int32_t* columns = a.columns ? a.columns + b * a.new_keys : nullptr;
  auto column_of = [&](int64_t token) { return columns ? columns[token] : token; };

  for (int64_t g = 0; g < group; g++)
    for (int64_t r = 0; r < rows; r++) {
      auto* to = m.queries + (g * rows + r) * units;
      if (r < here)
        pack_row<P>(row_of<T>(a.query, b, kv * group + g, column_of(first + r) - (a.new_keys - a.queries)), dim,
                    m.width, to);
      else
        __builtin_memset(to, 0, units * sizeof *to);
    }
  __builtin_memset(m.sums, 0, all_rows * m.panels * sizeof(float));
  __builtin_memset(m.totals, 0, all_rows * sizeof(F));
  __builtin_memset(m.zeros, 0, m.width * sizeof(T));
  for (int64_t i = 0; i < all_rows; i++) m.tops[i] = NOTHING;

  const Reach reach(spans, a.sliding, lowest, past + first, past + last - 1);
  for (int64_t tile = 0; tile < reach.count(); tile += TILE_KEYS) {
    const int count = (int)least(TILE_KEYS, reach.count() - tile), padded = (int)round_up(count, P::STEP);
    const T *key_rows[TILE_KEYS], *value_rows[TILE_KEYS];
    for (int c = 0; c < count; c++) {
      const int64_t position = reach.position(tile + c);
      if (position < past) {
        const int64_t slot = slot_of(a.rings[kv], position);
        key_rows[c] = (const T*)a.keys + b * a.keys_batch + slot * a.keys_slot;
        value_rows[c] = (const T*)a.values + b * a.values_batch + slot * a.values_slot;
      } else {
        key_rows[c] = row_of<T>(a.key, b, kv, column_of(position - past));
        value_rows[c] = row_of<T>(a.value, b, kv, column_of(position - past));
      }
    }
    if (m.width != dim) {
      widen_rows(key_rows, count, dim, m.width, m.room);
      widen_rows(value_rows, count, dim, m.width, m.room + TILE_KEYS * m.width);
    }
    for (int c = count; c < padded; c++) key_rows[c] = value_rows[c] = m.zeros;
    pack_transposed<P>(key_rows, padded, (int)m.width, m.packed_keys);
    pack_straight<P>(value_rows, padded, (int)m.width, m.packed_values);

    for (int64_t r = 0; r < here; r += MR) {
      const Strip strip(reach, spans, a.sliding, lowest, tile, count, past + first + r, (int)least(MR, here - r), MR,
                        P::STEP);
      if (strip.empty()) continue;
      for (int64_t g = 0; g < group; g++) {
        const int64_t row = g * rows + r;
        for (auto& range : strip.ranges)
          multiply_columns<P>(m.queries + row * units, units, m.packed_keys, units, range[0], range[1], m.scores,
                              TILE_KEYS);
        float factors[MOST_ROWS + L];
        if (strip.masked)
          soften<P, true>(m.scores, m.weights, strip, m.tops + row, m.totals + row, factors, a.scale, a.softcap);
        else
          soften<P, false>(m.scores, m.weights, strip, m.tops + row, m.totals + row, factors, a.scale, a.softcap);
        for (auto& range : strip.ranges) {
          if (range[0] == range[1]) continue;
          for (int64_t d = 0; d < m.width; d += PANEL)
            micro_kernel<P, true>((int)least(m.width - d, PANEL) / L, m.weights + range[0] / P::PER,
                                  TILE_KEYS / P::PER,
                                  m.packed_values + d * (TILE_KEYS / P::PER) + range[0] / P::PER * PANEL,
                                  (range[1] - range[0]) / P::PER, m.sums + row * m.panels + d, m.panels, factors);
          for (int i = 0; i < MR; i++) factors[i] = 1;
        }
      }
    }
  }

  for (int64_t g = 0; g < group; g++)
    for (int64_t r = 0; r < here; r++) {
      const int64_t row = g * rows + r, head = kv * group + g;
      const int64_t token = column_of(first + r) - (a.new_keys - a.queries);
      float total = sum(m.totals[row]), top = m.tops[row];
      if (a.sink_logits) {
        const float logit = a.sink_logits[head] * LOG2_E, peak = logit > top ? logit : top;
        const float shrink = __builtin_exp2f(top - peak);
        total = total * shrink + __builtin_exp2f(logit - peak), top = peak;
        for (int64_t d = 0; d < m.width; d += L)
          store(m.sums + row * m.panels + d, load<F>(m.sums + row * m.panels + d) * shrink);
      }
      const F factor = splat(total > 0 ? 1 / total : 0);
      T* to = (T*)row_of<T>(a.out, b, head, token);
      for (int64_t d = 0; d < dim; d += L)
        store_part(to + d, load<F>(m.sums + row * m.panels + d) * factor, dim - d);
      if (a.lse)
        a.lse[(b * a.heads + head) * a.queries + token] =
            total > 0 ? (top + __builtin_log2f(total)) * LN_2 : -__builtin_inff();
    }
}

// Rows of a block: about 288 with the group's heads, so that a tile of keys is packed for enough of them.
INLINE int64_t rows_per_block(int64_t group, int strip) { return round_up(clamp(288 / group, 24, 192), strip); }

// Output and log-sum-exp of padding: 0, and what no key at all leaves.
template <class T>
void clear(const Call& a) {
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t head = 0; head < a.heads; head++)
      for (int64_t t = 0; t < a.queries; t++) {
        __builtin_memset((T*)row_of<T>(a.out, b, head, t), 0, a.dim * sizeof(T));
        if (a.lse)
          a.lse[(b * a.heads + head) * a.queries + t] = a.sink_logits ? a.sink_logits[head] : -__builtin_inff();
      }
}

template <class T>
void prefill(const Call& a) {
  typedef typename ProductOf<T>::Kind P;
  const int64_t rows = rows_per_block(a.heads / a.kv_heads, P::ROWS), blocks = (a.queries + rows - 1) / rows;
  if (a.columns) clear<T>(a);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads) if (a.threads > 1)
  for (int64_t item = 0; item < blocks * a.batch * a.kv_heads; item++) {
    // The last rows attend most: they go first.
    const int64_t block = blocks - 1 - item / (a.batch * a.kv_heads), kv = item % a.kv_heads;
    const int64_t b = item / a.kv_heads % a.batch, real = a.counts ? a.counts[b] : a.new_keys;
    int64_t skipped = a.new_keys - a.queries;  // new keys whose queries aren't asked for
    if (a.columns) {
      const int32_t* columns = a.columns + b * a.new_keys;
      int64_t before = 0;
      while (before < real && columns[before] < skipped) before++;
      skipped = before;
    }
    const int64_t first = skipped + block * rows, last = least(first + rows, real);
    if (first >= last) continue;
#if defined(MOA_TILES)
    if constexpr (P::TILES) tiles_configure();
#endif
    attend_block<T>(a, b, kv, first, last, rows);
#if defined(MOA_TILES)
    if constexpr (P::TILES) tiles_release();  // oneDNN wants its own, and idle tiles cost power
#endif
  }
}

}  // namespace moa
