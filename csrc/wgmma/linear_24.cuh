// linear_24 by wgmma.sp, from CUTLASS's parts: the kernel for one type of value.
//
// D = W x^T as in cuda/linear_24_prefill.cu, but W and x^T come to shared memory through the copy engine, TMA, and four
// warps multiply 64 outputs by up to 256 tokens in one instruction that reads both from there. One group of four warps
// only copies, two only multiply, and blocks stay and walk over the tiles. D is column-major [outputs, tokens], which is
// y [tokens, outputs]; the bias is one number a row of D.
//
// Not run without a card: no test of ours emulates TMA and wgmma. What is checked is that it compiles to HGMMA.SP without
// spills, and that the metadata lies where CUTLASS's own layout says.
#pragma once

#include <cuda_runtime.h>

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

namespace sparsekern::wgmma {

using namespace cute;

template <typename Element, typename TileShape, typename ClusterShape>
struct Kernel {
  using Value = Element;
  // W row by row, x^T column by column, y^T column by column
  using OutputTag = cutlass::layout::ColumnMajor;
  static constexpr int kAlignment = 16 / sizeof(Element);
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
  using Bias = cutlass::epilogue::fusion::LinCombPerRowBias<Element, float, Element, Element, float>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, OutputTag, kAlignment, Element, OutputTag,
      kAlignment, EpilogueSchedule, Bias>::CollectiveOp;

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor, kAlignment, Element,
      cutlass::layout::ColumnMajor, kAlignment, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;

  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
      cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>>;
};

template <typename Config>
cudaError_t launch(const void* x, const void* values, const void* metadata, const void* bias, void* y, int tokens,
                   int out_features, int in_features, int multiprocessors, cudaStream_t stream) {
  using Gemm = typename Config::Gemm;
  using Element = typename Config::Value;
  using Mainloop = typename Config::Mainloop;
  const Shape<int, int, int, int> shape{out_features, tokens, in_features, 1};
  const auto row = [](int64_t elements) { return cute::make_stride(elements, _1{}, int64_t{0}); };
  typename Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = shape;
  arguments.mainloop = {static_cast<const typename Mainloop::ArrayElementA*>(values),
                        Mainloop::SparseConfig::fill_layoutA(shape),
                        static_cast<const Element*>(x), row(in_features),
                        static_cast<const typename Mainloop::ElementE*>(metadata),
                        Mainloop::SparseConfig::fill_layoutE(shape)};
  arguments.epilogue.thread.alpha = 1.0f;
  arguments.epilogue.thread.beta = 0.0f;
  arguments.epilogue.thread.bias_ptr = static_cast<const Element*>(bias);
  arguments.epilogue.ptr_D = static_cast<Element*>(y);
  arguments.epilogue.dD = cute::make_stride(_1{}, int64_t{out_features}, int64_t{0});
  arguments.hw_info.sm_count = multiprocessors;
  if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
  if (Gemm::get_workspace_size(arguments) != 0) return cudaErrorInvalidValue;
  Gemm gemm;
  if (gemm.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess) return cudaErrorInvalidConfiguration;
  return gemm.run(stream) == cutlass::Status::kSuccess ? cudaGetLastError() : cudaErrorLaunchFailure;
}

}  // namespace sparsekern::wgmma
