// linear_dense, with panels that end where the weight does.

#include "drive.h"

void drive_dense() {
  const int64_t shapes[][2] = {{1, 1}, {7, 37}, {16, 32}, {17, 513}, {37, 7}, {50, 257}, {5, 0}};
  for (const auto& shape : shapes) {
    const int64_t rows = (shape[0] + kPanelRows - 1) / kPanelRows * kPanelRows;
    const int64_t inputs = (shape[1] + kBlockInputs - 1) / kBlockInputs * kBlockInputs;
    for (DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
      const int64_t size = value_bytes(dtype);
      Buffer<char> panels(rows * inputs * size), bias(shape[0] * size);
      fill(panels.data(), dtype, rows * inputs, 1.0);
      fill(bias.data(), dtype, shape[0], 1.0);
      const DenseWeight weight = {dtype, panels.data(), shape[0], shape[1]};
      each_set(kLinearDenseSets, [&](int set) {
        for (int64_t tokens : {1, 2, 3, 4, 6, 7, 9, 12, 13, 17, 70, 200}) {
          Buffer<char> x(tokens * shape[1] * size), y(tokens * shape[0] * size);
          fill(x.data(), dtype, tokens * shape[1], 1.0);
          for (int threads : {1, 3}) {
            expect(linear_dense(weight, x.data(), bias.data(), y.data(), tokens, set, threads), "memory");
            expect(linear_dense(weight, x.data(), nullptr, y.data(), tokens, set, threads), "memory");
          }
        }
      });
    }
  }
}
