"""Load a language model and its tokenizer: the embedded one, a folder, a GGUF file, or a name on the hub.

A model's files are data from a stranger. They never choose how attention runs (CVE-2026-4372 was exactly
that), pickles and Python code among them are refused unless the caller allows them, and whatever is wrong
with them ends in one `ModelError` that names the file.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokenselect.embedded import (
    EMBEDDED,
    ModelError,
    converted_gguf,
    embedded_model_path,
    first_line,
    quiet_transformers,
)
from tokenselect.hardware import half_is_slow, pack_weights
from tokenselect.memory import available_memory

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EMBEDDED", "LoadedModel", "ModelError", "embedded_model_path", "load_model"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors")
# What the caller or Transformers decides, never a model's files.
_HOST_KEYS = re.compile(
    r"_?(attn|attention|experts)_implementation\w*|_?tokenselect\w*|fusion_config|kernel_config|use_kernels"
    r"|distributed_config|transformers_weights"
)
_NOT_A_DECODER = re.compile(r"MaskedLM|Classification|QuestionAnswering|MultipleChoice|PreTraining$")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run: in eval mode, without gradients, on its device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    trained_window: int


@dataclass(frozen=True, slots=True)
class _Source:
    """A local folder with a model, what the caller calls it, and what its files are allowed to do."""

    name: str
    folder: Path
    allow_pickle: bool
    trust_remote_code: bool

    @property
    def permissions(self) -> dict[str, bool]:
        # Trusted code may refer to another repository; nothing else has a reason to reach for the network.
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": not self.trust_remote_code}


def load_model(
    model: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load a decoder language model and its tokenizer.

    Args:
        model: None or "smollm2" for the embedded model, a folder, a path ending in ``.gguf``, or a name on
            the Hugging Face hub (needs the network or a filled hub cache; HF_HUB_OFFLINE is honoured).
        dtype: "float32", "bfloat16", "float16", or "auto": float32 if the checkpoint is, or if the CPU computes
            half precision slowly and there is room; else bfloat16.
        device: a torch device, such as "cpu" or "cuda:0".
        allow_pickle: also load weights that exist only as pickles (``.bin``).
        trust_remote_code: run Python code that comes with the model.
        progress: called with one sentence when something slow starts: a conversion or a download.

    Returns:
        The model in eval mode without gradients, its attention "sdpa" ("eager" where it has no other),
        whatever its files say; every weight comes from the checkpoint, none is random. `trained_window` is
        positive, in tokens.

    Raises:
        ModelError: one sentence that names what is wrong and what to do.
    """
    _check_choices(dtype, device)
    try:
        name, folder = _find(model, allow_pickle, trust_remote_code, progress or (lambda message: None))
        return _load(_Source(name, folder, allow_pickle, trust_remote_code), dtype, device)
    except OSError as error:  # no permission, a name too long, a disk that fails
        raise ModelError(f"cannot read {model}: {error.strerror or first_line(error)}") from error


def _load(source: _Source, dtype: str, device: str) -> LoadedModel:
    with quiet_transformers():
        config = _read_config(source)
        window = _trained_window(config, source)
        _check_weight_files(source)
        tokenizer = _read_tokenizer(source)
        model = _read_weights(source, config, _pick_dtype(dtype, config, source, torch.device(device)))
    try:
        model.to(torch.device(device))
        pack_weights(model)
    except RuntimeError as error:  # not enough memory, above all
        raise ModelError(f"{source.name} cannot be put on {device}: {first_line(error)}") from error
    return LoadedModel(model.eval().requires_grad_(False), tokenizer, source.name, window)


def _check_choices(dtype: str, device: str) -> None:
    if dtype != "auto" and dtype not in _DTYPES:
        raise ModelError(f"dtype must be one of auto, {', '.join(_DTYPES)}, got {dtype!r}")
    try:
        torch.empty(1, device=device)
    except Exception as error:  # each device has its own way to be absent
        raise ModelError(f"device {device!r} cannot be used: {first_line(error)}") from error


