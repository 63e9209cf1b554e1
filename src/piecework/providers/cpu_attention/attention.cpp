// Attention over a paged key/value cache on the CPU: one call for a mixed batch of decode and prefill. What it means is
// written in piecework/ops/attention.py; what it is called with, in call.h.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include <omp.h>

#include "decode.h"
#include "prefill.h"

namespace piecework {

enum Result : int32_t { kDone = 0, kUnsupported = 1, kBadSlot = 2, kBadLength = 3, kBadBlock = 4, kNoMemory = 5 };

struct Work {
  int64_t seq, kv_head;  // kv_head -1: decode, of all heads
  int64_t begin, count;  // rows of a prefill, keys of a decode
  int64_t part;          // where the partial result goes; -1 where there is only one
};

struct Split {
  int64_t seq, part, num_parts;
};

Result check(const Call& call) {
  if (call.starts[0] != 0 || call.starts[call.num_seqs] != call.num_tokens) return kBadLength;
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    const int64_t num_new = call.starts[s + 1] - call.starts[s], len = call.lens[s];
    if (num_new < 0 || len < num_new || len < 1 || len > call.table_width * call.block_size) return kBadLength;
    if (call.key_bias != nullptr && len > call.bias_width) return kBadLength;
    const int64_t* table = call.tables + s * call.table_width;
    for (int64_t b = 0; b * call.block_size < len; ++b)
      if (table[b] < 0 || table[b] >= call.num_blocks) return kBadBlock;
  }
  if (call.key != nullptr)
    for (int64_t t = 0; t < call.num_tokens; ++t)
      if (call.slots[t] < 0 || call.slots[t] >= call.num_blocks * call.block_size) return kBadSlot;
  return kDone;
}

template <class T>
void write(const Call& call, int64_t token) {
  T* to = (T*)call.cache + call.slots[token] * call.row();
  const T *key = (const T*)call.key + token * call.key_token, *value = (const T*)call.value + token * call.value_token;
  for (int64_t h = 0; h < call.num_kv_heads; ++h, to += call.head_dim) {
    std::memcpy(to, key + h * call.key_head, call.head_dim * sizeof(T));
    std::memcpy(to + call.values(), value + h * call.value_head, call.head_dim * sizeof(T));
  }
}

// Prefills, the longest rows first.
void plan_prefill(const Call& call, std::vector<Work>& work) {
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    if (call.num_new(s) < 2) continue;
    for (int64_t end = call.num_new(s) * call.groups(); end > 0;) {
      const int64_t begin = (end - 1) / kTileRows * kTileRows;
      for (int64_t h = 0; h < call.num_kv_heads; ++h) work.push_back({s, h, begin, end - begin, -1});
      end = begin;
    }
  }
}

// Decodes; long ones in parts, so that there are a few parts for every thread. Returns the number of parts.
int64_t plan_decode(const Call& call, std::vector<Work>& work, std::vector<Split>& splits) {
  constexpr int64_t kLeast = 64;
  int64_t num_keys = 0, num_parts = 0;
  for (int64_t s = 0; s < call.num_seqs; ++s)
    if (call.num_new(s) == 1) num_keys += call.lens[s] - call.first_key(call.lens[s] - 1);
  const int64_t share = num_keys / (4 * call.num_threads) / kLeast * kLeast + kLeast;
  const int64_t most = call.num_threads > 1 ? share : num_keys;
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    if (call.num_new(s) != 1) continue;
    const int64_t begin = call.first_key(call.lens[s] - 1), num = call.lens[s] - begin, parts = (num + most - 1) / most;
    if (parts > 1) splits.push_back({s, num_parts, parts});
    for (int64_t p = 0; p < parts; ++p)
      work.push_back({s, -1, begin + p * most, std::min(most, num - p * most), parts > 1 ? num_parts++ : -1});
  }
  return num_parts;
}

template <class T>
Result attend(const Call& call) {
  std::vector<Work> work;
  std::vector<Split> splits;
  plan_prefill(call, work);
  const size_t num_prefills = work.size();
  const int64_t num_parts = plan_decode(call, work, splits), size = Partial::size(call);
  // All threads or one: OpenMP's runtimes end and start threads when their number changes.
  const bool alone = call.num_threads < 2 || work.size() < 2;
  float* parts = nullptr;  // and one for each thread
  if (work.size() > num_prefills) {
    parts = (float*)std::aligned_alloc(64, (num_parts + (alone ? 1 : call.num_threads)) * size * sizeof(float));
    if (parts == nullptr) return kNoMemory;
  }
  const bool write_alone = alone || call.num_tokens * call.row() < 1 << 16;
  if (call.key != nullptr && write_alone)
    for (int64_t t = 0; t < call.num_tokens; ++t) write<T>(call, t);
#pragma omp parallel num_threads(call.num_threads) if (!alone)
  {
    if (call.key != nullptr && !write_alone) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < call.num_tokens; ++t) write<T>(call, t);
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < work.size(); ++i) {
      const Work& w = work[i];
      if (w.kv_head >= 0) {
        prefill<T>(call, w.seq, w.kv_head, w.begin, w.count);
        continue;
      }
      float* at = parts + (w.part >= 0 ? w.part : num_parts + omp_get_thread_num()) * size;
      Decode<T>(call, w.seq, Partial(call, at)).run(w.begin, w.begin + w.count);
      if (w.part < 0)
        for (int64_t h = 0; h < call.num_heads; ++h) finish<T>(call, w.seq, h, at, 1);
    }
    for (const Split& split : splits) {
#pragma omp for schedule(static) nowait
      for (int64_t h = 0; h < call.num_heads; ++h)
        finish<T>(call, split.seq, h, parts + split.part * size, split.num_parts);
    }
  }
  std::free(parts);
  return kDone;
}

}  // namespace piecework

// The name tells the layout of Call. Types that this library was not built for are not supported.
extern "C" __attribute__((visibility("default"))) int32_t piecework_attention_3(const piecework::Call* call) {
  using namespace piecework;
  if (call->head_dim < 2 || call->head_dim > kMaxHeadDim || call->head_dim % 2) return kUnsupported;
  const Result checked = check(*call);
  if (checked != kDone) return checked;
  switch (call->dtype) {
#if defined(PIECEWORK_FLOAT32)
    case 0: return attend<float>(*call);
#endif
#if defined(PIECEWORK_BFLOAT16)
    case 1: return attend<BFloat16>(*call);
#endif
#if defined(PIECEWORK_FLOAT16) && defined(__FLT16_MAX__)
    case 2: return attend<Half>(*call);
#endif
    default: return kUnsupported;
  }
}
