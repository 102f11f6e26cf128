// Rings of codes, as moa_kernels.codes.storage has them: encoding, decoding, and attention of the newest tokens.
#pragma once
#include "decode.h"
#include "products.h"

namespace moa {

struct Side {  // of one KV head's keys, or values
  int64_t bits, offset, row, scale_offset;
};

struct Coded {  // as moa_kernels.cpu.coded fills it
  Call call;    // `keys` and `values` are the sinks [batch, kv_heads * sink, dim]; `lens` count stored tokens
  uint8_t *key_codes, *value_codes;      // [batch, bytes]
  uint16_t *key_scales, *value_scales;   // [batch, slots], float16
  int64_t key_bytes, value_bytes, key_slots, value_slots;  // strides of a sample
  const Side* sides;                     // [kv_heads, 2]: keys', values'
  const double *key_into, *key_mean, *frequencies, *value_into;  // [kv_heads, dim, dim], [kv_heads, dim], [dim / 2]
  const int64_t* order;                  // [dim]: the channels of rotary embedding's pairs, first ones first
  const float *key_back, *mean, *value_back;  // by halves: [kv_heads, dim, dim], [kv_heads, dim]; and plain
  const float *near, *far;               // cosines, then sines, [2, BLOCK or blocks, half]: within a block, and of blocks
  const int64_t* digits;                 // [kv_heads]: of keys' codes, see moa_kernels.codes.levels.Digits
  const double* digit_sizes;             // [kv_heads, 2]: weights and norms
  int64_t blocks;
  const int64_t* positions;              // [batch, new_keys] of the new tokens; null: from `lens` on
};

constexpr int64_t BLOCK = CHUNK;  // positions whose rotary embeddings differ by an entry of `near`
constexpr int64_t LONGEST = 512;  // numbers in a vector, at most, filled up

INLINE int64_t half_of(int64_t dim) { return round_up(dim / 2, 16); }
INLINE double middle(int64_t bits) { return ((1 << bits) - 1) / 2.; }
INLINE float from_half(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu, sign = (uint32_t)(h & 0x8000u) << 16;
  const float value = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  return __builtin_bit_cast(float, (magnitude >= 0x7c00u ? magnitude << 13 | 0x7f800000u
                                                         : __builtin_bit_cast(uint32_t, value)) | sign);
}
INLINE uint16_t to_half(float x) {
  const F v = splat(x);
  return narrow_fp16(v)[0];
}

// ---- Packing: codes in planes.

INLINE void pack_plane(const uint8_t* codes, int64_t width, int plane, int below, uint8_t* to) {
  const int64_t bytes = width * plane / 8;
  __builtin_memset(to, 0, bytes);
  for (int place = 0; place < 8 / plane; place++)
    for (int64_t b = 0; b < bytes; b++)
      to[b] |= (uint8_t)(((codes[place * bytes + b] >> below) & ((1 << plane) - 1)) << (plane * place));
}
INLINE void pack_codes(const uint8_t* codes, int64_t width, int64_t bits, uint8_t* to) {
  if (bits == 8) __builtin_memcpy(to, codes, width);
  if (bits == 4) pack_plane(codes, width, 4, 0, to);
  if (bits == 2) pack_plane(codes, width, 2, 0, to);
  if (bits == 3) pack_plane(codes, width, 2, 1, to), pack_plane(codes, width, 1, 0, to + width / 4);
}

typedef uint8_t B __attribute__((vector_size(L), may_alias));

template <int PLANE>
INLINE void add_plane(const uint8_t* plane, int64_t width, int shift, uint8_t* codes) {
  const int64_t bytes = width * PLANE / 8;
  constexpr uint64_t MASK = 0x0101010101010101u * ((1 << PLANE) - 1);
  for (int place = 0; place < 8 / PLANE; place++) {
    int64_t b = 0;
    for (; b + 8 <= bytes; b += 8) {
      const uint64_t part = (load<uint64_t>(plane + b) >> (PLANE * place)) & MASK;
      uint8_t* to = codes + place * bytes + b;
      store(to, load<uint64_t>(to) | part << shift);
    }
    for (; b < bytes; b++)
      codes[place * bytes + b] |= (uint8_t)(((plane[b] >> (PLANE * place)) & ((1 << PLANE) - 1)) << shift);
  }
}

// A row's levels, filled up with zeros to `full`, a multiple of L.
template <int BITS>
INLINE void unpack_row(const uint8_t* row, int64_t width, int64_t full, float* to) {
  const F centre = splat((float)middle(BITS));
  auto wide = [&](B bytes) { return __builtin_convertvector(bytes, U); };
  auto level = [&](U code) { return __builtin_convertvector((I)code, F) - centre; };
  if constexpr (BITS == 4) {
    const int64_t part = width / 2;
    if (part % L == 0) {
      for (int64_t d = 0; d < part; d += L) {
        const U codes = wide(load<B>(row + d));
        store(to + d, level(codes & 15u)), store(to + part + d, level(codes >> 4));
      }
      return;
    }
  }
  if constexpr (BITS == 2) {
    const int64_t part = width / 4;
    if (part % L == 0) {
      for (int64_t d = 0; d < part; d += L) {
        const U codes = wide(load<B>(row + d));
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) store(to + p * part + d, level(codes >> (2 * p) & 3u));
      }
      return;
    }
  }
  alignas(64) uint8_t codes[LONGEST];
  if constexpr (BITS == 8) {
    __builtin_memcpy(codes, row, width);
  } else {
    __builtin_memset(codes, 0, width);
    if constexpr (BITS == 4) add_plane<4>(row, width, 0, codes);
    if constexpr (BITS == 2) add_plane<2>(row, width, 0, codes);
    if constexpr (BITS == 3) add_plane<2>(row, width, 1, codes), add_plane<1>(row + width / 4, width, 0, codes);
  }
  for (int64_t d = 0; d < full; d += L) {
    F x = level(wide(load<B>(codes + d)));
    if (d + L > width) x = select(iota() + splat_int((int)d) < splat_int((int)width), x, F{});
    store(to + d, x);
  }
}
INLINE void unpack_row(int64_t bits, const uint8_t* row, int64_t width, int64_t full, float* to) {
  switch (bits) {
    case 8: return unpack_row<8>(row, width, full, to);
    case 4: return unpack_row<4>(row, width, full, to);
    case 3: return unpack_row<3>(row, width, full, to);
    default: return unpack_row<2>(row, width, full, to);
  }
}

