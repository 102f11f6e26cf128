// Attention of a few newest tokens over the rings, which hold them already: keys are read where they lie.
#pragma once
#include "layer.h"

namespace moa {

constexpr int CHUNK = 128;       // keys whose scores are held at once
constexpr int MOST_TOGETHER = 4;  // query heads that share one reading of a key

// Scores of `count` keys, `stride` numbers apart, and G queries; up to a multiple of L they repeat the last key.
template <class T, int G>
INLINE void score_keys(const T* keys, int64_t stride, int64_t width, const float* q, const T* narrow_q, float* scores,
                       int count) {
#if defined(__AVX512BF16__) && defined(MOA_AVX512)
  if constexpr (__is_same(T, bf16)) {
    if (width % 32 == 0) {
      for (int j = 0; j < count; j += L) {
        F sums[G][L];
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) {
          const T* k = keys + (j + i < count ? j + i : count - 1) * stride;
#pragma GCC unroll 4
          for (int g = 0; g < G; g++) sums[g][i] = F{};
          for (int64_t d = 0; d < width; d += 32) {
            const __m512bh row = (__m512bh)load<U>(k + d);
#pragma GCC unroll 4
            for (int g = 0; g < G; g++)
              sums[g][i] =
                  (F)_mm512_dpbf16_ps((__m512)sums[g][i], row, (__m512bh)load<U>(narrow_q + g * width + d));
          }
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) store(scores + g * CHUNK + j, row_sums(sums[g]));
      }
      return;
    }
  }
#endif
  for (int j = 0; j < count; j += L) {
    F sums[G][L];
    for (int i = 0; i < L; i++) {
      const T* k = keys + (j + i < count ? j + i : count - 1) * stride;
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) sums[g][i] = F{};
      for (int64_t d = 0; d < width; d += L) {
        const F row = load_wide(k + d);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) sums[g][i] += row * load<F>(q + g * width + d);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) store(scores + g * CHUNK + j, row_sums(sums[g]));
  }
}

// sums[G][width] += weights[G][count] values[count][width]
template <class T, int G>
INLINE void add_values(const T* values, int64_t stride, int64_t width, const float* weights, float* sums, int count) {
  for (int64_t d = 0; d < width; d += PANEL) {
    const int vectors = (int)least(width - d, PANEL) / L;
    F part[G][NR];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++)
#pragma GCC unroll 4
      for (int v = 0; v < NR; v++) part[g][v] = v < vectors ? load<F>(sums + g * width + d + v * L) : F{};
    if (vectors == NR)
      for (int j = 0; j < count; j++) {
#pragma GCC unroll 4
        for (int v = 0; v < NR; v++) {
          const F row = load_wide(values + j * stride + d + v * L);
#pragma GCC unroll 4
          for (int g = 0; g < G; g++) part[g][v] += row * weights[g * CHUNK + j];
        }
      }
    else
      for (int j = 0; j < count; j++)
        for (int v = 0; v < vectors; v++) {
          const F row = load_wide(values + j * stride + d + v * L);
#pragma GCC unroll 4
          for (int g = 0; g < G; g++) part[g][v] += row * weights[g * CHUNK + j];
        }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++)
#pragma GCC unroll 4
      for (int v = 0; v < NR; v++)
        if (v < vectors) store(sums + g * width + d + v * L, part[g][v]);
  }
}

// The queries of one token that share a KV head, and their running softmax.
template <class T>
struct Running {
  float *tops, *totals, *sums;  // [group], [group], [group, width]
  float* q;                     // [group, width]
  T* narrow_q;                  // as q
};

// At most CHUNK keys and values of `width` numbers.
template <class T>
struct Keys {
  const T *keys, *values;
  int64_t key_stride, value_stride;
  int count;
};

