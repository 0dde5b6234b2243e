"""Tasks by name as lm-eval's objects: the generated ones, and its own for which data are at hand."""

from __future__ import annotations

import fnmatch
import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tokenselect.evals.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval.api.task import Task

GENERATED = Path(__file__).parent / "generated"
PREFIX = "tokenselect_"
# What the files of InfiniteBench are called, by lm-eval's name of the task; those of LongBench are called like it.
_INFINITE_HUB = "xinrongzhang2022/InfiniteBench"
_INFINITE_FILES = {
    "infinitebench_code_debug": "code_debug",
    "infinitebench_code_run": "code_run",
    "infinitebench_kv_retrieval": "kv_retrieval",
    "infinitebench_longbook_choice_en": "longbook_choice_eng",
    "infinitebench_longbook_qa_chn": "longbook_qa_chn",
    "infinitebench_longbook_qa_en": "longbook_qa_eng",
    "infinitebench_longbook_sum_en": "longbook_sum_eng",
    "infinitebench_longdialogue_qa_en": "longdialogue_qa_eng",
    "infinitebench_math_find": "math_find",
    "infinitebench_number_string": "number_string",
    "infinitebench_passkey": "passkey",
}
DATA_TASKS = ("longbench_*", *_INFINITE_FILES)


def check_tasks(names: Sequence[str]) -> None:
    """Refuse what is no task.

    Raises:
        ValueError: names it, and the generated tasks.
    """
    for name in names:
        if name not in TASKS and not any(fnmatch.fnmatch(name, known) for known in DATA_TASKS):
            raise ValueError(
                f"there is no task {name!r}; generated are {', '.join(TASKS)}; with data there are "
                f"{', '.join(DATA_TASKS)}"
            )


def load_tasks(
    names: Sequence[str], tokenizer: str, lengths: Sequence[int], samples: int, data: str | None
) -> dict[str, Task]:
    """The tasks, their questions made or read.

    Args:
        names: of generated tasks, or of lm-eval's for LongBench (longbench_qasper, longbench_qasper_e ...) and
            InfiniteBench (infinitebench_longbook_qa_en ...).
        tokenizer: folder or hub name; counts the tokens of generated prompts.
        lengths: most tokens of a generated prompt.
        samples: of each length.
        data: where the files of LongBench or InfiniteBench are: a folder, or a data set on the hub; by default on
            the hub, under the name that lm-eval knows.

    Returns:
        By name, as given.

    Raises:
        ValueError: there is no such task, or a file is missing.
    """
    check_tasks(names)
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of metadata that we do pass
    metadata: Any = {"tokenizer": tokenizer, "lengths": list(lengths), "samples": samples}
    ours = [name for name in names if name in TASKS]
    found: dict[str, Task] = {}
    if ours:
        manager = TaskManager(include_path=GENERATED, include_defaults=False, metadata=metadata)
        loaded = manager.load([PREFIX + name for name in ours])["tasks"]
        found.update((name, loaded[PREFIX + name]) for name in ours)
    if theirs := [name for name in names if name not in TASKS]:
        manager = TaskManager(include_path=_theirs(), include_defaults=False)
        for name in theirs:
            found[name] = _with_data(manager, name, data)
    return {name: found[name] for name in names}


def _theirs() -> list[Path]:
    """Where lm-eval has these tasks; it lists all of its own in twenty seconds."""
    import lm_eval.tasks

    return [Path(lm_eval.tasks.__file__).parent / name for name in ("longbench", "infinitebench")]


def _with_data(manager: Any, name: str, data: str | None) -> Task:
    from datasets import disable_progress_bars
    from datasets.exceptions import DatasetNotFoundError

    disable_progress_bars()
    if name not in manager.task_index:
        raise ValueError(f"lm-eval has no task {name!r}")
    try:
        with TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.yaml"
            file.write_text(_yaml(name, manager.task_index[name].yaml_path, data))
            return next(iter(manager.load([str(file)])["tasks"].values()))
    except (OSError, DatasetNotFoundError) as error:
        raise ValueError(f"the data of {name} cannot be read ({error}); pass their folder with --data") from None


def _yaml(name: str, original: Path, data: str | None) -> str:
    """lm-eval's task with its files read as plain JSON: the loaders of these data sets are no longer run."""
    lines = [f"include: {original}", f"task: {name}"]
    if name in _INFINITE_FILES:
        split, file = name.removeprefix("infinitebench_"), f"{_INFINITE_FILES[name]}.jsonl"
        lines += _source(split, _location(data or _INFINITE_HUB, file))
    elif data is not None:
        lines += _source("test", _location(data, f"{name.removeprefix('longbench_')}.jsonl"))
    return "\n".join(lines)


def _location(data: str, file: str) -> str:
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return f"hf://datasets/{data}/{file}"
    if not (folder / file).is_file():
        raise FileNotFoundError(f"there is no {file} in {folder}")
    return str(folder / file)


def _source(split: str, location: str) -> list[str]:
    return [
        "dataset_path: json",
        "dataset_name: null",
        f"dataset_kwargs: {json.dumps({'data_files': {split: location}})}",
        f"test_split: {split}",
    ]
