"""The card of a pruned model: what was done to it, by which command, and the figures as they are."""

from collections.abc import Iterable
from typing import Any

from sparsekern.oneshot import PruneReport


def model_card(
    source: str,
    command: str,
    report: PruneReport,
    calibration: str,
    perplexity: dict[str, Any] | None,
    facts: dict,
    first: Iterable[Any] = (),
) -> str:
    """The README.md of a pruned checkpoint.

    source       the model that was pruned
    command      what was typed
    calibration  which tokens, in words
    perplexity   {"before": Perplexity, "after": Perplexity} on held-out text, or None
    facts        name -> version or hash, listed as they are
    first        reports of what was done before pruning, permuted or allocated; each is named by its last line
    """
    worst = sorted(report.layers, key=lambda layer: layer.held_out_error or 0, reverse=True)[:5]
    lines = [
        "---",
        "tags: [sparsekern, pruned]",
        "---",
        f"# {source}, pruned {report.pattern}",
        "",
        f"The weights of {len(report.layers)} layers hold {report.sparsity:.2%} zeros. They are stored like any",
        "other weight, so this checkpoint loads in plain transformers, at the size and speed of the dense model. It",
        "gets faster when its layers are packed: `sparsekern.sparsify(model)`.",
        "",
        "```",
        command,
        "```",
        "",
        *(f"- first: {str(done).splitlines()[-1]}" for done in first),
        f"- method: `{report.method}`, pattern {report.pattern}",
        *([f"- weights: {report.grid}"] if report.grid else []),
        *([f"- finished: {_finished(report)}"] if report.finish else []),
        f"- calibration: {calibration}; inputs gathered by {report.calibration}",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "## Perplexity",
        "",
        *_perplexity(perplexity),
        "",
        "## Layers",
        "",
        "The relative error of a layer's output, ||X (W - W')^T|| / ||X W^T||; held out: on calibration tokens that",
        f"the method did not see. Mean held-out error {_number(report.held_out_error)}; the worst layers:",
        "",
        "| layer | sparsity | error | held-out error | damping | dead inputs |",
        "|---|---|---|---|---|---|",
        *(
            f"| {layer.name} | {layer.sparsity:.2%} | {_number(layer.error)} | {_number(layer.held_out_error)} | "
            f"{_number(layer.damping)} | {'–' if layer.dead_inputs is None else layer.dead_inputs} |"
            for layer in worst
        ),
        "",
        "Every layer is in `sparsekern.json`. Left dense:",
        "",
        *(f"- {name}: {reason}" for name, reason in report.skipped),
        "",
    ]
    return "\n".join(lines)


def _finished(report: PruneReport) -> str:
    kept = sum(block.kept for block in report.blocks)
    return f"`{report.finish}`, in place in {kept} of {len(report.blocks)} blocks, where it lowered the held-out error"


def _perplexity(perplexity: dict[str, Any] | None) -> list[str]:
    if perplexity is None:
        return ["Not measured: no held-out text was given."]
    before, after = perplexity["before"], perplexity["after"]
    return [
        f"Dense {before.value:.3f}, pruned {after.value:.3f}: {after.windows} windows of {after.seqlen} tokens, "
        f"{after.dtype}, tokens' sha256 {after.sha256}.",
        f"Protocol: {after.protocol}.",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
