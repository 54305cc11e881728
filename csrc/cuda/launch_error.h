// What an error of a launcher means for the one who called: the op, the runtime's name for it, the rule, the remedy.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace sparsekern::cuda {

inline const char* rule_and_remedy(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
      return "the sizes must be those that this kernel and this card take; give the layer another kernel, or leave it "
             "dense";
    case cudaErrorMemoryAllocation: return "the card's memory must hold what is asked for; free some, or take fewer tokens";
    case cudaErrorInsufficientDriver:
      return "there must be a driver at least as new as the CUDA that this was built with; update it, or build with an "
             "older nvcc";
    case cudaErrorNoDevice: return "the process must see a card; look at nvidia-smi and CUDA_VISIBLE_DEVICES";
    case cudaErrorNoKernelImageForDevice:
      return "the build must have code for this card; build again with an nvcc that knows it, and with it among "
             "SPARSEKERN_CUDA_ARCHS where that is set";
    default:
      return "all launches before this one must have succeeded; start the process anew, with CUDA_LAUNCH_BLOCKING=1 to "
             "learn which one did not";
  }
}

inline std::string launch_error(const std::string& op, cudaError_t error) {
  return op + ": the launch failed with " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error) + ": " +
         rule_and_remedy(error);
}

}  // namespace sparsekern::cuda
