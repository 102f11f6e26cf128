// One layer's call, and where its heads' keys are.
#pragma once
#include <stdlib.h>

#include "numbers.h"

namespace moa {

// Rules of a KV head, as moa_kernels.spans.HeadSpans has them: the query at position i attends key j iff j <= i,
// j > i - sliding, and j < sink or j > i - window, with
// window = max(min_span, alpha + (beta_256 * (i + 1) >> 8)) - sink.
struct Spans {
  int32_t sink, min_span, alpha, beta_256;
};
// Where a KV head's keys are, as moa_kernels.rings.RingLayout has it: position p lies in its slot p if p < sink, else in
// slot sink + (p - sink) % (capacity - sink).
struct Ring {
  int32_t offset, sink, capacity;
};
struct Strided {
  char* data;
  int64_t batch, head, token;  // strides in elements; numbers of a token lie side by side
};

struct Call {            // as moa_kernels.cpu.calls fills it
  Strided query;         // [batch, heads, queries, dim], the newest tokens
  Strided key, value;    // [batch, kv_heads, new_keys, dim], new_keys >= queries
  Strided out;           // [batch, heads, queries, dim]
  float* lse;            // [batch, heads, queries], natural log-sum-exp of the logits; or null
  char *keys, *values;   // [batch, slots, dim], the rings; or null: there are no keys before the new ones
  int64_t keys_batch, keys_slot, values_batch, values_slot;  // strides in elements
  int64_t* lens;         // [batch] positions before the new keys, in the rings or nowhere; null: 0
  const int64_t* counts;   // [batch] real tokens among the new ones; null: all
  const int32_t* columns;  // [batch, new_keys] columns of the real ones in order; null: 0, 1, ...
  const Ring* rings;       // [kv_heads]; or null
  const Spans* spans;      // [kv_heads]
  const float* sink_logits;  // [heads]; or null
  int64_t batch, heads, kv_heads, queries, new_keys, dim, value_dim, sliding;  // value_dim: where storing; else dim
  float scale, softcap;    // softcap 0: none
  int32_t dtype, item_bytes, threads;  // dtype 0: float, 1: bfloat16, 2: float16; any type is stored by its bytes
};

constexpr float NOTHING = -1e20f;  // a running maximum before the first key
constexpr float MASKED = -1e30f;   // a score that counts for nothing even then

// Where the window of a query starts, the sink aside.
INLINE int64_t oldest_key(const Spans& s, int64_t sliding, int64_t position) {
  const int64_t window = most(s.min_span, s.alpha + ((s.beta_256 * (position + 1)) >> 8)) - s.sink;
  return position + 1 - least(window, sliding);
}
INLINE int64_t slot_of(const Ring& r, int64_t position) {
  if (position < r.sink) return r.offset + position;
  return r.offset + r.sink + (position - r.sink) % most(r.capacity - r.sink, 1);
}
template <class T>
INLINE const T* row_of(const Strided& s, int64_t batch, int64_t head, int64_t token) {
  return (const T*)s.data + batch * s.batch + head * s.head + token * s.token;
}

// A thread's memory, which stays for its next call.
INLINE char* workspace(size_t bytes) {
  static thread_local char* memory = nullptr;
  static thread_local size_t size = 0;
  if (size < bytes) {
    free(memory);
    size = (bytes + 4095) / 4096 * 4096;
    memory = (char*)aligned_alloc(64, size);
  }
  return memory;
}
// Hands out parts of a workspace; of none, it measures what they need.
struct Parts {
  char* base;
  size_t used = 0;
  template <class V>
  V* take(int64_t count) {
    V* part = (V*)(base + used);
    used += round_up(count * (int64_t)sizeof(V), 64);
    return part;
  }
};

}  // namespace moa
