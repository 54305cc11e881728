"""train_demo_model: train the small Llama that ships in sparsekern/demo_model, from nothing but Python itself.

The corpus is the standard library of the running interpreter. Whole files are held out before anything is learned:
neither the tokenizer nor the model sees them. Every step is a function of the seed and of `--steps`:

    files -> byte-level BPE -> one token stream, files separated by <|endoftext|> -> random windows -> AdamW

The learning rate warms up, stays, and falls to zero along a half cosine (warmup, stable, decay), so that a run cut
short and started again with fewer `--steps` is the same run as one that had fewer steps from the beginning.

The shipped model (half an hour on two cores):  python bench/train_demo_model.py --out DIR --steps 4000
See that the script works (seconds):            python bench/train_demo_model.py --out DIR --tiny
"""

import argparse
import hashlib
import json
import math
import platform
import re
import sysconfig
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"
# not prose or code: tables, fixtures in other encodings, and the build's own paths
EXCLUDED = re.compile(
    r"(^|/)(site-packages|__pycache__|encodings|pydoc_data|_sysconfigdata[^/]*|config-[^/]*|cjkencodings"
    r"|encoded_modules|lib2to3/tests/data|test/crashers|bad_?[^/]*\.py|badsyntax[^/]*\.py)(/|$|\.)"
)
# two texts overlap where this many non-blank lines in a row are the same
SHINGLE_LINES = 5


@dataclass(frozen=True)
class Recipe:
    """All that decides what is trained, apart from the number of steps and the seed.

    `window` is in tokens, `batch` in windows.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    max_position: int = 1024
    window: int = 512
    batch: int = 8
    peak_lr: float = 3e-3
    warmup_steps: int = 100
    decay_fraction: float = 0.15
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    evaluate_every: int = 100
    max_files: int | None = None
    heldout_bytes: int = 260_000
    calibration_bytes: int = 500_000
    # one long file must not be most of a text
    longest_sample_bytes: int = 40_000


TINY = Recipe(
    vocab_size=384,
    hidden_size=64,
    intermediate_size=128,
    layers=1,
    window=64,
    batch=4,
    warmup_steps=2,
    evaluate_every=4,
    max_files=40,
    heldout_bytes=8_000,
    calibration_bytes=12_000,
    longest_sample_bytes=10_000,
)


def is_source(text: str) -> bool:
    """Whether a file is prose and code rather than a table, a fixture or a stub."""
    visible = len(re.findall(r"\S", text))
    letters = len(re.findall(r"[A-Za-z_]", text))
    return len(text) >= 200 and letters >= 0.55 * visible and len(text.encode()) <= 1.02 * len(text)


def read_corpus(max_files: int | None) -> dict[str, str]:
    """Return {path relative to the standard library: text}, sorted by path, without repeated contents."""
    root = Path(sysconfig.get_paths()["stdlib"])
    corpus, seen = {}, set()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if EXCLUDED.search(name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not is_source(text) or text in seen or SEPARATOR in text:
            continue
        seen.add(text)
        corpus[name] = text
        if len(corpus) == max_files:
            break
    return corpus


def sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def shingles(text: str) -> set[int]:
    """Hashes of every run of SHINGLE_LINES non-blank lines."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return {hash(tuple(lines[i : i + SHINGLE_LINES])) for i in range(len(lines) - SHINGLE_LINES + 1)}


def take(names: list[str], salt: str, corpus: dict[str, str], recipe: Recipe, total_bytes: int, wanted) -> list[str]:
    """Files in the order of sha256(salt + path), as far as `wanted`, until `total_bytes` are reached."""
    taken, size = [], 0
    for name in sorted(names, key=lambda name: sha256(salt + name)):
        file_bytes = len(corpus[name].encode())
        if size >= total_bytes:
            break
        if file_bytes <= recipe.longest_sample_bytes and wanted(name):
            taken.append(name)
            size += file_bytes
    return sorted(taken)