template <class T, int G>
void attend_keys(const Call& a, const Keys<T>& near, int64_t width, const Running<T>& s, int g0) {
  const int count = near.count;
  const float unit = (a.softcap > 0 ? 1.f : a.scale) * LOG2_E;
  alignas(64) float scores[G * CHUNK];
  score_keys<T, G>(near.keys, near.key_stride, width, s.q + g0 * width, s.narrow_q + g0 * width, scores, count);
  for (int g = 0; g < G; g++) {
    float *row = scores + g * CHUNK, *sums = s.sums + (g0 + g) * width;
    F highest = splat(MASKED);
    for (int c = 0; c < count; c += L) {
      F x = load<F>(row + c);
      if (a.softcap > 0) x = splat(a.softcap) * tanh(x * splat(a.scale / a.softcap)), store(row + c, x);
      highest = max(highest, x);  // lanes after the last key repeat it
    }
    const float peak = top(highest) * unit;
    if (peak > s.tops[g0 + g]) {
      const float shrink = __builtin_exp2f(s.tops[g0 + g] - peak);
      s.tops[g0 + g] = peak;
      s.totals[g0 + g] *= shrink;
      for (int64_t d = 0; d < width; d += L) store(sums + d, load<F>(sums + d) * shrink);
    }
    F total = F{};
    for (int c = 0; c < count; c += L) {
      F p = exp2<false>(load<F>(row + c) * splat(unit) - splat(s.tops[g0 + g]));
      if (c + L > count) p = select(iota() + splat_int(c) < splat_int(count), p, F{});
      store(row + c, p);
      total += p;
    }
    s.totals[g0 + g] += sum(total);
  }
  add_values<T, G>(near.values, near.value_stride, width, scores, s.sums + g0 * width, count);
}
template <class T>
void attend_keys(const Call& a, const Keys<T>& near, int64_t width, const Running<T>& s) {
  const int group = (int)(a.heads / a.kv_heads);
  for (int g = 0; g < group;) {
    const int together = group - g == MOST_TOGETHER || group % MOST_TOGETHER == 0 ? MOST_TOGETHER
                         : group - g < 3                                          ? group - g
                                                                                  : 3;
    switch (together) {
      case 1: attend_keys<T, 1>(a, near, width, s, g); break;
      case 2: attend_keys<T, 2>(a, near, width, s, g); break;
      case 3: attend_keys<T, 3>(a, near, width, s, g); break;
      default: attend_keys<T, 4>(a, near, width, s, g);
    }
    g += together;
  }
}

// Which part of a query token's keys an item takes; `output` counts samples, KV heads and tokens.
struct Item {
  int64_t output, from, until;
};

// Everything about one query token and KV head: what it attends, and where its item's results are.
template <class T>
struct Decoding {
  const Call& a;
  const int64_t group, width;

  explicit Decoding(const Call& call) : a(call), group(call.heads / call.kv_heads), width(round_up(call.dim, L)) {}

  int64_t outputs() const { return a.batch * a.kv_heads * a.queries; }
  int64_t token(int64_t output) const { return output % a.queries; }
  int64_t kv_head(int64_t output) const { return output / a.queries % a.kv_heads; }
  int64_t sample(int64_t output) const { return output / a.queries / a.kv_heads; }
  int64_t part_size() const { return group * (width + 2); }  // floats of an item's results

  // Sink tokens, then positions of the window, both as far as the rings hold them.
  void ranges(int64_t output, int64_t* sink, int64_t* window) const {
    const Spans& s = a.spans[kv_head(output)];
    const Ring& r = a.rings[kv_head(output)];
    const int64_t length = a.lens[sample(output)], i = length - a.queries + token(output);
    window[0] = most(oldest_key(s, a.sliding, i), most(length - most(r.capacity - r.sink, 0), 0)), window[1] = i + 1;
    if (length <= r.capacity) window[0] = most(oldest_key(s, a.sliding, i), 0);  // nothing is overwritten yet
    sink[0] = most(i - a.sliding + 1, 0), sink[1] = least(least(s.sink, r.capacity), least(i + 1, window[0]));
    if (window[0] > window[1]) window[0] = window[1];
    if (sink[0] > sink[1]) sink[0] = sink[1];
  }

  void attend(const Item& item, float* part) const {
    const int64_t kv = kv_head(item.output), b = sample(item.output), dim = a.dim;
    Running<T> s{part, part + group, part + 2 * group, nullptr, nullptr};
    for (int64_t g = 0; g < group; g++) s.tops[g] = NOTHING, s.totals[g] = 0;
    __builtin_memset(s.sums, 0, group * width * sizeof(float));
    const bool in_place = width == dim;
    T* room = nullptr;
    auto arrange = [&](char* base) {
      Parts parts{base};
      s.q = parts.take<float>(group * width);
      s.narrow_q = parts.template take<T>(group * width);
      room = parts.template take<T>(in_place ? 0 : 2 * CHUNK * width);
      return parts.used;
    };
    arrange(workspace(arrange(nullptr)));
    for (int64_t g = 0; g < group; g++) {
      const T* row = row_of<T>(a.query, b, kv * group + g, token(item.output));
      load_row(row, dim, s.q + g * width);
      __builtin_memset(s.narrow_q + g * width, 0, width * sizeof(T));
      __builtin_memcpy(s.narrow_q + g * width, row, dim * sizeof(T));
    }
    if (!in_place) __builtin_memset(room, 0, 2 * CHUNK * width * sizeof(T));
    const Ring& r = a.rings[kv];
    for (int64_t at = item.from; at < item.until;) {
      const int64_t slot = slot_of(r, at), run = at < r.sink ? r.sink - at : r.offset + r.capacity - slot;
      const int count = (int)least(least(run, item.until - at), CHUNK);
      Keys<T> near{(const T*)a.keys + b * a.keys_batch + slot * a.keys_slot,
                   (const T*)a.values + b * a.values_batch + slot * a.values_slot, a.keys_slot, a.values_slot, count};
      if (!in_place) {  // widths that aren't a multiple of L are filled up with zeros
        for (int j = 0; j < count; j++) {
          __builtin_memcpy(room + j * width, near.keys + j * a.keys_slot, dim * sizeof(T));
          __builtin_memcpy(room + (CHUNK + j) * width, near.values + j * a.values_slot, dim * sizeof(T));
        }
        near = Keys<T>{room, room + CHUNK * width, width, width, count};
      }
      attend_keys(a, near, width, s);
      at += count;
    }
  }

