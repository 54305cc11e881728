// sparsekern._cpu: checks, casts the address, calls. Tensors come as addresses and sizes, so torch is neither needed to
// build this nor linked. What is on packed weights is in bind_bitmap.cpp, on dense ones in bind_dense.cpp.

#include <cstring>
#include <new>

#include "bind_linear.h"
#include "cpu/huge_pages.h"

#if defined(_OPENMP) && defined(__linux__)
#include <omp.h>
#include <pthread.h>
#endif

namespace sparsekern {
namespace {

void obs_sweep_checked(Address weight, int64_t weight_stride, Address u, Address mask, int64_t mask_stride, int64_t n,
                       int64_t m, Address scale, int64_t levels, Address pruned, int64_t pruned_stride, Address e,
                       int64_t e_stride, int64_t rows, int64_t block, int threads, const std::string& isa) {
  check_threads(threads);
  check(rows >= 0 && block >= 0, "rows and block must not be negative, got ", rows, " and ", block);
  // 2^20 columns are 4 TB of U: no honest request
  check(block < int64_t{1} << 20 && rows < int64_t{1} << 40, "the block is impossible: ", rows, " by ", block);
  check(weight_stride >= block && mask_stride >= block && pruned_stride >= block && e_stride >= block,
        "strides must not be below the block's width");
  check(m == 0 || (0 < n && n <= m && block % m == 0), "N:M must divide the block, got ", n, ":", m);
  check(levels >= 0 && levels <= 1 << 20, "levels must lie in 0..2^20, got ", levels);
  const int set = find_set(kObsSweepSets, isa);
  if (rows == 0 || block == 0) return;
  const ObsSweep sweep = {reinterpret_cast<const float*>(weight),
                          weight_stride,
                          reinterpret_cast<const float*>(u),
                          reinterpret_cast<const uint8_t*>(mask),
                          mask_stride,
                          n,
                          m,
                          reinterpret_cast<const float*>(scale),
                          static_cast<float>(levels),
                          reinterpret_cast<float*>(pruned),
                          pruned_stride,
                          reinterpret_cast<float*>(e),
                          e_stride,
                          rows,
                          block};
  bool done;
  {
    py::gil_scoped_release release;
    done = obs_sweep(sweep, set, threads);
  }
  if (!done) throw std::bad_alloc();
}

int64_t keep_largest_checked(Address saliency, Address kept, int64_t kept_stride, Address mask, int64_t sets,
                             int64_t size, int threads) {
  check_threads(threads);
  check(sets >= 0 && size >= 0, "sets and size must not be negative, got ", sets, " and ", size);
  int64_t elements;
  check(!__builtin_mul_overflow(sets, size, &elements) && size < int64_t{1} << 32,
        "a set must be smaller than 2^32, got ", size);
  const auto* counts = reinterpret_cast<const int64_t*>(kept);
  for (int64_t set = 0; set < (kept_stride == 0 && sets > 0 ? 1 : sets); ++set) {
    const int64_t count = counts[set * kept_stride];
    check(0 <= count && count <= size, "kept must lie in 0..", size, ", got ", count);
  }
  if (elements == 0) return 0;
  int64_t missing;
  {
    py::gil_scoped_release release;
    missing = keep_largest(reinterpret_cast<const float*>(saliency), counts, kept_stride,
                           reinterpret_cast<uint8_t*>(mask), sets, size, threads);
  }
  if (missing < 0) throw std::bad_alloc();
  return missing;
}

uint64_t stream_read_checked(Address buffer, int64_t bytes, int threads) {
  check_threads(threads);
  check(bytes >= 0, "bytes must not be negative, got ", bytes);
  py::gil_scoped_release release;
  return stream_read(reinterpret_cast<const void*>(buffer), bytes, threads);
}

py::tuple gram_sets() {
  py::list names;
  for (const InstructionSet* set = kGramSets; set->name != nullptr; ++set) {
    if (set->supported() && is_allowed(*set)) names.append(set->name);
  }
  return py::tuple(names);
}

// as far as use() allows AVX-512
bool addmm_is_of_use() { return has_addmm() && is_allowed({"avx512", has_addmm}); }

void gram_checked(const std::string& dtype, Address x, int64_t x_size, Address total, int64_t total_size,
                  int64_t tokens, int64_t in_features, int threads, const std::string& isa) {
  check_threads(threads);
  check(tokens >= 0, "tokens must not be negative, got ", tokens);
  check(in_features >= 0, "in_features must not be negative, got ", in_features);
  int64_t x_needed, total_needed;
  check(!__builtin_mul_overflow(tokens, in_features, &x_needed) && x_size == x_needed,
        "x must hold tokens * in_features elements, got ", x_size);
  check(!__builtin_mul_overflow(in_features, in_features, &total_needed) && total_size == total_needed,
        "total must hold in_features * in_features elements, got ", total_size);
  int set = 0;
  while (kGramSets[set].name != nullptr && !(isa == kGramSets[set].name && kGramSets[set].supported())) ++set;
  check(kGramSets[set].name != nullptr, "this machine does not have the instruction set ", isa);
  const DType type = dtype_of(dtype);
  check(type == DType::kBFloat16 || isa != "avx512_bf16", "avx512_bf16 multiplies bfloat16, got ", dtype);
  bool done;
  {
    py::gil_scoped_release release;
    done = gram(reinterpret_cast<const void*>(x), type, reinterpret_cast<float*>(total), tokens, in_features, set,
                threads);
  }
  if (!done) throw std::bad_alloc();
}

void addmm_checked(Address total, int64_t total_stride, Address a, int64_t a_row_stride, int64_t a_column_stride,
                   Address b, int64_t b_row_stride, int64_t b_column_stride, int64_t rows, int64_t inner,
                   int64_t columns, float scale, int threads) {
  check(has_addmm(), "this is not an AMD processor with AVX-512");
  check_threads(threads);
  check(rows >= 0 && inner >= 0 && columns >= 0, "sizes must not be negative, got ", rows, ", ", inner, ", ", columns);
  check(total_stride >= columns, "rows of total must not overlap, got stride ", total_stride);
  check(a_row_stride == 1 || a_column_stride == 1, "a must be row-major or column-major");
  check(b_row_stride == 1 || b_column_stride == 1, "b must be row-major or column-major");
  bool done;
  {
    py::gil_scoped_release release;
    done = addmm(reinterpret_cast<float*>(total), total_stride,
                 {reinterpret_cast<const float*>(a), a_row_stride, a_column_stride},
                 {reinterpret_cast<const float*>(b), b_row_stride, b_column_stride}, rows, inner, columns, scale,
                 threads);
  }
  if (!done) throw std::bad_alloc();
}

// A child has the threads of OpenMP's pool in its books but not in its process, and would wait for them for ever, in
// torch's regions too: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=60035. So the pool of the thread that forks goes
// before it does; the next region starts another, in the parent and in the child.
void release_threads_before_fork() {
#if defined(_OPENMP) && defined(__linux__)
  pthread_atfork([] { omp_pause_resource_all(omp_pause_soft); }, nullptr, nullptr);
#endif
}

}  // namespace
}  // namespace sparsekern