// ---- Encoding, in doubles: the bytes are those of moa_kernels.codes but where a number lies within their rounding of
// the border of two levels, to both of which it is equally near.

template <class T>
INLINE void widen_row(const T* from, int64_t dim, double* to) {
  float row[LONGEST];
  load_row(from, dim, row);
  for (int64_t d = 0; d < dim; d++) to[d] = row[d];
}

INLINE void multiply_row(const double* x, const double* matrix, int64_t dim, double* y) {
  for (int64_t c = 0; c < dim; c++) y[c] = 0;
  for (int64_t i = 0; i < dim; i++) {
    const double factor = x[i];
    const double* row = matrix + i * dim;
    for (int64_t c = 0; c < dim; c++) y[c] += factor * row[c];
  }
}

// Codes of a vector, and its scale. Of `count` numbers the vector holds both digits: high ones, then low ones.
INLINE uint16_t quantise(const double* y, int64_t dim, int64_t bits, uint8_t* codes, int64_t count, double weight,
                         double norm) {
  constexpr double STEPS[] = {0, 0, 0.99568669, 0.58601943, 0.33520063};
  const auto times = [=](int64_t d) { return d < count ? weight : d < 2 * count ? 0. : 1.; };  // in sums
  double peak = 0, squares = 0;
  for (int64_t d = 0; d < dim; d++) {
    const double size = __builtin_fabs(y[d]);
    peak = size > peak || size != size ? size : peak;
    squares += y[d] * y[d] * times(d);
  }
  const double step = bits == 8 ? (squares != squares ? squares : peak * (2. / 255)) : __builtin_sqrt(squares / norm) * STEPS[bits];
  double along = 0;
  for (int64_t d = 0; d < dim; d++) {
    const int64_t wide = d < 2 * count ? 2 * bits : bits;
    const double low = -(1 << (wide - 1)), high = (1 << (wide - 1)) - 1;
    double level = step > 0 ? __builtin_floor(y[d] / step) : 0;
    level = (level < low ? low : level > high ? high : level) + 0.5;
    along += y[d] * level * times(d);
    const int64_t code = level == level ? (int64_t)(level + middle(wide)) : 0;
    codes[d] = (uint8_t)(d < count ? code >> bits : d < 2 * count ? code & ((1 << bits) - 1) : code);
  }
  const uint16_t scale = to_half((float)(step > 0 ? squares / along : step));
  return (scale & 0x7c00) == 0x7c00 ? 0x7e00 : scale;
}

