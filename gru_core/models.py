"""Load, build and save causal language models and their tokenizers. Weights are safetensors, code is never
downloaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from gru_core.config import ModelConfig, PrepareConfig
from gru_core.errors import InputError

MAX_LENGTH = 2048
"""Longest row, tokens, where the model allows more."""


def _is_folder(path: str) -> bool:
    """Whether ``path`` means a local folder and not a hub id."""
    looks = path.count("/") != 1 or path.startswith((".", "/", "~")) or path.endswith((".json", ".safetensors"))
    return looks or Path(path).expanduser().exists()


def _existing_folder(path: str, what: str) -> Path | None:
    """The local folder that ``path`` means, None for a hub id; InputError where there is no such folder."""
    if not _is_folder(path):
        return None
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"{what}: there is no folder {path!r} (and it is no hub id of the form owner/name)")
    return folder


def check_model_folder(path: str, what: str = "model.path") -> None:
    """Refuse a local folder that cannot be a model; a hub id passes.

    Raises:
        InputError: the folder is missing, or lacks config or safetensors weights.
    """
    folder = _existing_folder(path, what)
    if folder is None:
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"{what}: folder {path!r} has no config.json, so it holds no Hugging Face model")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{what}: folder {path!r} has no *.safetensors weights (pickled weights are not read)")


def check_tokenizer_folder(path: str, what: str = "model.path") -> None:
    """Refuse a local folder without a tokenizer; a hub id passes.

    Raises:
        InputError: the folder is missing, or lacks a tokenizer.
    """
    folder = _existing_folder(path, what)
    if folder is not None and not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise InputError(f"{what}: folder {path!r} has no tokenizer (tokenizer.json)")


def check_model(path: str, what: str = "model.path", tokenizer: str | None = None) -> None:
    """Refuse a model that cannot be had, before anything expensive; reads no weights.

    Args:
        tokenizer: ``model.tokenizer``; None: the model's folder must have one.

    Raises:
        InputError: as :func:`check_model_folder` and :func:`check_tokenizer_folder`; for a hub id, that its config
            cannot be fetched.
    """
    check_model_folder(path, what)
    check_tokenizer_folder(tokenizer or path, "model.tokenizer" if tokenizer else what)
    if _is_folder(path):
        return
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{what}: cannot load {path!r} from the hub: {_first_line(error)}") from error


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """The type that forward and backward compute in."""
    return torch.float32 if config.dtype == "float32" else torch.bfloat16


def weight_dtype(config: ModelConfig) -> torch.dtype:
    """The type that the model's weights are stored in, and with them gradients and optimizer state.

    Frozen weights under adapters have no small updates to lose, so bf16 is enough for them; adapters are float32.
    """
    frozen = config.lora is not None and config.dtype == "bfloat16"
    return torch.bfloat16 if config.dtype == "pure_bfloat16" or frozen else torch.float32


def load_model(path: str, config: ModelConfig, what: str = "model.path") -> nn.Module:
    """A causal LM from a local folder or the hub, on the CPU, in the dtype that ``config`` stores.

    Raises:
        InputError: no such folder or hub id, no safetensors weights, or not a causal LM.
    """
    from transformers import AutoModelForCausalLM

    check_model_folder(path, what)
    if config.dtype == "pure_bfloat16":
        warnings.warn("model.dtype pure_bfloat16: small updates are lost to rounding", stacklevel=2)
    source = str(Path(path).expanduser()) if _is_folder(path) else path
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=weight_dtype(config),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=_is_folder(path),
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{what}: cannot load {path!r}: {_first_line(error)}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise InputError(f"{what}: {path!r} lacks {len(missing)} of the model's tensors, such as {missing[0]!r}")
    return model


def load_tokenizer(path: str, what: str = "model.path") -> Any:
    """The tokenizer beside a model, with a padding token.

    Raises:
        InputError: it cannot be loaded, or has neither padding nor end-of-sequence token.
    """
    from transformers import AutoTokenizer

    check_tokenizer_folder(path, what)
    source = str(Path(path).expanduser()) if _is_folder(path) else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=_is_folder(path))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{what}: cannot load the tokenizer of {path!r}: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"{what}: the tokenizer of {path!r} has neither padding nor end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked out everywhere, so any token serves
    return tokenizer


def tokenizer_of(path: str, config: ModelConfig, what: str = "model.path") -> Any:
    """As :func:`load_tokenizer`, of ``config.tokenizer`` where that is set, else of the one beside the model."""
    return load_tokenizer(config.tokenizer, "model.tokenizer") if config.tokenizer else load_tokenizer(path, what)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def max_length(model: nn.Module) -> int:
    """Longest row that the model takes, tokens."""
    return max_length_of(model.config)


def max_length_of(settings: Any) -> int:
    """The same, of a model's settings (its ``config.json``)."""
    limit = getattr(settings, "max_position_embeddings", None) or MAX_LENGTH
    return min(int(limit), MAX_LENGTH)