  // Joins the results `parts` of an output's items.
  void merge(int64_t output, const Item*, const float* parts, int64_t count) const {
    const int64_t kv = kv_head(output), b = sample(output), t = token(output), size = part_size();
    for (int64_t g = 0; g < group; g++) {
      const int64_t head = kv * group + g;
      float peak = NOTHING, total = 0;
      for (int64_t i = 0; i < count; i++) peak = parts[i * size + g] > peak ? parts[i * size + g] : peak;
      if (a.sink_logits) {
        const float logit = a.sink_logits[head] * LOG2_E;
        peak = logit > peak ? logit : peak;
        total = __builtin_exp2f(logit - peak);
      }
      for (int64_t i = 0; i < count; i++)
        total += parts[i * size + group + g] * __builtin_exp2f(parts[i * size + g] - peak);
      const float factor = total > 0 ? 1 / total : 0;
      T* to = (T*)row_of<T>(a.out, b, head, t);
      for (int64_t d = 0; d < a.dim; d += L) {
        F x = F{};
        for (int64_t i = 0; i < count; i++)
          x += load<F>(parts + i * size + 2 * group + g * width + d) * __builtin_exp2f(parts[i * size + g] - peak);
        store_part(to + d, x * factor, a.dim - d);
      }
      if (a.lse)
        a.lse[(b * a.heads + head) * a.queries + t] =
            total > 0 ? (peak + __builtin_log2f(total)) * LN_2 : -__builtin_inff();
    }
  }
};

// A buffer of the calling thread that only grows.
template <class V>
INLINE V* kept(int64_t count) {
  static thread_local V* memory = nullptr;
  static thread_local int64_t size = 0;
  if (size < count) {
    free(memory);
    size = 2 * count;
    memory = (V*)aligned_alloc(64, round_up(size * sizeof(V), 64));
  }
  return memory;
}

constexpr int64_t FEWEST_KEYS = 256;  // of an item: fewer aren't worth a thread

template <class Work>
void decode_by(const Work& work) {
  const Call& a = work.a;
  const int64_t outputs = work.outputs();
  int64_t all = 0, sink[2], window[2];
  for (int64_t o = 0; o < outputs; o++) {
    work.ranges(o, sink, window);
    all += sink[1] - sink[0] + window[1] - window[0];
  }
  const int threads = all < 2 * FEWEST_KEYS ? 1 : a.threads;
  const int64_t share = threads > 1 ? most(all / (threads * 4), FEWEST_KEYS) : INT64_MAX / 2;
  const int64_t most_items = 2 * outputs + all / share + 1;
  Item* items = kept<Item>(most_items);
  int64_t* starts = kept<int64_t>(outputs + 1);  // first item of each output
  float* parts = kept<float>(most_items * work.part_size());
  int64_t count = 0;
  for (int64_t o = 0; o < outputs; o++) {
    starts[o] = count;
    work.ranges(o, sink, window);
    if (sink[0] < sink[1]) items[count++] = Item{o, sink[0], sink[1]};
    for (int64_t from = window[0]; from < window[1]; from += share)
      items[count++] = Item{o, from, least(window[1], from + share)};
  }
  starts[outputs] = count;
  const int64_t size = work.part_size();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; i++) work.attend(items[i], parts + i * size);
#pragma omp for
    for (int64_t o = 0; o < outputs; o++)
      work.merge(o, items + starts[o], parts + starts[o] * size, starts[o + 1] - starts[o]);
  }
}
template <class T>
void decode(const Call& a) {
  decode_by(Decoding<T>(a));
}

}  // namespace moa