// The turns of one position.
struct Angles {
  double cosine[LONGEST / 2], sine[LONGEST / 2];
  Angles(const Coded& a, int64_t position) {
    for (int64_t i = 0; i < a.call.dim / 2; i++) {
      const double angle = (double)position * a.frequencies[i];
      cosine[i] = __builtin_cos(angle), sine[i] = __builtin_sin(angle);
    }
  }
};

template <class T>
INLINE uint16_t encode(const Coded& a, const T* x, int64_t kv, bool keys, const Angles& angles, uint8_t* codes) {
  const int64_t dim = a.call.dim, half = dim / 2, bits = a.sides[2 * kv + !keys].bits;
  double row[LONGEST], y[LONGEST];
  widen_row(x, dim, y);
  if (bits == 8) return quantise(y, dim, bits, codes, 0, 1, dim);
  if (keys) {
    for (int64_t i = 0; i < half; i++) {
      const int64_t one = a.order[i], two = a.order[half + i];
      row[one] = y[one] * angles.cosine[i] + y[two] * angles.sine[i];
      row[two] = y[two] * angles.cosine[i] - y[one] * angles.sine[i];
    }
    for (int64_t d = 0; d < dim; d++) row[d] -= a.key_mean[kv * dim + d];
  } else {
    __builtin_memcpy(row, y, dim * sizeof(double));
  }
  multiply_row(row, (keys ? a.key_into : a.value_into) + kv * dim * dim, dim, y);
  if (!keys) return quantise(y, dim, bits, codes, 0, 1, dim);
  return quantise(y, dim, bits, codes, a.digits[kv], a.digit_sizes[2 * kv], a.digit_sizes[2 * kv + 1]);
}

// What levels give back, in T.
template <class T>
INLINE void give_back(const Coded& a, const float* levels, float scale, int64_t kv, bool keys, const Angles& angles,
                      T* to) {
  const int64_t dim = a.call.dim, half = dim / 2, bits = a.sides[2 * kv + !keys].bits;
  float x[LONGEST] = {}, found[LONGEST];
  if (bits == 8) {
    for (int64_t d = 0; d < dim; d++) found[d] = levels[d] * scale;
  } else {
    const float* back = (keys ? a.key_back : a.value_back) + kv * dim * dim;
    for (int64_t i = 0; i < dim; i++)
      for (int64_t c = 0; c < dim; c++) x[c] += levels[i] * scale * back[i * dim + c];
    if (!keys) __builtin_memcpy(found, x, dim * sizeof(float));
    if (keys)
      for (int64_t i = 0; i < half; i++) {
        const float one = x[i] + a.mean[kv * dim + i], two = x[half + i] + a.mean[kv * dim + half + i];
        const float cosine = (float)angles.cosine[i], sine = (float)angles.sine[i];
        found[a.order[i]] = one * cosine - two * sine, found[a.order[half + i]] = two * cosine + one * sine;
      }
  }
  for (int64_t d = 0; d < dim; d += L) store_part(to + d, load<F>(found + d), dim - d);
}

INLINE int64_t sink_of(const Coded& a) { return a.call.rings[0].sink; }
INLINE int64_t ring_of(const Coded& a, int64_t kv) { return most(a.call.rings[kv].capacity - sink_of(a), 0); }

