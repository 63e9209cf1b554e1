// `piecework::linear_quantized_cpu` as pieces call it, in the C interface that AOTInductor's libraries have of torch.
// What values and x are is told by macros, so that a piece has the functions that it calls and no others.
#pragma once

#include "products_shim.h"

#include "../cpu_common/quantized.h"

namespace piecework {

struct QuantizedRun {
  QuantizedProduct& call;
  int32_t values;  // their dtype

  template <class F, class T>
  AOTITorchError run(const Product& given, const Shape& x, bool by_token) const {
    with_rows<T>(given, x, by_token, [this](const Product& of) {
      call.of = of;
      multiply_quantized<F, T>(call);
      return true;
    });
    return AOTI_TORCH_SUCCESS;
  }

  AOTITorchError operator()(const Product& given, const Shape& x, bool by_token, int32_t dtype) const {
#define PIECEWORK_CASE(F, values_dtype, T, x_dtype)                               \
  if (values == aoti_torch_dtype_##values_dtype() && dtype == aoti_torch_dtype_##x_dtype()) \
    return run<F, T>(given, x, by_token);
#if defined(PIECEWORK_QUANTIZED_INT8_FLOAT32)
    PIECEWORK_CASE(Int8, int8, float, float32)
#endif
#if defined(PIECEWORK_QUANTIZED_INT8_BFLOAT16)
    PIECEWORK_CASE(Int8, int8, BFloat16, bfloat16)
#endif
#if defined(PIECEWORK_QUANTIZED_INT8_FLOAT16)
    PIECEWORK_CASE(Int8, int8, Half, float16)
#endif
#if defined(PIECEWORK_QUANTIZED_INT4_FLOAT32)
    PIECEWORK_CASE(Int4, int32, float, float32)
#endif
#if defined(PIECEWORK_QUANTIZED_INT4_BFLOAT16)
    PIECEWORK_CASE(Int4, int32, BFloat16, bfloat16)
#endif
#if defined(PIECEWORK_QUANTIZED_INT4_FLOAT16)
    PIECEWORK_CASE(Int4, int32, Half, float16)
#endif
#if defined(PIECEWORK_QUANTIZED_FP8_FLOAT32)
    PIECEWORK_CASE(Fp8, float8_e4m3fn, float, float32)
#endif
#if defined(PIECEWORK_QUANTIZED_FP8_BFLOAT16)
    PIECEWORK_CASE(Fp8, float8_e4m3fn, BFloat16, bfloat16)
#endif
#if defined(PIECEWORK_QUANTIZED_FP8_FLOAT16)
    PIECEWORK_CASE(Fp8, float8_e4m3fn, Half, float16)
#endif
#undef PIECEWORK_CASE
    return AOTI_TORCH_FAILURE;
  }
};

}  // namespace piecework

extern "C" inline AOTITorchError aoti_torch_cpu_linear_quantized_cpu(AtenTensorHandle x, AtenTensorHandle values,
                                                                     AtenTensorHandle scales, AtenTensorHandle* offsets,
                                                                     AtenTensorHandle* bias, AtenTensorHandle* result) {
  using namespace piecework;
  int64_t* of_scales;
  void *scale, *offset = nullptr;
  QuantizedProduct call;
  QuantizedRun run{call, 0};
  PIECEWORK_TRY(aoti_torch_get_dtype(values, &run.values));
  PIECEWORK_TRY(aoti_torch_get_sizes(scales, &of_scales));
  PIECEWORK_TRY(aoti_torch_get_data_ptr(scales, &scale));
  if (offsets != nullptr) PIECEWORK_TRY(aoti_torch_get_data_ptr(*offsets, &offset));
  call.groups = of_scales[1];
  call.scales = (const float*)scale;
  call.offsets = (const float*)offset;
  return linear(x, values, bias == nullptr ? nullptr : *bias, result, run);
}
