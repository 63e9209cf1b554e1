// `piecework::head_matmul_cpu` as pieces call it, in the C interface that AOTInductor's libraries have of torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#define PIECEWORK_WRITTEN_FMA  // pieces are compiled without contraction
#include "head_matmul.h"

namespace piecework {

#define PIECEWORK_TRY(call)                              \
  do {                                                   \
    const AOTITorchError code_ = (call);                 \
    if (code_ != AOTI_TORCH_SUCCESS) return code_;       \
  } while (0)

// As torch does it.
inline AOTITorchError plain_head_matmul(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle out,
                                        const int64_t* sizes, const int64_t* strides, int64_t width) {
  const int64_t heads = sizes[1], by_head[] = {heads, sizes[0], sizes[2]}, made[] = {heads, sizes[0], width};
  const int64_t turned[] = {strides[1], strides[0], strides[2]}, into[] = {width, heads * width, 1};
  AtenTensorHandle rows = nullptr, results = nullptr;
  PIECEWORK_TRY(aoti_torch__reinterpret_tensor(x, 3, by_head, turned, 0, &rows));
  AOTITorchError done = aoti_torch__reinterpret_tensor(out, 3, made, into, 0, &results);
  if (done == AOTI_TORCH_SUCCESS) {
    done = aoti_torch_cpu_bmm_out(results, rows, weight);
    aoti_torch_delete_tensor_object(results);
  }
  aoti_torch_delete_tensor_object(rows);
  return done;
}

}  // namespace piecework

extern "C" inline AOTITorchError aoti_torch_cpu_head_matmul_cpu(AtenTensorHandle x, AtenTensorHandle weight,
                                                                AtenTensorHandle* result) {
  using namespace piecework;
  int64_t *sizes, *strides, *weight_sizes, *weight_strides;
  int32_t dtype;
  HeadMatmul call;
  void *from, *matrices;
  PIECEWORK_TRY(aoti_torch_get_sizes(x, &sizes));
  PIECEWORK_TRY(aoti_torch_get_strides(x, &strides));
  PIECEWORK_TRY(aoti_torch_get_sizes(weight, &weight_sizes));
  PIECEWORK_TRY(aoti_torch_get_strides(weight, &weight_strides));
  PIECEWORK_TRY(aoti_torch_get_dtype(x, &dtype));
  PIECEWORK_TRY(aoti_torch_get_data_ptr(x, &from));
  PIECEWORK_TRY(aoti_torch_get_data_ptr(weight, &matrices));
  const int64_t depth = sizes[2], width = weight_sizes[2], made[] = {sizes[0], sizes[1], width},
                dense[] = {sizes[1] * width, width, 1};
  PIECEWORK_TRY(aoti_torch_empty_strided(3, made, dense, dtype, aoti_torch_device_type_cpu(), 0, result));
  call.x = from;
  call.weight = matrices;
  PIECEWORK_TRY(aoti_torch_get_data_ptr(*result, &call.out));
  call.x_token = strides[0];
  call.x_head = strides[1];
  call.num_tokens = sizes[0];
  call.num_heads = sizes[1];
  call.depth = depth;
  call.width = width;
  const bool dense_weight =
      weight_strides[2] == 1 && weight_strides[1] == width && weight_strides[0] == depth * width;
  if (dense_weight && strides[2] == 1) {
#if defined(PIECEWORK_FLOAT32)
    if (dtype == aoti_torch_dtype_float32() && try_head_matmul<float>(call)) return AOTI_TORCH_SUCCESS;
#endif
#if defined(PIECEWORK_BFLOAT16)
    if (dtype == aoti_torch_dtype_bfloat16() && try_head_matmul<BFloat16>(call)) return AOTI_TORCH_SUCCESS;
#endif
  }
  return plain_head_matmul(x, weight, *result, sizes, strides, width);
}
