// Asks csrc/cuda/division.h for answers that are remembered, more than there is room for, and counts what was worked out.
//   result: of each round over all sizes, how many answers were wrong and how many were worked out

#include "division.h"
#include "operands.h"

using sparsekern::cuda::Card;
using sparsekern::cuda::remembered;

int main(int argc, char** argv) {
  Operands operands(argc, argv);
  const int64_t rounds = operands.number(0), sizes = operands.number(1);
  auto* result = operands.result<int64_t>(rounds * 2);
  for (int64_t round = 0; round < rounds; ++round) {
    int64_t wrong = 0, worked_out = 0;
    for (int64_t i = 0; i < sizes; ++i) {
      Card card{};
      // the same sizes on two cards have two answers
      card.device = static_cast<int>(i % 2);
      const std::array<int64_t, 2> asked{i / 2, 7};
      wrong += i != remembered<int64_t>(card, asked, [&] {
        ++worked_out;
        return i;
      });
    }
    result[2 * round] = wrong;
    result[2 * round + 1] = worked_out;
  }
  return operands.finish(cudaSuccess);
}
