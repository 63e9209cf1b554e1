// `piecework::head_matmul_cpu`, `linear_cpu` and `linear_bias_cpu` as pieces call them, in the C interface that
// AOTInductor's libraries have of torch.
#pragma once

#include <vector>

#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#define PIECEWORK_WRITTEN_FMA  // pieces are compiled without contraction
#include "../cpu_common/products.h"

namespace piecework {

#define PIECEWORK_TRY(call)                              \
  do {                                                   \
    const AOTITorchError code_ = (call);                 \
    if (code_ != AOTI_TORCH_SUCCESS) return code_;       \
  } while (0)

struct Shape {
  int64_t dims, *sizes, *strides;
};

inline AOTITorchError shape_of(AtenTensorHandle tensor, Shape& shape) {
  PIECEWORK_TRY(aoti_torch_get_dim(tensor, &shape.dims));
  PIECEWORK_TRY(aoti_torch_get_sizes(tensor, &shape.sizes));
  return aoti_torch_get_strides(tensor, &shape.strides);
}

// Of rows whose elements lie apart, or which are at no regular distance, a copy is multiplied.
template <class T, class F>
bool with_rows(Product call, const Shape& x, bool by_token, const F& run) {
  if (by_token && x.strides[x.dims - 1] == 1) return run(call);
  int64_t count = 1, at[8] = {};
  for (int d = 0; d < x.dims; ++d) count *= x.sizes[d];
  std::vector<T> rows(count);
  const T* from = (const T*)call.x;
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = *from;
    for (int64_t d = x.dims - 1; d >= 0; --d) {
      from += x.strides[d];
      if (++at[d] < x.sizes[d]) break;
      from -= at[d] * x.strides[d];
      at[d] = 0;
    }
  }
  call.x = rows.data();
  call.x_token = call.num_heads * call.depth;
  call.x_head = call.depth;
  return run(call);
}

// Whether all axes but the last are one of a regular stride, which is written to `stride`.
inline bool flat(const Shape& x, int64_t& stride) {
  int64_t next = 0;
  bool found = false;
  stride = 0;
  for (int64_t d = x.dims - 2; d >= 0; --d) {
    if (x.sizes[d] == 1) continue;
    if (found && x.strides[d] != next) return false;
    if (!found) stride = x.strides[d];
    found = true;
    next = x.strides[d] * x.sizes[d];
  }
  return true;
}

// Products with packed matrices of x's type.
struct PackedRun {
  AOTITorchError operator()(const Product& call, const Shape& x, bool by_token, int32_t dtype) const {
    bool done = false;
#if defined(PIECEWORK_FLOAT32)
    if (dtype == aoti_torch_dtype_float32()) done = with_rows<float>(call, x, by_token, multiply<float>);
#endif
#if defined(PIECEWORK_BFLOAT16)
    if (dtype == aoti_torch_dtype_bfloat16()) done = with_rows<BFloat16>(call, x, by_token, multiply<BFloat16>);
#endif
#if defined(PIECEWORK_FLOAT16) && defined(__FLT16_MAX__)
    if (dtype == aoti_torch_dtype_float16()) done = with_rows<Half>(call, x, by_token, multiply<Half>);
#endif
    return done ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
  }
};

template <class Run>
AOTITorchError product(AtenTensorHandle x, const Shape& shape, AtenTensorHandle matrices, AtenTensorHandle bias,
                       Product call, bool by_token, const int64_t* made, AtenTensorHandle* result, const Run& run) {
  int32_t dtype;
  void *from, *packed, *added = nullptr;
  PIECEWORK_TRY(aoti_torch_get_dtype(x, &dtype));
  PIECEWORK_TRY(aoti_torch_get_data_ptr(x, &from));
  PIECEWORK_TRY(aoti_torch_get_data_ptr(matrices, &packed));
  if (bias != nullptr) PIECEWORK_TRY(aoti_torch_get_data_ptr(bias, &added));
  int64_t dense[8], stride = 1;
  for (int64_t d = shape.dims - 1; d >= 0; --d) {
    dense[d] = stride;
    stride *= made[d] > 1 ? made[d] : 1;
  }
  PIECEWORK_TRY(
      aoti_torch_empty_strided(shape.dims, made, dense, dtype, aoti_torch_device_type_cpu(), 0, result));
  call.x = from;
  call.matrices = packed;
  call.bias = added;
  PIECEWORK_TRY(aoti_torch_get_data_ptr(*result, &call.out));
  call.out_token = call.num_heads * call.width;
  call.out_head = call.width;
  call.num_threads = omp_get_max_threads();
  try {
    return run(call, shape, by_token, dtype);
  } catch (...) {  // no memory
  }
  return AOTI_TORCH_FAILURE;
}

template <class Run>
AOTITorchError linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle bias, AtenTensorHandle* result,
                      const Run& run) {
  Shape shape;
  int64_t *matrix, made[8];
  PIECEWORK_TRY(shape_of(x, shape));
  PIECEWORK_TRY(aoti_torch_get_sizes(weight, &matrix));
  if (shape.dims < 1 || shape.dims > 8) return AOTI_TORCH_FAILURE;
  Product call;
  call.num_tokens = 1;
  for (int64_t d = 0; d < shape.dims - 1; ++d) call.num_tokens *= made[d] = shape.sizes[d];
  made[shape.dims - 1] = matrix[0];
  const bool by_token = flat(shape, call.x_token);
  call.x_head = 0;
  call.num_heads = 1;
  call.depth = shape.sizes[shape.dims - 1];
  call.width = matrix[0];
  return product(x, shape, weight, bias, call, by_token, made, result, run);
}

}  // namespace piecework

extern "C" inline AOTITorchError aoti_torch_cpu_head_matmul_cpu(AtenTensorHandle x, AtenTensorHandle matrices,
                                                                AtenTensorHandle* result) {
  using namespace piecework;
  Shape shape;
  int64_t* matrix;
  PIECEWORK_TRY(shape_of(x, shape));
  PIECEWORK_TRY(aoti_torch_get_sizes(matrices, &matrix));
  const int64_t made[] = {shape.sizes[0], shape.sizes[1], matrix[2]};
  Product call;
  call.x_token = shape.strides[0];
  call.x_head = shape.strides[1];
  call.num_tokens = shape.sizes[0];
  call.num_heads = shape.sizes[1];
  call.depth = shape.sizes[2];
  call.width = matrix[2];
  return product(x, shape, matrices, nullptr, call, true, made, result, PackedRun());
}

extern "C" inline AOTITorchError aoti_torch_cpu_linear_bias_cpu(AtenTensorHandle x, AtenTensorHandle weight,
                                                                AtenTensorHandle bias, AtenTensorHandle* result) {
  return piecework::linear(x, weight, bias, result, piecework::PackedRun());
}

extern "C" inline AOTITorchError aoti_torch_cpu_linear_cpu(AtenTensorHandle x, AtenTensorHandle weight,
                                                           AtenTensorHandle* result) {
  return piecework::linear(x, weight, nullptr, result, piecework::PackedRun());
}