def split_corpus(corpus: dict[str, str], recipe: Recipe) -> tuple[list[str], list[str], list[str]]:
    """Return the names of the training, held-out and calibration files; calibration is part of training.

    A held-out file shares at most 2 % of its shingles with all other files together (a licence header), and a
    calibration file shares none with any held-out file.
    """
    runs = {name: shingles(text) for name, text in corpus.items()}
    files_with = Counter(run for file_runs in runs.values() for run in file_runs)

    def is_new(name: str) -> bool:
        repeated = sum(files_with[run] > 1 for run in runs[name])
        return len(runs[name]) >= 20 and repeated <= 0.02 * len(runs[name])

    heldout = take(list(corpus), "heldout:", corpus, recipe, recipe.heldout_bytes, is_new)
    train = [name for name in corpus if name not in set(heldout)]
    heldout_runs = set().union(*(runs[name] for name in heldout))

    def is_apart(name: str) -> bool:
        return not runs[name] & heldout_runs

    calibration = take(train, "calibration:", corpus, recipe, recipe.calibration_bytes, is_apart)
    return train, heldout, calibration


def join(names: list[str], corpus: dict[str, str]) -> str:
    """The files as one text; the tokenizer reads the written separator as its own token."""
    return "".join(SEPARATOR + corpus[name] for name in names)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, names: list[str], corpus: dict[str, str]) -> Tensor:
    """Token stream [tokens] int32 of the files, a separator before each."""
    ids = []
    for encoding in tokenizer.backend_tokenizer.encode_batch([SEPARATOR + corpus[name] for name in names]):
        ids.extend(encoding.ids)
    return torch.tensor(ids, dtype=torch.int32)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.max_position,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def window_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of ids [windows, window], each window on its own."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten().long())


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, stream: Tensor, window: int, windows_at_once: int = 8) -> float:
    """exp of the mean loss over consecutive windows of stream [tokens]; the rest that fills no window is left out."""
    windows = stream[: len(stream) // window * window].view(-1, window)
    nats = sum(window_loss(model, part).item() * len(part) for part in windows.split(windows_at_once))
    return math.exp(nats / len(windows))


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warmup, then constant, then a half cosine to zero over the last `decay_fraction` of the steps."""
    decay_start = round(steps * (1 - recipe.decay_fraction))
    if step < recipe.warmup_steps:
        return recipe.peak_lr * (step + 1) / recipe.warmup_steps
    if step < decay_start:
        return recipe.peak_lr
    return recipe.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - decay_start + 1) / (steps - decay_start)))


def draw_batch(stream: Tensor, recipe: Recipe, seed: int, step: int) -> Tensor:
    """Windows [batch, window + 1] of stream [tokens] at random places that depend on the seed and the step only."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - recipe.window - 1, (recipe.batch,), generator=generator)
    return stream[starts[:, None] + torch.arange(recipe.window + 1)].long()


@dataclass
class Run:
    """A model in training, with what is needed to stop and go on."""

    model: LlamaForCausalLM
    optimizer: torch.optim.Optimizer
    step: int = 0
    curve: list[dict] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "curve": self.curve, "seconds": self.seconds}
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.curve, self.seconds = state["step"], state["curve"], state["seconds"]


def start(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> Run:
    model = build_model(recipe, tokenizer, seed)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return Run(model, torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True))


def advance(run: Run, stream: Tensor, recipe: Recipe, steps: int, seed: int, loss_of) -> float:
    """One optimizer step, in bfloat16 autocast over float32 weights; returns the loss before it."""
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, steps, recipe)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(run.model, draw_batch(stream, recipe, seed, run.step))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return loss.item()


def train(run: Run, stream: Tensor, heldout: Tensor, recipe: Recipe, args: argparse.Namespace, loss_of) -> None:
    began = time.monotonic() - run.seconds
    recent = []
    while run.step < args.steps:
        recent.append(advance(run, stream, recipe, args.steps, args.seed, loss_of))
        if run.step % recipe.evaluate_every and run.step != args.steps:
            continue
        with torch.autocast("cpu", torch.bfloat16):
            heldout_perplexity = perplexity(run.model, heldout, recipe.window)
        run.seconds = time.monotonic() - began
        row = {
            "step": run.step,
            "tokens": run.step * recipe.batch * recipe.window,
            "train_perplexity": round(math.exp(sum(recent) / len(recent)), 3),
            "heldout_perplexity": round(heldout_perplexity, 3),
        }
        recent.clear()
        run.curve.append(row)
        print(json.dumps(row | {"seconds": round(run.seconds)}), flush=True)
        if args.checkpoint:
            run.save(args.checkpoint)


