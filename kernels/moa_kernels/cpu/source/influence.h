// What shorter windows would cost: statistics of every row of a layer's attention and its output's gradient.
//
// For a block of rows, two products give all scores and all gains g = dO . v; each row then needs one softmax and one
// walk over its keys, from the nearest window's end to the farthest's.
#pragma once
#include "layer.h"
#include "products.h"

namespace moa {

struct Influence {                     // as moa_kernels.cpu.influence fills it
  Strided query, grad;                 // [heads, rows, dim]; the batch's stride isn't used
  Strided key, value;                  // [kv_heads, rows, dim]
  const int32_t* windows;              // [windows], increasing: tokens, the query's own included and the sink excluded
  const float* sink_logits;            // [heads]; or null
  float* totals;                       // [statistics, kv_heads, buckets, windows]
  const float* origins;                // [heads, rows]: D of each row where it isn't this attention's own; or null
  float* row_gains;                    // [heads, rows]: where dO . o of each row goes; or null
  int64_t heads, kv_heads, rows, dim, sink, buckets, bucket_rows, window_count;
  float scale, softcap;                // softcap 0: none
  int32_t dtype, threads;
};

enum Statistic { SQUARED, SIGNED, ABSOLUTE, ELEMENTWISE, RECALL, STATISTICS };

constexpr float SMALLEST_COMPLEMENT = 1e-6f;  // of 1 - A: the first row has A = 1, giving 0 / 0

// Sums over the columns [from, until) of a row.
struct Sums {
  float mass = 0, gain = 0, effect = 0;
};
template <bool EFFECT>
INLINE Sums sums_of(const float* weights, const float* gains, int64_t from, int64_t until, float share, float row_gain) {
  F mass = F{}, gain = F{}, effect = F{};
  for (int64_t c = from / L * L; c < until; c += L) {
    F a = load<F>(weights + c) * share, g = load<F>(gains + c);
    if (c < from || c + L > until) {
      const I column = iota() + splat_int((int32_t)c);
      const I inside = (column >= splat_int((int32_t)from)) & (column < splat_int((int32_t)until));
      a = select(inside, a, F{}), g = select(inside, g, F{});
    }
    mass += a, gain += a * g;
    if (EFFECT) {
      const F x = a * (g - splat(row_gain)), size = max(x, F{} - x);
      effect += size / max(splat(1.f) - a, splat(SMALLEST_COMPLEMENT));
    }
  }
  return Sums{sum(mass), sum(gain), EFFECT ? sum(effect) : 0.f};
}

// Adds a row's statistics to `totals`, [statistics][windows]; `scores` become weights.
INLINE void add_row(const Influence& a, float* scores, const float* gains, int64_t i, float logit, bool has_logit,
                    const float* origins, float* row_gains, Sums* segments, double* totals) {
  const float unit = (a.softcap > 0 ? 1.f : a.scale) * LOG2_E;
  const int64_t count = i + 1, sunk = least(a.sink, count);
  F highest = splat(MASKED);
  for (int64_t c = 0; c < count; c += L) {
    F x = load<F>(scores + c);
    if (a.softcap > 0) x = splat(a.softcap) * tanh(x * splat(a.scale / a.softcap));
    x = c + L > count ? select(iota() + splat_int((int32_t)c) < splat_int((int32_t)count), x, splat(MASKED)) : x;
    store(scores + c, x);
    highest = max(highest, x);
  }
  const float peak = top(highest) * unit;
  F total = F{}, gain = F{};
  for (int64_t c = 0; c < count; c += L) {
    const F p = exp2<false>(load<F>(scores + c) * splat(unit) - splat(peak));
    F g = load<F>(gains + c);
    if (c + L > count) g = select(p > F{}, g, F{});
    store(scores + c, p);
    total += p, gain += p * g;
  }
  const float rest = has_logit ? __builtin_exp2f(logit * LOG2_E - peak) : 0.f;
  const float share = 1 / (sum(total) + rest), kept = rest * share, row_gain = sum(gain) * share;
  const float origin = origins ? origins[i] : row_gain;
  if (row_gains) row_gains[i] = row_gain;

  // Segment k lies between the starts of windows k - 1 and k; the last one is what no window keeps.
  int64_t until = count, reached = 0;
  for (; reached < a.window_count && a.windows[reached] <= i - a.sink; reached++) {
    const int64_t from = i + 1 - a.windows[reached];
    segments[reached] = sums_of<true>(scores, gains, from, until, share, row_gain);
    until = from;
  }
  const Sums sink = sums_of<false>(scores, gains, 0, sunk, share, row_gain);
  float beyond = reached ? sums_of<true>(scores, gains, sunk, until, share, row_gain).effect : 0.f;
  for (int64_t k = reached - 1; k >= 0; k--) {
    const float effect = segments[k].effect;
    segments[k].effect = beyond, beyond += effect;
  }
  float mass = sink.mass, near = sink.gain;
  double *squared = totals + SQUARED * a.window_count, *with_sign = totals + SIGNED * a.window_count,
         *absolute = totals + ABSOLUTE * a.window_count, *elementwise = totals + ELEMENTWISE * a.window_count,
         *recall = totals + RECALL * a.window_count;
  for (int64_t k = 0; k < reached; k++) {
    mass += segments[k].mass, near += segments[k].gain;
    const float held = mass + kept, delta = near / (held > 1.17549435e-38f ? held : 1.17549435e-38f) - origin;
    squared[k] += delta * delta, with_sign[k] += delta, absolute[k] += delta < 0 ? -delta : delta;
    elementwise[k] += segments[k].effect, recall[k] += mass;
  }
  const float delta = row_gain - origin;  // 0, but for other keys or values than those of the origins
  for (int64_t k = reached; k < a.window_count; k++) {  // such windows keep all
    recall[k] += 1 - kept;
    squared[k] += delta * delta, with_sign[k] += delta, absolute[k] += delta < 0 ? -delta : delta;
  }
}

// Keys or values of a KV head, packed as the right operand of a product with rows of their width.
template <class P, class T>
void pack_head(const Strided& states, int64_t kv, int64_t rows, int64_t dim, int64_t width, int threads,
               typename P::Unit* packed) {
  const int64_t panels = (rows + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t panel = 0; panel < panels; panel++) {
    const T* from[PANEL];
    const int count = (int)least(rows - panel * PANEL, PANEL);
    Parts parts{workspace((PANEL + 1) * round_up(width * sizeof(T), 64))};
    T *zeros = parts.take<T>(width), *room = parts.take<T>(PANEL * width);
    __builtin_memset(zeros, 0, width * sizeof(T));
    for (int c = 0; c < PANEL; c++) from[c] = c < count ? row_of<T>(states, 0, kv, panel * PANEL + c) : zeros;
    if (width != dim) widen_rows(from, count, dim, width, room);
    pack_transposed<P>(from, PANEL, (int)width, packed + panel * PANEL * (width / P::PER));
  }
}

template <class T>
void influence(const Influence& a) {
  typedef typename ProductOf<T>::Kind P;
  typedef typename P::Unit Unit;
  constexpr int MR = P::ROWS;
  static_assert(PANEL % P::STEP == 0);
  const int64_t group = a.heads / a.kv_heads, width = round_up(a.dim, P::STEP), units = width / P::PER;
  const int64_t columns = round_up(a.rows, PANEL), statistic = a.kv_heads * a.buckets * a.window_count;
  Unit* packed = (Unit*)aligned_alloc(64, round_up(2 * columns * units * sizeof(Unit), 64));
  Unit *keys = packed, *values = packed + columns * units;
  for (int64_t kv = 0; kv < a.kv_heads; kv++) {
    pack_head<P, T>(a.key, kv, a.rows, a.dim, width, a.threads, keys);
    pack_head<P, T>(a.value, kv, a.rows, a.dim, width, a.threads, values);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads) if (a.threads > 1)
    for (int64_t item = 0; item < a.buckets; item++) {
      const int64_t bucket = a.buckets - 1 - item;  // the last rows attend most: they go first
      const int64_t first = bucket * a.bucket_rows, last = least(first + a.bucket_rows, a.rows);
      Unit *queries = nullptr, *grads = nullptr;
      float *scores = nullptr, *gains = nullptr;
      Sums* segments = nullptr;
      double* totals = nullptr;
      auto arrange = [&](char* base) {
        Parts parts{base};
        queries = parts.take<Unit>(MR * units), grads = parts.take<Unit>(MR * units);
        scores = parts.take<float>(MR * columns), gains = parts.take<float>(MR * columns);
        segments = parts.take<Sums>(a.window_count);
        totals = parts.take<double>(STATISTICS * a.window_count);
        return parts.used;
      };
      arrange(workspace(arrange(nullptr)));
      __builtin_memset(totals, 0, STATISTICS * a.window_count * sizeof(double));
#if defined(MOA_TILES)
      if constexpr (P::TILES) tiles_configure();
#endif
      for (int64_t g = 0; g < group; g++)
        for (int64_t row = first; row < last; row += MR) {
          const int64_t head = kv * group + g, here = least(MR, last - row), until = round_up(row + here, P::STEP);
          __builtin_memset(queries, 0, MR * units * sizeof(Unit));
          __builtin_memset(grads, 0, MR * units * sizeof(Unit));
          for (int64_t r = 0; r < here; r++) {
            pack_row<P>(row_of<T>(a.query, 0, head, row + r), a.dim, width, queries + r * units);
            pack_row<P>(row_of<T>(a.grad, 0, head, row + r), a.dim, width, grads + r * units);
          }
          multiply_columns<P>(queries, units, keys, units, 0, (int)until, scores, columns);
          multiply_columns<P>(grads, units, values, units, 0, (int)until, gains, columns);
          for (int64_t r = 0; r < here; r++)
            add_row(a, scores + r * columns, gains + r * columns, row + r, a.sink_logits ? a.sink_logits[head] : 0.f,
                    a.sink_logits != nullptr, a.origins ? a.origins + head * a.rows : nullptr,
                    a.row_gains ? a.row_gains + head * a.rows : nullptr, segments, totals);
        }
#if defined(MOA_TILES)
      if constexpr (P::TILES) tiles_release();
#endif
      for (int64_t s = 0; s < STATISTICS; s++)
        for (int64_t k = 0; k < a.window_count; k++)
          a.totals[s * statistic + (kv * a.buckets + bucket) * a.window_count + k] =
              (float)totals[s * a.window_count + k];
    }
  }
  free(packed);
}

}  // namespace moa
