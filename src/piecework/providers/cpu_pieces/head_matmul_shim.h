// `piecework::head_matmul_cpu` as pieces call it, in the C interface that AOTInductor's libraries have of torch.
#pragma once

#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#define PIECEWORK_WRITTEN_FMA  // pieces are compiled without contraction
#include "head_matmul.h"

namespace piecework {

#define PIECEWORK_TRY(call)                              \
  do {                                                   \
    const AOTITorchError code_ = (call);                 \
    if (code_ != AOTI_TORCH_SUCCESS) return code_;       \
  } while (0)

// Of rows whose elements lie apart, a copy is multiplied.
template <class T>
void multiply(HeadMatmul call, int64_t stride) {
  if (stride == 1) return head_matmul<T>(call);
  std::vector<T> rows(call.num_tokens * call.num_heads * call.depth);
  const T* from = (const T*)call.x;
  T* to = rows.data();
  for (int64_t t = 0; t < call.num_tokens; ++t)
    for (int64_t h = 0; h < call.num_heads; ++h)
      for (int64_t k = 0; k < call.depth; ++k) *to++ = from[t * call.x_token + h * call.x_head + k * stride];
  call.x = rows.data();
  call.x_token = call.num_heads * call.depth;
  call.x_head = call.depth;
  head_matmul<T>(call);
}

}  // namespace piecework

extern "C" inline AOTITorchError aoti_torch_cpu_head_matmul_cpu(AtenTensorHandle x, AtenTensorHandle weight,
                                                                AtenTensorHandle* result) {
  using namespace piecework;
  int64_t *sizes, *strides, *weight_sizes;
  int32_t dtype;
  HeadMatmul call;
  void *from, *matrices;
  PIECEWORK_TRY(aoti_torch_get_sizes(x, &sizes));
  PIECEWORK_TRY(aoti_torch_get_strides(x, &strides));
  PIECEWORK_TRY(aoti_torch_get_sizes(weight, &weight_sizes));
  PIECEWORK_TRY(aoti_torch_get_dtype(x, &dtype));
  PIECEWORK_TRY(aoti_torch_get_data_ptr(x, &from));
  PIECEWORK_TRY(aoti_torch_get_data_ptr(weight, &matrices));
  const int64_t width = weight_sizes[2], made[] = {sizes[0], sizes[1], width}, dense[] = {sizes[1] * width, width, 1};
  PIECEWORK_TRY(aoti_torch_empty_strided(3, made, dense, dtype, aoti_torch_device_type_cpu(), 0, result));
  call.x = from;
  call.weight = matrices;
  PIECEWORK_TRY(aoti_torch_get_data_ptr(*result, &call.out));
  call.x_token = strides[0];
  call.x_head = strides[1];
  call.num_tokens = sizes[0];
  call.num_heads = sizes[1];
  call.depth = sizes[2];
  call.width = width;
  try {
#if defined(PIECEWORK_FLOAT32)
    if (dtype == aoti_torch_dtype_float32()) return multiply<float>(call, strides[2]), AOTI_TORCH_SUCCESS;
#endif
#if defined(PIECEWORK_BFLOAT16)
    if (dtype == aoti_torch_dtype_bfloat16()) return multiply<BFloat16>(call, strides[2]), AOTI_TORCH_SUCCESS;
#endif
  } catch (...) {  // no memory
  }
  return AOTI_TORCH_FAILURE;
}