// Stores the new tokens over the oldest ones.
template <class T>
void append_coded(const Coded& a) {
  const Call& c = a.call;
  const int64_t sink = sink_of(a), items = c.batch * c.new_keys;
#pragma omp parallel for num_threads(c.threads) if (c.threads > 1 && items > 16)
  for (int64_t item = 0; item < items; item++) {
    const int64_t b = item / c.new_keys, t = item % c.new_keys, past = c.lens[b];
    const int64_t count = c.counts ? least(c.counts[b], c.new_keys) : c.new_keys, position = past + t;
    if (t >= count) continue;
    bool wanted = position < sink;
    for (int64_t kv = 0; kv < c.kv_heads; kv++) wanted |= ring_of(a, kv) > 0 && position >= past + count - ring_of(a, kv);
    if (!wanted) continue;
    const Angles angles(a, position);
    for (int64_t kv = 0; kv < c.kv_heads; kv++)
      for (int side = 0; side < 2; side++) {
        const T* x = row_of<T>(side ? c.value : c.key, b, kv, t);
        if (position < sink) {
          const int64_t row = kv * sink + position;
          T* sinks = side ? (T*)c.values + b * c.values_batch + row * c.values_slot
                          : (T*)c.keys + b * c.keys_batch + row * c.keys_slot;
          __builtin_memcpy(sinks, x, c.dim * sizeof(T));
          continue;
        }
        const int64_t ring = ring_of(a, kv);
        if (ring == 0 || position < past + count - ring) continue;
        const Side& s = a.sides[2 * kv + side];
        const int64_t slot = (position - sink) % ring;
        uint8_t* to = (side ? a.value_codes + b * a.value_bytes : a.key_codes + b * a.key_bytes) + s.offset + slot * s.row;
        if (s.bits == 16) {
          __builtin_memcpy(to, x, c.dim * sizeof(T));
          continue;
        }
        uint8_t codes[LONGEST];
        const uint16_t scale = encode(a, x, kv, !side, angles, codes);
        (side ? a.value_scales + b * a.value_slots : a.key_scales + b * a.key_slots)[s.scale_offset + slot] = scale;
        pack_codes(codes, c.dim, s.bits, to);
      }
  }
}

// What attention sees of the new tokens, to `out` (keys) and `query` (values): [batch, kv_heads, new_keys, dim].
template <class T>
void see_coded(const Coded& a) {
  const Call& c = a.call;
  const int64_t items = c.batch * c.new_keys, sink = sink_of(a);
#pragma omp parallel for num_threads(c.threads) if (c.threads > 1 && items > 16)
  for (int64_t item = 0; item < items; item++) {
    const int64_t b = item / c.new_keys, t = item % c.new_keys, position = a.positions[item];
    const Angles angles(a, position);
    for (int64_t kv = 0; kv < c.kv_heads; kv++)
      for (int side = 0; side < 2; side++) {
        const T* x = row_of<T>(side ? c.value : c.key, b, kv, t);
        T* to = (T*)row_of<T>(side ? c.query : c.out, b, kv, t);
        const int64_t bits = a.sides[2 * kv + side].bits;
        if (position < sink || bits == 16) {
          __builtin_memcpy(to, x, c.dim * sizeof(T));
          continue;
        }
        uint8_t codes[LONGEST];
        float levels[LONGEST];
        const float scale = from_half(encode(a, x, kv, !side, angles, codes));
        for (int64_t d = 0; d < c.dim; d++) levels[d] = codes[d] - (float)middle(bits);
        give_back(a, levels, scale, kv, !side, angles, to);
      }
  }
}

