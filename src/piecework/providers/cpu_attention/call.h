// What one call is given. Its layout is known to kernel.py: whoever changes it changes the entry's name there as well.
#pragma once

#include <algorithm>
#include <cstdint>

namespace piecework {

constexpr int kMaxHeadDim = 256;

// T tokens, S sequences, H query heads, K key/value heads, D head dim, N blocks of B tokens, W blocks in a table's row.
struct Call {
  const void *query, *key, *value;  // [T, H, D], [T, K, D]; without key nothing is written
  void* cache;                      // [2, N, B, K, D]
  const int64_t *slots, *tables, *lens, *starts;  // [T], [S, W], [S], [S + 1]
  const void* sinks;      // [H] of the query's type, or null
  const float* key_bias;  // [H, bias_width], or null
  void* out;              // [T, H, D]
  int64_t query_token, query_head, key_token, key_head, value_token, value_head;  // strides in elements
  int64_t num_tokens, num_seqs, num_heads, num_kv_heads, head_dim, num_blocks, block_size, table_width;
  int64_t window, chunk;  // 0: none
  int64_t bias_width;
  int64_t dtype, num_threads;
  double scale, softcap;  // softcap 0: none

  int64_t groups() const { return num_heads / num_kv_heads; }
  int64_t row() const { return num_kv_heads * head_dim; }  // elements of a token's keys, which lie together
  int64_t values() const { return num_blocks * block_size * row(); }  // from a key to its value
  int64_t num_new(int64_t seq) const { return starts[seq + 1] - starts[seq]; }
  const float* biases(int64_t head) const { return key_bias + head * bias_width; }
  // The first key that a query sees.
  int64_t first_key(int64_t position) const {
    const int64_t in_window = window && position >= window ? position - window + 1 : 0;
    return chunk ? std::max(in_window, position / chunk * chunk) : in_window;
  }

  // Where keys first … first + count - 1 of a sequence lie in the cache, in elements.
  void locate(int64_t seq, int64_t first, int64_t count, int64_t* offsets) const {
    const int64_t* table = tables + seq * table_width;
    int64_t block = first / block_size, inside = first % block_size;
    for (int64_t i = 0; i < count; ++block, inside = 0) {
      int64_t at = (table[block] * block_size + inside) * row();
      for (; inside < block_size && i < count; ++inside, ++i, at += row()) offsets[i] = at;
    }
  }
};

}  // namespace piecework
