// linear_24, with values and positions that end where the weight does, and positions that say anything.

#include "drive.h"

void drive_24() {
  const int64_t shapes[][2] = {{1, 4}, {7, 36}, {16, 32}, {17, 516}, {37, 8}, {50, 256}, {5, 0}};
  for (const auto& shape : shapes) {
    const int64_t panels = (shape[0] + kPanelRows - 1) / kPanelRows;
    const int64_t groups = (shape[1] + kBlockInputs - 1) / kBlockInputs * kGroups24;
    Buffer<uint16_t> values(panels * groups * kPanelRows * 2), bias(shape[0]);
    Buffer<uint64_t> positions(panels * groups);
    fill(values.data(), DType::kBFloat16, values.size, 1.0);
    fill(bias.data(), DType::kBFloat16, bias.size, 1.0);
    for (int64_t i = 0; i < positions.size; ++i) positions[i] = generator();
    const Weight24 weight = {values.data(), positions.data(), shape[0], shape[1]};
    each_set(kLinear24Sets, [&](int set) {
      for (int64_t tokens : {1, 2, 3, 7, 12, 17, 23, 25, 70, 200}) {
        Buffer<uint16_t> x(tokens * shape[1]), y(tokens * shape[0]);
        fill(x.data(), DType::kBFloat16, x.size, 1.0);
        for (int threads : {1, 3}) {
          expect(linear_24(weight, x.data(), bias.data(), y.data(), tokens, set, threads), "memory");
          expect(linear_24(weight, x.data(), nullptr, y.data(), tokens, set, threads), "memory");
        }
      }
    });
  }
}