// What every slot holds, to `out` (keys) and `query` (values), [batch, 1, slots, dim]; zeros where there is nothing.
template <class T>
void coded_states(const Coded& a) {
  const Call& c = a.call;
  const int64_t sink = sink_of(a);
  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t kv = 0; kv < c.kv_heads; kv++) {
      const Ring& r = c.rings[kv];
      const int64_t ring = ring_of(a, kv), length = c.lens[b];
#pragma omp parallel for num_threads(c.threads) if (c.threads > 1)
      for (int64_t i = 0; i < r.capacity; i++) {
        const int64_t last = length - 1;
        int64_t position = i;
        if (i >= sink) {
          int64_t back = (last - i) % ring;
          position = last - (back < 0 ? back + ring : back);
        }
        const bool held = position <= last && (i < sink || position >= sink);
        const Angles angles(a, held ? position : 0);
        for (int side = 0; side < 2; side++) {
          T* to = (T*)row_of<T>(side ? c.query : c.out, b, 0, r.offset + i);
          if (!held) {
            __builtin_memset(to, 0, c.dim * sizeof(T));
            continue;
          }
          if (i < sink) {
            const int64_t row = kv * sink + i;
            __builtin_memcpy(to,
                             side ? (T*)c.values + b * c.values_batch + row * c.values_slot
                                  : (T*)c.keys + b * c.keys_batch + row * c.keys_slot,
                             c.dim * sizeof(T));
            continue;
          }
          const Side& s = a.sides[2 * kv + side];
          const uint8_t* row =
              (side ? a.value_codes + b * a.value_bytes : a.key_codes + b * a.key_bytes) + s.offset + (i - sink) * s.row;
          if (s.bits == 16) {
            __builtin_memcpy(to, row, c.dim * sizeof(T));
            continue;
          }
          const uint16_t scale =
              (side ? a.value_scales + b * a.value_slots : a.key_scales + b * a.key_slots)[s.scale_offset + i - sink];
          alignas(64) float levels[LONGEST];
          unpack_row(s.bits, row, c.dim, round_up(c.dim, L), levels);
          give_back(a, levels, from_half(scale), kv, !side, angles, to);
        }
      }
    }
}

// ---- Attention of the newest tokens.

template <class T>
struct CodedDecoding : Decoding<T> {
  typedef Floats P;  // bfloat16 would round the transform
  typedef typename P::Unit Unit;
  const Coded& codes;
  using Decoding<T>::a;
  using Decoding<T>::group;
  using Decoding<T>::width;
  const int64_t half, wide, deep;  // of a vector by halves: one, both in whole panels; and its numbers in whole steps

  explicit CodedDecoding(const Coded& c)
      : Decoding<T>(c.call), codes(c), half(half_of(c.call.dim)), wide(round_up(2 * half_of(c.call.dim), PANEL)),
        deep(round_up(c.call.dim, P::STEP)) {}

  // As `Decoding`, but a window that reaches into the sink ends the sink's part instead.
  void ranges(int64_t output, int64_t* sink, int64_t* window) const {
    Decoding<T>::ranges(output, sink, window);
    const int64_t until = least(sink_of(codes), window[1]);
    if (window[0] >= until) return;
    if (sink[0] == sink[1]) sink[0] = window[0];
    sink[1] = window[0] = until;
  }

  // back[kv] by halves -> panels [wide / PANEL][deep units][PANEL].
  void pack_back(int64_t kv, Unit* to) const {
    const int64_t dim = a.dim, units = deep;
    __builtin_memset(to, 0, wide * units * sizeof(Unit));
    for (int64_t i = 0; i < dim; i++)
      for (int64_t c = 0; c < dim; c++) {
        const int64_t column = c < dim / 2 ? c : half + c - dim / 2;
        const float x = codes.key_back[(kv * dim + i) * dim + c];
        to[(column / PANEL) * units * PANEL + i * PANEL + column % PANEL] = x;
      }
  }

  // Everything that an item works in.
  struct Room {
    float *q, *halved, *turned, *levels, *keys, *scores, *weights, *mean;
    T *narrow_q, *plain;
    Unit *rows, *back;
  };
  size_t arrange(char* base, Room* m) const {
    Parts parts{base};
    m->q = parts.take<float>(group * width);
    m->halved = parts.take<float>(group * 2 * half);
    m->turned = parts.take<float>(group * 2 * half);
    m->levels = parts.take<float>(CHUNK * round_up(a.dim, 16));
    m->keys = parts.take<float>((CHUNK + MOST_ROWS) * wide);
    m->scores = parts.take<float>(group * CHUNK);
    m->weights = parts.take<float>(group * CHUNK);
    m->mean = parts.take<float>(2 * half);
    m->narrow_q = parts.template take<T>(group * width);
    m->plain = parts.template take<T>(2 * CHUNK * width);
    m->rows = parts.template take<Unit>((CHUNK + MOST_ROWS) * deep);
    m->back = parts.template take<Unit>(wide * deep);
    return parts.used;
  }

