"""model: a whole language model, pruned, dense against sparse: forward passes of one token and of many.

    python bench/model.py --model OUT                                    a pruned checkpoint, as `prune` wrote it
    python bench/model.py --model llama-3.2-1b --pattern 50%             random weights in the real shapes
    python bench/model.py --tiny                                         seconds on any CPU

The logits of both are compared before anything is timed. The last line of stdout is the result as JSON.
"""

import argparse
import json
import sys

import torch
from torch import nn

from sparsekern import hf, shapes
from sparsekern.endtoend import compare_end_to_end
from sparsekern.hf_generate import random_model
from sparsekern.measure import linear_sparsity
from sparsekern.pattern import Pattern, as_pattern
from sparsekern.plan import Unmeasured

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TINY_SECONDS = 2.0


def prune_by_magnitude(model: nn.Module, pattern: Pattern) -> None:
    """Speed does not depend on which weights go: the cheapest method will do."""
    for _, layer in hf.layers(model):
        weight = hf.weight(layer)
        weight.masked_fill_(~pattern.mask(weight.float().abs()), 0.0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help=f"a directory, or random weights: {', '.join(shapes.MODELS)}")
    parser.add_argument("--pattern", help='prune by magnitude before, as "50%%" or "2:4"')
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the timings together")
    parser.add_argument("--all", action="store_true", help="swap every layer, be it faster or not")
    parser.add_argument("--tiny", action="store_true", help="the tiny model, within seconds, every layer swapped")
    chosen = parser.parse_args(arguments)
    if chosen.tiny:
        chosen.model, chosen.pattern, chosen.seconds, chosen.all = "tiny", chosen.pattern or "50%", TINY_SECONDS, True

    dtype, known = DTYPES[chosen.dtype], chosen.model in shapes.MODELS
    model = random_model(shapes.find(chosen.model), dtype) if known else hf.load(chosen.model, dtype)
    if chosen.pattern or known:
        prune_by_magnitude(model, as_pattern(chosen.pattern or "50%"))
    result = compare_end_to_end(model, chosen.tokens, chosen.seconds, Unmeasured() if chosen.all else None)
    print(result)
    facts = {"model": chosen.model, "dtype": chosen.dtype, "sparsity": linear_sparsity(model)}
    print(json.dumps({**facts, **result.to_json()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
