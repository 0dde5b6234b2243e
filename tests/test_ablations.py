"""Ablations go on where they stopped, and their look-ups ask for what the document says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_tiny

from benchmarks import lookups as looking
from benchmarks.lookups import look_up, lookups
from benchmarks.rows import Rows
from tokenselect.config import TokenSelectConfig
from tokenselect.methods import attach
from tokenselect.models import LoadedModel, load_model

CPU = torch.device("cpu")
SELECTING = TokenSelectConfig(
    num_sink_tokens=4,
    num_local_tokens=16,
    num_selected_tokens=16,
    num_dense_tokens=0,
    block_size=16,
    num_tail_tokens=4,
    reuse_threshold=0.9,
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "state_of_the_union", lambda: "The people asked for peace. " * 400)


def test_what_a_file_has_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    rows = Rows(path, ("name", "length"), CPU, minutes=1)
    assert rows.wants(name="a", length=5)
    rows.add([{"name": "a", "length": 5, "figure": 0.5}])
    rows.add([{"name": "b", "length": 5, "figure": 0.25}])
    assert not rows.wants(name="a", length=5)
    later = Rows(path, ("name", "length"), CPU, minutes=1)
    assert [later.wants(name=name, length=5) for name in "abc"] == [False, False, True]
    assert later.wants(name="a", length=6)
    header, *lines = path.read_text().splitlines()
    assert header.startswith("name,length,figure,when,device")
    assert len(lines) == 2


def test_nothing_begins_when_time_is_up(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.csv", ("name",), CPU, minutes=0)
    assert rows.is_over
    assert not rows.wants(name="a")


@pytest.mark.parametrize("seed", range(3))
def test_every_question_has_its_fact(loaded: LoadedModel, seed: int) -> None:
    task = lookups(loaded, 350, seed)
    text = task.prompt + task.answer
    numbers = [text[start:end] for start, end in task.numbers]
    assert len({*numbers}) == 3
    for number, question in zip(numbers, text[len(task.prompt.rpartition("\n\n")[0]) :].split("\n\n")[1:], strict=True):
        assert question.endswith(f": {number}.")
        assert f"{question} " in task.prompt  # the needle says it in the same words
    assert task.answer.startswith(f" {numbers[0]}.")
    assert lookups(loaded, 350, seed) == task


def test_digits_are_guessed_before_they_are_told(loaded: LoadedModel) -> None:
    task = lookups(loaded, 350, 0)
    with attach(loaded.model, "tokenselect", SELECTING):
        found = look_up(loaded, task)
    assert (found["n"], found["digits"]) == (3, 3)  # the tiny model's numbers are one token each
    assert 0 <= found["right"] <= 3
    assert found["lookups"] > 0
    with attach(loaded.model, "dense", SELECTING):
        assert look_up(loaded, task)["lookups"] == 0


def test_a_model_that_copies_is_right(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    task = lookups(loaded, 350, 0)
    ids = torch.tensor(loaded.tokenizer(task.prompt + task.answer)["input_ids"])

    class Copying:
        """A model that knows the text."""

        device, config, seen = CPU, loaded.model.config, 0

        def __call__(self, inputs: torch.Tensor, **kwargs: object) -> object:
            self.seen += inputs.shape[1]
            logits = torch.nn.functional.one_hot(ids[self.seen], 64)[None, None].float()
            return type("Out", (), {"logits": logits})

    knowing = LoadedModel(Copying(), loaded.tokenizer, "copying", 256)  # type: ignore[arg-type]
    found = look_up(knowing, task)
    assert (found["right"], found["digits_right"]) == (3, 3)