def load_settings(path: str, what: str = "model.path") -> Any:
    """A model's settings (``config.json``) without its weights.

    Raises:
        InputError: they cannot be read.
    """
    from transformers import AutoConfig

    local = _is_folder(path)
    try:
        source = str(Path(path).expanduser()) if local else path
        return AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    except (OSError, ValueError) as error:
        raise InputError(f"{what}: cannot load {path!r}: {_first_line(error)}") from error


def local_folder(path: str, what: str = "model.path") -> Path:
    """The folder of a model; one on the hub is downloaded: settings, tokenizer and safetensors, nothing else.

    Raises:
        InputError: it cannot be had.
    """
    check_model_folder(path, what)
    if _is_folder(path):
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                path, allow_patterns=["*.json", "model*.safetensors", "*.model", "*.txt"], ignore_patterns=["*/*"]
            )
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{what}: cannot load {path!r} from the hub: {_first_line(error)}") from error


def set_dropout(model: nn.Module, active: bool) -> None:
    """Train mode, with every dropout off unless ``active``: rows then have one loss, and runs one result."""
    model.train(active)


def build_tokenizer(texts: Iterable[str], config: PrepareConfig) -> Any:
    """A tokenizer trained on ``texts``: whole words and punctuation, or byte-level BPE.

    Returns:
        A fast tokenizer with ``<pad>``, ``<unk>``, ``<s>`` and ``</s>``, without a chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<unk>", "<s>", "</s>"]
    if config.tokenizer == "word":
        inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
        inner.decoder = decoders.Metaspace()
        trainer: Any = trainers.WordLevelTrainer(vocab_size=config.vocab_size, special_tokens=specials)
    else:
        inner = Tokenizer(models.BPE(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, special_tokens=specials, initial_alphabet=alphabet)
    inner.train_from_iterator(list(texts), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_small(tokenizer: Any, config: PrepareConfig, seed: int, positions: int = 512) -> nn.Module:
    """A small Llama with random weights, the same for a given seed; the global RNG is left as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.hidden, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.heads, intermediate_size=config.intermediate,
        max_position_embeddings=positions, tie_word_embeddings=True, attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(shape)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """A Hugging Face folder: safetensors weights, config, tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pack_weights(model: Any) -> tuple[str, dict[str, Any]]:
    """Config JSON and weights as NumPy arrays, to share through an object store without copies.

    Tied tensors appear under each of their names; bf16 travels as its int16 bits.
    """
    arrays = {
        name: (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).detach().cpu().numpy()
        for name, t in model.state_dict().items()
    }
    generation = model.generation_config.to_dict() if model.generation_config is not None else None
    shape = model.config.to_dict() | {"_class": type(model).__name__, "_generation": generation}
    return json.dumps(shape), arrays


def unpack_weights(packed: tuple[str, dict[str, Any]], config: ModelConfig) -> nn.Module:
    """The model behind :func:`pack_weights`, with weights of its own."""
    import transformers

    shape = json.loads(packed[0])
    name, generation = shape.pop("_class"), shape.pop("_generation")
    kind = getattr(transformers, name)
    # Built without initialisation: every weight is overwritten below, and the global RNG is not consumed.
    with torch.random.fork_rng():
        settings = kind.config_class.from_dict(shape)
        model = kind._from_config(settings, dtype=weight_dtype(config))
    dtype = weight_dtype(config)
    weights = {}
    for key, array in packed[1].items():
        tensor = torch.from_numpy(array.copy())
        weights[key] = (
            tensor.view(torch.bfloat16) if dtype == torch.bfloat16 and tensor.dtype == torch.int16 else tensor
        )
    model.load_state_dict(weights)
    if generation is not None:  # its end-of-turn tokens end a generation
        model.generation_config = transformers.GenerationConfig.from_dict(generation)
    return model