def _find(
    model: str | Path | None, allow_pickle: bool, trust_remote_code: bool, progress: Callable[[str], None]
) -> tuple[str, Path]:
    """What the caller calls the model, and the local folder that holds it."""
    if model is None or model == EMBEDDED:
        return EMBEDDED, embedded_model_path(progress)
    path = Path(os.path.expanduser(model))  # Path.expanduser raises on an unknown user
    if str(model) and path.is_dir():
        return str(model), path
    if path.suffix.lower() == ".gguf" and path.is_file():
        return str(model), converted_gguf(path, progress)
    if path.exists() and str(model):
        raise ModelError(f"{model} is a file, but a model is a folder or a .gguf file")
    if isinstance(model, Path) or path.suffix.lower() == ".gguf" or not _HUB_NAME.fullmatch(model):
        raise ModelError(f"there is no model folder or .gguf file {str(model)!r}; check the path")
    return model, _download(model, allow_pickle, trust_remote_code, progress)


def _download(name: str, allow_pickle: bool, trust_remote_code: bool, progress: Callable[[str], None]) -> Path:
    """A snapshot of a hub repository, so that its files pass the same checks as a local folder's."""
    from huggingface_hub import snapshot_download

    progress(f"Fetching {name} from the Hugging Face hub, or from its cache.")
    patterns = [*_HUB_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if allow_pickle and not _present(folder, _SAFE_WEIGHTS):
            folder = Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin"]))
    except Exception as error:  # network, authorisation, cache: the hub's client has an error for each
        raise ModelError(
            f"{name!r} is no local folder and cannot be fetched from the Hugging Face hub"
            f" ({first_line(error)}); check name and network, or pass the folder of a model that you have"
        ) from error
    return folder


def _present(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({first_line(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(content).__name__}; fetch it again")
    return content


def _read_config(source: _Source) -> PreTrainedConfig:
    """The model's configuration without any say in how it is run."""
    path = source.folder / "config.json"
    if not path.is_file():
        ggufs = sorted(source.folder.glob("*.gguf"))
        hint = f"pass the file {ggufs[0]}" if ggufs else "pass the folder that save_pretrained wrote"
        raise ModelError(f"{source.folder} has no config.json, so it is not a model folder; {hint}")
    _read_json(path)
    try:
        config = AutoConfig.from_pretrained(source.folder, **source.permissions)
    except Exception as error:  # a stranger's values can make a configuration fail in any way
        raise _refused(source, f"{path} is not a usable model configuration", error) from error
    _check_architecture(config, source)
    _strip_host_settings(config)
    return config


def _refused(source: _Source, what: str, error: Exception) -> ModelError:
    if "trust_remote_code" in str(error) and not source.trust_remote_code:
        return ModelError(
            f"{source.name} needs Python code that comes with it; read that code, and if you trust it pass"
            " trust_remote_code=True (--trust-remote-code)"
        )
    return ModelError(f"{what}: {first_line(error)}")


def _check_architecture(config: PreTrainedConfig, source: _Source) -> None:
    names = [str(name) for name in getattr(config, "architectures", None) or ()]
    kind = ", ".join(names) or type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source.name} is an encoder-decoder model ({kind}); pass a decoder language model")
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or has_code
    if not known or (names and all(_NOT_A_DECODER.search(name) for name in names)):
        raise ModelError(f"{source.name} is no language model ({kind}); pass a decoder language model")


def _strip_host_settings(config: PreTrainedConfig) -> None:
    """Forget every key by which a config file could choose kernels, attention or our own settings."""
    config._attn_implementation = "sdpa"
    config._experts_implementation = None
    config.output_attentions = False
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _strip_host_settings(value)
        elif _HOST_KEYS.fullmatch(key) and not key.endswith("_internal"):
            delattr(config, key)
        else:
            _strip_nested(value)


def _strip_nested(value: object) -> None:
    if isinstance(value, dict):
        for key in [key for key in value if isinstance(key, str) and _HOST_KEYS.fullmatch(key)]:
            del value[key]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _strip_nested(item)


def _trained_window(config: PreTrainedConfig, source: _Source) -> int:
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(window, bool) or not isinstance(window, int) or window <= 0:
        raise ModelError(
            f"{source.folder / 'config.json'} does not tell the trained window of {source.name}:"
            f" max_position_embeddings must be a positive number, got {window!r}"
        )
    return window


def _check_weight_files(source: _Source) -> None:
    """Every weight file is there, is whole, and is no pickle unless pickles are allowed."""
    folder = source.folder
    if _present(folder, _SAFE_WEIGHTS):
        for path in _safetensors(folder):
            _check_safetensors(path)
    elif not (source.allow_pickle and _present(folder, _PICKLED_WEIGHTS)):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        if pickles and not source.allow_pickle:
            raise ModelError(
                f"the weights in {folder} are pickles ({pickles[0]}), which can run code; convert them to"
                " safetensors, or if you trust them pass allow_pickle=True (--allow-pickle)"
            )
        raise ModelError(f"{folder} has no weights: no model.safetensors; fetch the model again")


def _safetensors(folder: Path) -> list[Path]:
    """The files that Transformers will read; an index may name nothing but safetensors of its own folder."""
    if (folder / _SAFE_WEIGHTS[0]).is_file():
        return [folder / _SAFE_WEIGHTS[0]]
    index = folder / _SAFE_WEIGHTS[1]
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index} has no weight_map; fetch the model again")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index} names {shard!r}, which is no .safetensors file of that folder; do not use it")
    return [folder / shard for shard in sorted(set(shards.values()))]


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is missing or damaged ({first_line(error)}); fetch it again") from error


def _read_tokenizer(source: _Source) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.folder, **source.permissions)
    except Exception as error:  # as for the configuration
        raise _refused(source, f"{source.folder} has no usable tokenizer", error) from error
    return tokenizer