PYBIND11_MODULE(_cpu, module) {
  using namespace sparsekern;
  // with a torch that does not say where its tensors lie nothing is served: told when this is loaded, as an ImportError
  exchange_api();
  release_threads_before_fork();
  module.attr("ABI") = kAbi;
  module.def("are_plain", are_plain, py::arg("device_type"), py::arg("x"), py::arg("operands"), py::arg("bias"),
             "Whether all are plain tensors of torch, on devices of a type of DLPack's.");
  bind_bitmap(module);
  bind_bitmap_index(module);
  bind_bitmap_int8(module);
  bind_dense(module);
  bind_24(module);
  module.def("obs_sweep_sets", [] { return names_of(kObsSweepSets); }, "Those this machine has, best first.");
  module.def("obs_sweep", obs_sweep_checked, py::arg("weight"), py::arg("weight_stride"), py::arg("u"), py::arg("mask"),
             py::arg("mask_stride"), py::arg("n"), py::arg("m"), py::arg("scale"), py::arg("levels"),
             py::arg("pruned"), py::arg("pruned_stride"), py::arg("e"), py::arg("e_stride"), py::arg("rows"),
             py::arg("block"), py::arg("threads"), py::arg("isa") = "");
  module.def("keep_largest", keep_largest_checked, py::arg("saliency"), py::arg("kept"), py::arg("kept_stride"),
             py::arg("mask"), py::arg("sets"), py::arg("size"), py::arg("threads"));
  // only a hint; huge pages that lie wholly within are asked for
  module.def(
      "prefer_huge_pages",
      [](Address address, int64_t bytes) { prefer_huge_pages(reinterpret_cast<void*>(address), bytes); },
      py::arg("address"), py::arg("bytes"));
  module.def("stream_read", stream_read_checked, py::arg("buffer"), py::arg("bytes"), py::arg("threads"));
  module.def("gram_sets", gram_sets, "The instruction sets that gram can use here, best first.");
  module.def("gram", gram_checked, py::arg("dtype"), py::arg("x"), py::arg("x_size"), py::arg("total"),
             py::arg("total_size"), py::arg("tokens"), py::arg("in_features"), py::arg("threads"), py::arg("isa"));
  module.def("has_addmm", addmm_is_of_use, "Whether addmm is of use on this machine.");
  module.def("addmm", addmm_checked, py::arg("total"), py::arg("total_stride"), py::arg("a"), py::arg("a_row_stride"),
             py::arg("a_column_stride"), py::arg("b"), py::arg("b_row_stride"), py::arg("b_column_stride"),
             py::arg("rows"), py::arg("inner"), py::arg("columns"), py::arg("scale"), py::arg("threads"));
}