  // A function of G heads at a time.
  template <class Run>
  void by_heads(Run run) const {
    for (int g = 0; g < group;) {
      const int left = (int)group - g;
      const int together = left == MOST_TOGETHER || group % MOST_TOGETHER == 0 ? MOST_TOGETHER : left < 3 ? left : 3;
      switch (together) {
        case 1: run.template operator()<1>(g); break;
        case 2: run.template operator()<2>(g); break;
        case 3: run.template operator()<3>(g); break;
        default: run.template operator()<4>(g);
      }
      g += together;
    }
  }

  // Scores of keys under a transform; all positions are of one block.
  void score_turned(const Room& m, int64_t position, const uint8_t* rows, const Side& s,
                    const uint16_t* scales, int count) const {
    const int64_t units = deep, dim = a.dim;
    for (int j = 0; j < count; j++) unpack_row(s.bits, rows + j * s.row, dim, deep, m.rows + j * units);
    float ones[MOST_ROWS];
    for (auto& one : ones) one = 1;
    for (int j = 0; j < count; j += P::ROWS)
      for (int64_t at = 0; at < wide; at += PANEL)
        micro_kernel<P, NR, false>(m.rows + j * units, units, m.back + at * units, units, m.keys + j * wide + at, wide,
                                   ones);
    const int64_t first = position % BLOCK;
    const float *cosines = codes.near + first * half, *sines = codes.near + (BLOCK + first) * half;
    by_heads([&]<int G>(int g0) {
      for (int j = 0; j < count; j += L) {
        F sums[G][L];
        for (int i = 0; i < L; i++) {
          const int at = j + i < count ? j + i : count - 1;
          const float *key = m.keys + at * wide, *cosine = cosines + at * half, *sine = sines + at * half;
          const F scale = splat(from_half(scales[at]));
#pragma GCC unroll 4
          for (int g = 0; g < G; g++) sums[g][i] = F{};
          for (int64_t d = 0; d < half; d += L) {
            const F one = load<F>(key + d) * scale + load<F>(m.mean + d);
            const F two = load<F>(key + half + d) * scale + load<F>(m.mean + half + d);
            const F c = load<F>(cosine + d), n = load<F>(sine + d);
            const F x = one * c - two * n, y = two * c + one * n;
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
              const float* q = m.turned + (g0 + g) * 2 * half + d;
              sums[g][i] += x * load<F>(q) + y * load<F>(q + half);
            }
          }
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) store(m.scores + (g0 + g) * CHUNK + j, row_sums(sums[g]));
      }
    });
  }

  // Queries as keys of a block see them: turned back by its first position.
  void turn_queries(const Room& m, int64_t block) const {
    const float *cosine = codes.far + block * half, *sine = codes.far + (codes.blocks + block) * half;
    for (int64_t g = 0; g < group; g++)
      for (int64_t d = 0; d < half; d += L) {
        const float* q = m.halved + g * 2 * half + d;
        const F one = load<F>(q), two = load<F>(q + half), c = load<F>(cosine + d), n = load<F>(sine + d);
        store(m.turned + g * 2 * half + d, one * c + two * n);
        store(m.turned + g * 2 * half + half + d, two * c - one * n);
      }
  }

  // Plain keys or values, filled up where they must be.
  const T* filled(const T* rows, int64_t stride, int count, T* room, int64_t* new_stride) const {
    *new_stride = stride;
    if (width == a.dim) return rows;
    for (int j = 0; j < count; j++) {
      __builtin_memcpy(room + j * width, rows + j * stride, a.dim * sizeof(T));
      __builtin_memset((void*)(room + j * width + a.dim), 0, (width - a.dim) * sizeof(T));
    }
    *new_stride = width;
    return room;
  }

  // Scores -> weights, and what the sums so far shrink to.
  void soften(const Room& m, float* tops, float* totals, float* sums, int count) const {
    const float unit = (a.softcap > 0 ? 1.f : a.scale) * LOG2_E;
    for (int64_t g = 0; g < group; g++) {
      float* row = m.scores + g * CHUNK;
      F highest = splat(MASKED);
      for (int c = 0; c < count; c += L) {
        F x = load<F>(row + c);
        if (a.softcap > 0) x = splat(a.softcap) * tanh(x * splat(a.scale / a.softcap)), store(row + c, x);
        highest = max(highest, x);  // lanes after the last key repeat it
      }
      const float peak = top(highest) * unit;
      if (peak > tops[g]) {
        const float shrink = __builtin_exp2f(tops[g] - peak);
        tops[g] = peak, totals[g] *= shrink;
        for (int64_t d = 0; d < width; d += L) store(sums + g * width + d, load<F>(sums + g * width + d) * shrink);
      }
      F total = F{};
      for (int c = 0; c < count; c += L) {
        F p = exp2<false>(load<F>(row + c) * splat(unit) - splat(tops[g]));
        if (c + L > count) p = select(iota() + splat_int(c) < splat_int(count), p, F{});
        store(row + c, p);
        total += p;
      }
      totals[g] += sum(total);
    }
  }

  void attend(const Item& item, float* part) const {
    const int64_t kv = this->kv_head(item.output), b = this->sample(item.output), dim = a.dim, sink = sink_of(codes);
    const int64_t ring = ring_of(codes, kv), full = round_up(dim, L);
    float *tops = part, *totals = part + group, *sums = part + 2 * group;
    for (int64_t g = 0; g < group; g++) tops[g] = NOTHING, totals[g] = 0;
    __builtin_memset(sums, 0, group * width * sizeof(float));
    Room m;
    arrange(workspace(arrange(nullptr, &m)), &m);
    const Side &keys = codes.sides[2 * kv], &values = codes.sides[2 * kv + 1];
    const bool turned = keys.bits < 8 && item.from >= sink;
    __builtin_memset(m.halved, 0, group * 2 * half * sizeof(float));
    for (int64_t g = 0; g < group; g++) {
      const T* row = row_of<T>(a.query, b, kv * group + g, this->token(item.output));
      load_row(row, dim, m.q + g * width);
      __builtin_memset((void*)(m.narrow_q + g * width), 0, width * sizeof(T));
      __builtin_memcpy(m.narrow_q + g * width, row, dim * sizeof(T));
      for (int64_t d = 0; turned && d < dim; d++)
        m.halved[g * 2 * half + (d < dim / 2 ? d : half + d - dim / 2)] = m.q[g * width + codes.order[d]];
    }
    if (turned) {
      pack_back(kv, m.back);
      __builtin_memset(m.mean, 0, 2 * half * sizeof(float));
      for (int64_t d = 0; d < dim; d++) m.mean[d < dim / 2 ? d : half + d - dim / 2] = codes.mean[kv * dim + d];
    }
    int64_t block = -1;
    for (int64_t at = item.from; at < item.until;) {
      const bool sunk = at < sink;
      const int64_t slot = sunk ? at : (at - sink) % ring;
      int64_t run = sunk ? sink - at : ring - slot;
      if (turned) run = least(run, BLOCK - at % BLOCK);
      const int count = (int)least(least(run, item.until - at), CHUNK);
      int64_t stride;
      // Scores.
      if (sunk || keys.bits == 16) {
        const T* rows = sunk ? (const T*)a.keys + b * a.keys_batch + (kv * sink + slot) * a.keys_slot
                             : (const T*)(codes.key_codes + b * codes.key_bytes + keys.offset + slot * keys.row);
        rows = filled(rows, sunk ? a.keys_slot : dim, count, m.plain, &stride);
        by_heads([&]<int G>(int g) {
          score_keys<T, G>(rows, stride, width, m.q + g * width, m.narrow_q + g * width, m.scores + g * CHUNK, count);
        });
      } else {
        const uint8_t* rows = codes.key_codes + b * codes.key_bytes + keys.offset + slot * keys.row;
        const uint16_t* scales = codes.key_scales + b * codes.key_slots + keys.scale_offset + slot;
        if (turned) {
          if (at / BLOCK != block) turn_queries(m, block = at / BLOCK);
          score_turned(m, at, rows, keys, scales, count);
        } else {
          for (int j = 0; j < count; j++) {
            float* to = m.levels + j * full;
            unpack_row<8>(rows + j * keys.row, dim, full, to);
            const F scale = splat(from_half(scales[j]));
            for (int64_t d = 0; d < full; d += L) store(to + d, load<F>(to + d) * scale);
          }
          by_heads([&]<int G>(int g) {
            score_keys<float, G>(m.levels, full, full, m.q + g * width, m.q + g * width, m.scores + g * CHUNK, count);
          });
        }
      }
      soften(m, tops, totals, sums, count);
      // Values.
      if (sunk || values.bits == 16) {
        const T* rows = sunk ? (const T*)a.values + b * a.values_batch + (kv * sink + slot) * a.values_slot
                             : (const T*)(codes.value_codes + b * codes.value_bytes + values.offset + slot * values.row);
        rows = filled(rows, sunk ? a.values_slot : dim, count, m.plain + CHUNK * width, &stride);
        by_heads([&]<int G>(int g) {
          add_values<T, G>(rows, stride, width, m.scores + g * CHUNK, sums + g * width, count);
        });
      } else {
        const uint8_t* rows = codes.value_codes + b * codes.value_bytes + values.offset + slot * values.row;
        const uint16_t* scales = codes.value_scales + b * codes.value_slots + values.scale_offset + slot;
        for (int j = 0; j < count; j++) {
          unpack_row(values.bits, rows + j * values.row, dim, full, m.levels + j * full);
          const float scale = from_half(scales[j]);
          for (int64_t g = 0; g < group; g++) m.weights[g * CHUNK + j] = m.scores[g * CHUNK + j] * scale;
        }
        by_heads([&]<int G>(int g) {
          add_values<float, G>(m.levels, full, full, m.weights + g * CHUNK, sums + g * width, count);
        });
      }
      at += count;
    }
  }

  // Joins the results of an output's items: those of the sink and of plain values, and those to be turned back.
  void merge(int64_t output, const Item* items, const float* parts, int64_t count) const {
    const int64_t kv = this->kv_head(output), b = this->sample(output), t = this->token(output);
    const int64_t size = this->part_size(), dim = a.dim;
    const bool turned = codes.sides[2 * kv + 1].bits < 8;
    for (int64_t g = 0; g < group; g++) {
      const int64_t head = kv * group + g;
      float peak = NOTHING, total = 0;
      for (int64_t i = 0; i < count; i++) peak = parts[i * size + g] > peak ? parts[i * size + g] : peak;
      if (a.sink_logits) {
        const float logit = a.sink_logits[head] * LOG2_E;
        peak = logit > peak ? logit : peak;
        total = __builtin_exp2f(logit - peak);
      }
      alignas(64) float plain[LONGEST] = {}, coded[LONGEST] = {};
      for (int64_t i = 0; i < count; i++) {
        const float shrink = __builtin_exp2f(parts[i * size + g] - peak);
        total += parts[i * size + group + g] * shrink;
        const float* sums = parts + i * size + 2 * group + g * width;
        float* to = turned && items[i].from >= sink_of(codes) ? coded : plain;
        for (int64_t d = 0; d < width; d += L) store(to + d, load<F>(to + d) + load<F>(sums + d) * splat(shrink));
      }
      if (turned)
        for (int64_t i = 0; i < dim; i++)
          for (int64_t d = 0; d < dim; d++) plain[d] += coded[i] * codes.value_back[(kv * dim + i) * dim + d];
      const F factor = splat(total > 0 ? 1 / total : 0);
      T* to = (T*)row_of<T>(a.out, b, head, t);
      for (int64_t d = 0; d < dim; d += L) store_part(to + d, load<F>(plain + d) * factor, dim - d);
      if (a.lse)
        a.lse[(b * a.heads + head) * a.queries + t] =
            total > 0 ? (peak + __builtin_log2f(total)) * LN_2 : -__builtin_inff();
    }
  }
};

}  // namespace moa
