"""worker: one peer in a process of its own, for a Python or versions that are not ours. numpy only.

    python worker.py bench/peers/deepsparse_engine.py [more paths to import from]

It reads a JSON object a line from stdin and answers with one on stdout: {"name", "weight", "x", "threads", "copies"}
builds, weight and x being .npy files, and answers {"y": a .npy file}; {"run": number} answers
{"seconds"}, the median of a few calls in a row. What cannot be built answers {"error"} in words.
"""

import importlib.util
import json
import os
import sys
import time

import numpy as np

# a peer may fail in any way that it likes, and hurts nobody else
FAILURES = (ImportError, ValueError, RuntimeError, OSError, TypeError, AttributeError, LookupError, AssertionError)

WARM_SECONDS, TIMED = 0.05, 9


def load(path: str):
    spec = importlib.util.spec_from_file_location(os.path.basename(path).removesuffix(".py"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    # what a library prints must not be taken for an answer
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:0] = [os.path.dirname(os.path.abspath(sys.argv[1])), *sys.argv[2:]]
    run, last = None, None
    for line in sys.stdin:
        asked = json.loads(line)
        if "run" in asked:
            # after a pause some pools of threads take 10 ms to wake: they are called until they are awake
            number, warm_until = asked["run"], time.perf_counter() + WARM_SECONDS
            while time.perf_counter() < warm_until:
                run(number := number + 1)
            taken = []
            for _ in range(TIMED):
                start = time.perf_counter()
                run(number := number + 1)
                taken.append(time.perf_counter() - start)
            answer = {"seconds": sorted(taken)[TIMED // 2]}
        else:
            try:
                weight, x = np.load(asked["weight"]), np.load(asked["x"])
                run, read = load(sys.argv[1]).build(asked["name"], weight, x, asked["threads"], asked["copies"])
                last = asked["x"] + ".y.npy"
                np.save(last, np.asarray(read(run(0)), dtype=np.float32))
                answer = {"y": last}
            except FAILURES as error:
                answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
