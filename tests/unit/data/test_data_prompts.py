"""Prompt files."""

import importlib.util

import pytest

from chatlearn.data.prompts import read_prompts
from chatlearn.errors import DataError


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = [{"prompt": "1+1=", "answer": 2}, {"prompt": "größer", "answer": 3}]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            '{"prompt": "1+1=", "answer": 2}\n\n{"prompt": "größer", "answer": 3}\n',
            ROWS,
        ),
        ("a.JSONL", '"just text"\n', [{"prompt": "just text"}]),
        (
            "a.json",
            '[{"prompt": "1+1=", "answer": 2}, {"prompt": "größer", "answer": 3}]',
            ROWS,
        ),
        ("a.json", '["x", "y"]', [{"prompt": "x"}, {"prompt": "y"}]),
        (
            "a.csv",
            'prompt,answer\n"a, b",2\nc,\n',
            [{"prompt": "a, b", "answer": "2"}, {"prompt": "c", "answer": ""}],
        ),
        ("a.txt", "one\n\n  two \n", [{"prompt": "one"}, {"prompt": "  two "}]),
        ("prompts", "one\r\ntwo", [{"prompt": "one"}, {"prompt": "two"}]),
    ],
)
def test_each_format_gives_a_row_per_prompt(tmp_path, name, content, expected):
    assert read_prompts(write(tmp_path, name, content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a.jsonl:2: not valid JSON"),
        ("a.json", '[\n{"a": 1},\n]', r"a.json:3: not valid JSON"),
        ("a.json", '{"a": 1}', r"a.json: expected a list of prompts, got dict"),
        ("a.csv", "a,b\n1,2\n3\n", r"a.csv:3: the row has not as many fields as the header"),
        ("a.csv", "a,b\n1,2,3\n", r"a.csv:2: the row has not as many fields as the header"),
        ("a.txt", "\n \n", r"prompt file .*a.txt holds no prompt"),
        ("a.jsonl", "", r"prompt file .*a.jsonl holds no prompt"),
        ("a.csv", "a,b\n", r"holds no prompt"),
        ("a.txt", b"\xff\xfe\x00", r"prompt file .*a.txt is not UTF-8 text"),
        ("a.jsonl", b'{"a": "\xff"}', r"prompt file .*a.jsonl is not UTF-8 text"),
    ],
)
def test_a_file_with_an_error_is_named_with_the_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_prompts(write(tmp_path, name, content))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl cannot be read: No such file or directory"):
        read_prompts(tmp_path / "none.jsonl")


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="Parquet needs pyarrow, .* pip install pyarrow"):
        read_prompts(write(tmp_path, "a.parquet", "PAR1"))


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path):
    write(tmp_path, "b.jsonl", '{"prompt": "3"}\n')
    write(tmp_path, "a.json", '["1", "2"]')
    write(tmp_path, "README.md", "not data")
    assert [row["prompt"] for row in read_prompts(tmp_path)] == ["1", "2", "3"]


def test_a_folder_of_splits(tmp_path):
    (tmp_path / "train").mkdir()
    write(tmp_path / "train", "a.txt", "one\n")
    assert read_prompts(tmp_path, split="train") == [{"prompt": "one"}]
    with pytest.raises(DataError, match="has no split 'test'"):
        read_prompts(tmp_path, split="test")


def test_columns_get_other_names_and_the_rest_stays(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"question": "1+1", "gold": [2], "level": 3}\n')
    columns = {"prompt": "question", "answer": "gold"}
    assert read_prompts(path, columns=columns) == [{"prompt": "1+1", "answer": [2], "level": 3}]
    with pytest.raises(DataError, match=r"row 0 has no column solution; it has question, gold"):
        read_prompts(path, columns={"answer": "solution"})


def test_what_the_datasets_library_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"p{n}", "messages": [{"role": "user", "content": "x"}]} for n in range(5)]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": whole}).save_to_disk(tmp_path / "splits")
    assert read_prompts(tmp_path / "one") == rows
    assert read_prompts(tmp_path / "splits", split="train") == rows
    with pytest.raises(DataError, match="has the splits train: name one of them"):
        read_prompts(tmp_path / "splits")
    with pytest.raises(DataError, match="has no splits"):
        read_prompts(tmp_path / "one", split="train")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"x")
    with pytest.raises(DataError, match="arrow is damaged"):
        read_prompts(tmp_path / "one")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no file that ends in"):
        read_prompts(tmp_path)