def _pick_dtype(dtype: str, config: PreTrainedConfig, source: _Source, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return _DTYPES[dtype]
    stored = config.get_text_config().dtype or config.dtype or _stored_dtype(source.folder)
    is_single = stored in (torch.float32, torch.float64, "float32", "F32")
    return torch.float32 if is_single or _better_in_float32(source, device) else torch.bfloat16


def _better_in_float32(source: _Source, device: torch.device) -> bool:
    """Several times faster there (docs/experiments.md), if twice the weights leave half of the memory for the rest."""
    if not half_is_slow(device) or not _present(source.folder, _SAFE_WEIGHTS):
        return False
    stored = sum(path.stat().st_size for path in _safetensors(source.folder))
    return 2 * stored <= available_memory(device) / 2


def _stored_dtype(folder: Path) -> str | None:
    """Safetensors' name for the type of the first tensor; None for pickles."""
    if not _present(folder, _SAFE_WEIGHTS):
        return None
    with safe_open(_safetensors(folder)[0], framework="pt") as file:
        return str(file.get_slice(next(iter(file.keys()))).get_dtype())


def _read_weights(source: _Source, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, info = _load_weights(source, config, dtype)
    except Exception as error:  # as for the configuration
        raise _refused(source, f"the weights in {source.folder} cannot be loaded", error) from error
    # Transformers fills what a checkpoint lacks with random numbers.
    if missing := info["missing_keys"]:
        raise ModelError(
            f"the weights in {source.folder} lack {min(missing)} ({len(missing)} in all); fetch them again"
        )
    _strip_generation_settings(model)
    configs = [getattr(module, "config", None) for module in model.modules()]
    chosen = {config._attn_implementation for config in configs if isinstance(config, PreTrainedConfig)}
    if odd := chosen - {"sdpa", "eager"}:
        raise ModelError(f"{source.name} chose its own attention ({odd.pop()}), which a model must not do")
    return model


def _strip_generation_settings(model: PreTrainedModel) -> None:
    """generation_config.json could choose a cache and ask for attention weights, which only "eager" has."""
    if (generation := model.generation_config) is not None:
        generation.cache_implementation = None
        generation.output_attentions = False


def _load_weights(
    source: _Source, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    def load(attention: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=None if source.allow_pickle else True,
            output_loading_info=True,
            **source.permissions,
        )
        return loaded

    try:
        return load("sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return load("eager")
