"""torch's own linear: eager, with oneDNN's prepacked weight, and compiled with freezing, in bfloat16."""

import torch

from sparsekern.baselines import COMPILED, LINEAR, PREPACKED

NAMES = ("torch eager", "torch prepacked", "torch compiled")
_BASELINES = dict(zip(NAMES, (LINEAR, PREPACKED, COMPILED), strict=True))


def build(name, weight, x, threads, copies):
    """What runs copy `number` of the weight, and what reads its result. Raises ValueError when it cannot."""
    torch.set_num_threads(threads)
    weight, x = torch.from_numpy(weight).bfloat16(), torch.from_numpy(x).bfloat16()
    baseline = _BASELINES[name]
    if reason := baseline.refuses(weight):
        raise ValueError(reason)
    prepared = [baseline.prepare(weight, None, len(x)) for _ in range(copies)]
    return lambda number: baseline.run(x, prepared[number % copies], None), lambda y: y.float().numpy()
