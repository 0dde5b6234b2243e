"""The paper's tables beside what was reproduced of them, and the command that reproduces each where the weights are."""

from __future__ import annotations

from benchmarks.performance import table

_LENGTHS = ("4K", "8K", "16K", "32K", "64K", "128K")
# Wu et al., EMNLP 2025: averages of RULER's thirteen tasks.
_RULER = {
    ("Qwen2-7B-Instruct", "dense"): (90.7, 84.0, 80.9, 79.4, 74.4, 64.1),
    ("Qwen2-7B-Instruct", "StreamingLLM"): (94.4, 54.6, 33.5, 22.4, 15.4, 10.9),
    ("Qwen2-7B-Instruct", "InfLLM (4K+4K)"): (55.2, 52.1, 40.5, 29.8, 21.6, 18.6),
    ("Qwen2-7B-Instruct", "TokenSelect (2K+512)"): (94.1, 81.8, 68.7, 60.6, 51.8, 42.8),
    ("Qwen2-7B-Instruct", "TokenSelect (4K+4K)"): (94.4, 90.2, 82.1, 70.4, 59.7, 54.3),
    ("Llama-3-8B-Instruct", "dense"): (93.8, 90.2, 0.1, 0.0, 0.0, 0.0),
    ("Llama-3-8B-Instruct", "TokenSelect (2K+512)"): (93.7, 82.9, 71.9, 65.4, 59.4, 33.4),
}
_INFINITE_METHODS = ("dense", "NTK", "SelfExtend", "StreamingLLM", "InfLLM", "TokenSelect")
# Averages of InfiniteBench's tasks.
_INFINITE = {
    "Qwen2-7B-Instruct": (25.1, 43.5, 4.9, 16.1, 32.1, 49.1),
    "Llama-3-8B-Instruct": (18.2, 1.1, 29.5, 16.4, 39.2, 44.8),
    "Yi-1.5-6B-Chat": (14.5, 0.8, 1.0, 13.0, 33.8, 36.8),
}
# LongBench averages: dense, TokenSelect.
_LONG = {"Qwen2-7B-Instruct": (45.4, 43.6), "Llama-3-8B-Instruct": (42.5, 44.0), "Yi-1.5-6B-Chat": (32.5, 36.0)}
_VOTES = {"plain top-k": 16.6, "one head, one vote": 22.4, "soft vote": 86.6}
_SELECTED = ("128", "256", "512", "1K", "2K", "4K", "8K", "16K")
_BY_SELECTED = (13.4, 20.0, 45.6, 73.0, 86.6, 88.0, 85.4, 72.0)
_THRESHOLDS = ("0.5", "0.7", "0.8", "0.85", "0.9", "0.95", "1.0")
_BY_THRESHOLD = (0.2, 4.4, 24.6, 68.2, 86.6, 86.2, 86.8)

_INTRO = """## What the paper reports

None of these cells was reproduced here: the machine has neither the weights (Qwen2-7B-Instruct, Llama-3-8B-Instruct,
Yi-1.5-6B-Chat) nor the data of InfiniteBench and LongBench, and no way to fetch them. What was reproduced is the
method on the embedded model, above. With weights, data and a GPU at hand each table is one command. RULER is then
*RULER-style*, as above; NTK, SelfExtend and InfLLM are run where `tokenselect eval --help` names them as methods.
"""
_COMMANDS = """
RULER-style, 4K to 128K (again with another `--model`):

```sh
tokenselect eval --model Qwen/Qwen2-7B-Instruct --device cuda --paper --chat --limit 500 \\
  --context 4096,8192,16384,32768,65536,131072 --method dense,streaming,tokenselect --output runs/ruler \\
  --tasks {ruler}
```

InfiniteBench (names of the tasks are lm-eval's; `--data` names the folder with its `.jsonl` files, or leave it out to
read them from the hub):

```sh
tokenselect eval --model Qwen/Qwen2-7B-Instruct --device cuda --paper --chat --limit 1000 --context 131072 \\
  --method dense,streaming,tokenselect --output runs/infinitebench --data InfiniteBench \\
  --tasks {infinite}
```

LongBench (and LongBench-E, whose tasks end in `_e`):

```sh
tokenselect eval --model Qwen/Qwen2-7B-Instruct --device cuda --paper --chat --limit 500 --context 32768 \\
  --method dense,tokenselect --output runs/longbench --data LongBench/data \\
  --tasks {long}
```

R.KV by selected tokens and by threshold: the second command with `--tasks infinitebench_kv_retrieval` and
`--num-selected-tokens 512`, or `--reuse-threshold 0.85`, and so on; all may share one `--output` with `--resume`.
"""
_RULER_TASKS = (
    "niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multikey_3,niah_multivalue,"
    "niah_multiquery,variable_tracking,common_words,frequent_words,facts_qa"
)
_INFINITE_TASKS = (
    "infinitebench_passkey,infinitebench_number_string,infinitebench_kv_retrieval,infinitebench_math_find,"
    "infinitebench_code_debug,infinitebench_longbook_sum_en,infinitebench_longbook_qa_en,"
    "infinitebench_longbook_choice_en,infinitebench_longdialogue_qa_en"
)
_LONG_TASKS = (
    "longbench_narrativeqa,longbench_qasper,longbench_multifieldqa_en,longbench_hotpotqa,longbench_2wikimqa,"
    "longbench_musique,longbench_gov_report,longbench_qmsum,longbench_multi_news,longbench_trec,longbench_triviaqa,"
    "longbench_samsum,longbench_passage_count,longbench_passage_retrieval_en,longbench_lcc,longbench_repobench-p"
)


def published() -> str:
    """The section of the page."""
    parts = [_INTRO, "RULER, average:\n"]
    parts.append(table(("model", "method", *_LENGTHS), ([*key, *map(str, row)] for key, row in _RULER.items()), 2))
    parts.append("InfiniteBench, average:\n")
    parts.append(table(("model", *_INFINITE_METHODS), ([key, *map(str, row)] for key, row in _INFINITE.items())))
    parts.append("LongBench, average:\n")
    parts.append(table(("model", "dense", "TokenSelect"), ([key, *map(str, row)] for key, row in _LONG.items())))
    parts.append("InfiniteBench R.KV with Qwen2-7B, by vote, by selected tokens, by reuse threshold:\n")
    parts.append(table(tuple(_VOTES), [[str(score) for score in _VOTES.values()]], 0))
    parts.append(table(_SELECTED, [list(map(str, _BY_SELECTED))], 0))
    parts.append(table(_THRESHOLDS, [list(map(str, _BY_THRESHOLD))], 0))
    return "\n".join(parts) + _COMMANDS.format(ruler=_RULER_TASKS, infinite=_INFINITE_TASKS, long=_LONG_TASKS)
