"""The embedded model as GGUF files for llama.cpp: the very weights that Transformers runs, in bf16 and in Q8_0."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from safetensors.torch import load_file
from torch import Tensor

from tokenselect.embedded import _packaged_gguf, embedded_model_path

FOLDER = Path(__file__).parents[1] / "build" / "llama"
WEIGHTS = {"bf16": GGMLQuantizationType.BF16, "q8_0": GGMLQuantizationType.Q8_0}
_FILE_TYPES = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
_OWN_FIELDS = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type")
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_file(weights: str) -> Path:
    """The file with these weights (a key of `WEIGHTS`), written on first use."""
    source = embedded_model_path()
    path = FOLDER / f"{source.name}-{weights}.gguf"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".part")
        _write(scratch, load_file(source / "model.safetensors"), weights)
        scratch.rename(path)
    return path


def _write(path: Path, tensors: dict[str, Tensor], weights: str) -> None:
    """Tokenizer, settings and the list of tensors are those of the file that the embedded model was made from."""
    original = GGUFReader(_packaged_gguf())
    writer = GGUFWriter(path, str(_contents(original, "general.architecture")))
    for name, field in original.fields.items():
        if name not in _OWN_FIELDS:
            inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(_FILE_TYPES[weights])
    heads = {part: int(_contents(original, f"llama.attention.{part}")) for part in ("head_count", "head_count_kv")}  # type: ignore[call-overload]
    arrange: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "attn_q": lambda rows: _interleaved(rows, heads["head_count"]),
        "attn_k": lambda rows: _interleaved(rows, heads["head_count_kv"]),
    }
    for tensor in original.tensors:
        kind = re.sub(r"^blk\.\d+\.|\.weight$", "", tensor.name)
        rows = arrange.get(kind, np.asarray)(tensors[_hf_name(tensor.name)].float().numpy())
        # llama.cpp keeps vectors in float32
        kept = GGMLQuantizationType.F32 if rows.ndim == 1 else WEIGHTS[weights]
        writer.add_tensor(tensor.name, gguf.quantize(rows, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _contents(reader: GGUFReader, name: str) -> object:
    field = reader.get_field(name)
    assert field is not None
    return field.contents()


def _hf_name(name: str) -> str:
    layer = re.match(r"blk\.(\d+)\.", name)
    kind = re.sub(r"^blk\.\d+\.|\.weight$", "", name)
    return f"{f'model.layers.{layer[1]}.' if layer else ''}{_NAMES[kind]}.weight"


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Dimension pairs (0, d/2), (1, d/2 + 1), ... as (0, 1), (2, 3), ...: llama.cpp rotates neighbours."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in WEIGHTS:
        print(gguf_file(name))
