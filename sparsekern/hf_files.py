"""hf_files: models and tokenizers of transformers, from a directory or the hub and back.

Only safetensors are read. What cannot be loaded is refused in one line that names it.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers.dynamic_module_utils import custom_object_save

from sparsekern.publish import publish

TOKENIZER_FILES = ("*token*", "vocab*", "*.model")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# what transformers raises on a config.json that makes no sense
BROKEN_CONFIG = (LookupError, TypeError, AttributeError, ArithmeticError, StrictDataclassError)


def quiet() -> None:
    """Turn transformers' own progress bars off."""
    transformers.utils.logging.disable_progress_bar()


def load(
    path_or_name: str | Path,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of a local directory or of the hub, in eval mode; safetensors only.

    dtype  of the weights; None keeps the checkpoint's own

    Its class is the one its config names, a causal language model when the config names none. Raises ValueError, in one
    line, when there is no such model, the network is missing, or the checkpoint does not hold every weight.
    """
    source = _source(path_or_name)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **hub)
        model, found = _model_class(config, trust_remote_code).from_pretrained(
            source, config=config, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **hub
        )
    except (*BROKEN_CONFIG, OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(_in_one_line("model", path_or_name, error)) from error
    if lost := sorted(found["missing_keys"]) + [str(key) for key in sorted(found["mismatched_keys"])]:
        # transformers would go on with random numbers in their place
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ValueError(
            f"cannot load model {str(path_or_name)!r}: its files hold no fitting weights for {lost[0]}{more}, which"
            f" {type(model).__name__} needs"
        )
    return model.eval()


def skeleton(
    path_or_name: str | Path,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model that `load` would give, without its weights: every parameter is on the meta device, in eval mode.

    dtype  of the weights; None takes what the config says, float32 when it says nothing

    Only config.json is read. What belongs to no checkpoint is there: non-persistent buffers, such as the frequencies of
    rotary embeddings, are computed and lie on the CPU, so a block runs as soon as its own parameters and persistent
    buffers are set. Tied weights are one parameter. A compressed checkpoint's skeleton is the dense model's: its layers
    are nn.Linear. Raises ValueError, in one line, when there is no such model.
    """
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(_source(path_or_name), **hub)
        named = _model_class(config, trust_remote_code)
        auto = named is transformers.AutoModelForCausalLM
        with torch.device("meta"):
            if auto:
                model = named.from_config(config, dtype=dtype or config.dtype, trust_remote_code=trust_remote_code)
            else:
                model = named._from_config(config, dtype=dtype or config.dtype)
        for name, buffer in list(model.named_non_persistent_buffers()):
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, torch.empty_like(buffer, device="cpu"))
        # on the meta device it computes nothing, so what it computes are the buffers
        model.initialize_weights()
        model.tie_weights()
    except (*BROKEN_CONFIG, OSError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(_in_one_line("model", path_or_name, error)) from error
    return model.eval()


def untrained(path_or_name: str | Path, **sizes: object) -> nn.Module:
    """A causal language model of the architecture that a checkpoint has, with random float32 weights of torch's seed.

    sizes  entries of its config to change, such as hidden_size

    Only config.json is read. Raises ValueError, in one line, when there is no such model, and for an unknown entry.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(_source(path_or_name))
        for name, value in sizes.items():
            if not hasattr(config, name):
                raise ValueError(f"{type(config).__name__} has no entry {name!r}")
            setattr(config, name, value)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (*BROKEN_CONFIG, OSError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(_in_one_line("model", path_or_name, error)) from error


def tokenizer(path_or_name: str | Path, revision: str | None = None, trust_remote_code: bool = False):
    """The tokenizer of a local directory or of the hub. Raises ValueError, in one line, when there is none."""
    source = _source(path_or_name)
    # transformers 5.0 would make an empty one up
    if not has_tokenizer(source):
        raise ValueError(f"cannot load tokenizer {str(path_or_name)!r}: the directory holds none")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise ValueError(_in_one_line("tokenizer", path_or_name, error)) from error


def has_tokenizer(path_or_name: str | Path) -> bool:
    """Whether there is one to be loaded: a local directory may hold a model of images or sound."""
    source = Path(os.path.expanduser(path_or_name))
    return not source.is_dir() or any(any(source.glob(files)) for files in TOKENIZER_FILES)


def processor_files(path_or_name: str | Path) -> dict[str, str]:
    """What a local checkpoint has to make inputs of images and sound, as name -> text; nothing of one on the hub."""
    paths = [Path(os.path.expanduser(path_or_name), name) for name in PROCESSOR_FILES]
    return {path.name: path.read_text(encoding="utf-8") for path in paths if path.is_file()}


def save(model: nn.Module, tokenizer, directory: str | Path, files: Mapping[str, str]) -> None:
    """Write a checkpoint that plain transformers loads; zeros are stored like any weight.

    tokenizer  or processor, saved beside the model; None for none
    files      name -> text, written beside them: README.md is the model's card

    The directory appears by one rename, synced, complete or not at all. Raises FileExistsError when it exists already,
    and ValueError for a model whose weights were packed or quantised when it was loaded.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "model was loaded with packed weights; model.dequantize() first, or save it with sparsekern.save"
        )
    with publish(directory) as unfinished:
        model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        for name, content in files.items():
            (unfinished / name).write_text(content, encoding="utf-8")


def write_config(model: nn.Module, directory: Path) -> bool:
    """Write what save_pretrained writes beside the weights of a transformers model: configs, and its own code.

    Returns False, and writes nothing, for any other model.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return False
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    if model._auto_class is not None:
        custom_object_save(model, directory, config=model.config)
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    return True


def fingerprint(directory: str | Path) -> dict[str, str]:
    """The sha256 of each file of a local checkpoint that decides what it computes, by file name.

    Raises ValueError when the directory holds no safetensors.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{str(directory)!r} holds no safetensors")
    files += [path for name in ("config.json", "tokenizer.json") if (path := Path(directory, name)).is_file()]
    digests = {}
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
        digests[path.name] = digest.hexdigest()
    return digests


def _source(path_or_name: str | Path) -> str:
    """Raises ValueError for what can only be a directory and is none."""
    source = os.path.expanduser(path_or_name)
    if os.path.isdir(source):
        if not os.path.isfile(os.path.join(source, "config.json")):
            raise ValueError(f"{source!r} is not a checkpoint: it holds no config.json")
    elif os.path.exists(source):
        raise ValueError(f"{source!r} is a file; give the checkpoint's directory")
    elif isinstance(path_or_name, Path) or source.startswith((".", "/")) or source.count("/") > 1 or not source:
        raise ValueError(f"no such directory: {source!r}")
    return source


def _model_class(config: transformers.PretrainedConfig, trust_remote_code: bool):
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    for name in () if remote else config.architectures or ():
        if named := getattr(transformers, name, None):
            return named
    return transformers.AutoModelForCausalLM


def _in_one_line(what: str, path_or_name: str | Path, error: Exception) -> str:
    remedy = "" if os.path.isdir(path_or_name) else "; give a local directory, or check the name and the network"
    reason = " ".join(str(error).split())
    return f"cannot load {what} {str(path_or_name)!r}: {reason.split('. ')[0].rstrip('.')}{remedy}"
