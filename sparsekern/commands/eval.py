"""sparsekern eval: the perplexity of a checkpoint."""

from typing import Annotated

import typer

from sparsekern import hf
from sparsekern.commands.arguments import AsJson, Dtype, Model, Seqlen, load, tokens_of, window
from sparsekern.commands.output import measured_perplexity, print_result

EXAMPLE = "`sparsekern eval OUT --text heldout.txt`"


def command(
    model: Model,
    text_source: Annotated[
        str,
        typer.Option(
            "--text", help="text.txt, data.jsonl, data.parquet[:column], or dataset name[:config[:split[:column]]]"
        ),
    ],
    seqlen: Seqlen = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
):
    """The perplexity of MODEL on a text, by the protocol that the papers compare by."""
    tokens, source = tokens_of(hf.tokenizer(model), text_source), load(model, dtype)
    result = measured_perplexity(source, tokens, window(source, seqlen), "perplexity")
    lines = [f"perplexity {result}", f"protocol: {result.protocol}"]
    print_result({"model": model, **result.to_json()}, as_json, lambda _: lines)
