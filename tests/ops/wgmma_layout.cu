// Where CUTLASS itself looks for the metadata of a 2:4 weight: for out_features and in_features of the command line, the
// offset, in groups of four inputs, of each output's each group; then the size in groups.

#include <cstdio>
#include <cstdlib>
#include <cutlass/gemm/collective/builders/sm90_sparse_config.inl>

int main(int, char** argv) {
  using namespace cute;
  using Config = cutlass::Sm90GemmSparseConfig<sparse_elem<2, cutlass::bfloat16_t>, GMMA::Major::K,
                                               sparse_elem<8, uint8_t>, _128>;
  const int out_features = std::atoi(argv[1]), in_features = std::atoi(argv[2]);
  const auto layout = Config::fill_layoutE(make_shape(out_features, 1, in_features, 1));
  for (int row = 0; row < out_features; ++row) {
    for (int input = 0; input < in_features; input += 4) {
      std::printf("%lld\n", static_cast<long long>(layout(row, input, 0) / 4));
    }
  }
  std::printf("%lld\n", static_cast<long long>(cosize(layout) / 4));
}