def steps_that_fit(recipe: Recipe, run: Run, stream: Tensor, minutes: float, loss_of) -> int:
    """How many steps take `minutes` here and now; the answer is printed so that it can be passed as --steps."""
    for _ in range(4):
        advance(run, stream, recipe, 10_000, 0, loss_of)
    began = time.monotonic()
    for _ in range(20):
        advance(run, stream, recipe, 10_000, 0, loss_of)
    return max(1, round(minutes * 60 * 20 / (time.monotonic() - began) / 100)) * 100


def export(out: Path, run: Run, tokenizer, corpus, parts, heldout: Tensor, recipe: Recipe, args) -> None:
    """Write the model as bfloat16, the tokenizer, the two texts and training.json."""
    train_names, heldout_names, calibration_names = parts
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.model_max_length = recipe.max_position
    tokenizer.save_pretrained(out)
    run.model.to(torch.bfloat16).save_pretrained(out)
    texts = {"calibration.txt": join(calibration_names, corpus), "heldout.txt": join(heldout_names, corpus)}
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")

    shipped = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    corpus_list = "".join(f"{sha256(text)}  {name}\n" for name, text in corpus.items())
    facts = {
        "heldout_perplexity": round(perplexity(shipped, heldout, recipe.window), 4),
        "heldout_protocol": (
            f"heldout.txt as one token stream; consecutive windows of {recipe.window} tokens, each on its own,"
            " its first token not predicted, the rest at the end left out; exp of the mean loss;"
            " bfloat16 weights, float32 arithmetic"
        ),
        "heldout_windows": len(heldout) // recipe.window,
        "window": recipe.window,
        "steps": run.step,
        "tokens": run.step * recipe.batch * recipe.window,
        "seed": args.seed,
        "threads": args.threads,
        "seconds": round(run.seconds),
        "recipe": asdict(recipe),
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "sha256": {"corpus_list": sha256(corpus_list)}
        | {name: sha256((out / name).read_bytes()) for name in ("model.safetensors", "tokenizer.json", *texts)},
        "corpus_files": len(corpus),
        "corpus_bytes": sum(len(text.encode()) for text in corpus.values()),
        "train_files": len(train_names),
        "heldout_files": heldout_names,
        "calibration_files": calibration_names,
        "curve": run.curve,
    }
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps({"heldout_perplexity": facts["heldout_perplexity"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, help="optimizer steps; the schedule depends on nothing else")
    parser.add_argument("--minutes", type=float, help="instead of --steps: measure, and take the steps that fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="file to write at every evaluation, and to go on from")
    parser.add_argument("--tiny", action="store_true", help="a toy of a few seconds, to see that the script works")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = TINY if args.tiny else Recipe()

    corpus = read_corpus(recipe.max_files)
    parts = train_names, heldout_names, _ = split_corpus(corpus, recipe)
    tokenizer = train_tokenizer([corpus[name] for name in train_names], recipe.vocab_size)
    stream, heldout = encode(tokenizer, train_names, corpus), encode(tokenizer, heldout_names, corpus)
    print(f"{len(corpus)} files, {len(stream)} training tokens, {len(heldout)} held-out tokens", flush=True)

    loss_of = window_loss if args.tiny else torch.compile(window_loss)
    if args.steps is None:
        trial = start(recipe, tokenizer, args.seed)
        args.steps = 8 if args.tiny else steps_that_fit(recipe, trial, stream, args.minutes or 50.0, loss_of)
    print(f"--steps {args.steps} --seed {args.seed}", flush=True)
    run = start(recipe, tokenizer, args.seed)
    if args.checkpoint and args.checkpoint.exists():
        run.restore(args.checkpoint)
    train(run, stream, heldout, recipe, args, loss_of)
    export(args.out, run, tokenizer, corpus, parts, heldout, recipe, args)


if __name__ == "__main__":
    main()
