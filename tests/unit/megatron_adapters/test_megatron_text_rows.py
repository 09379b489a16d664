"""Rows of text and of chat messages become rows of token ids."""

import pytest
import torch

from chatlearn.errors import DataError
from megatron_adapters.modules.text_rows import tokenize_rows


class Letters:
    """A token for each letter; chats are written as `role:content;`."""

    vocab_size, bos_id, eos_id, pad_id = 128, 1, 2, 0
    stop_ids, padding_side = (2,), "right"

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, token_ids):
        return "".join(chr(number) for number in token_ids if number > 2)

    def render_chat(self, messages, *, add_generation_prompt):
        text = "".join(f"{m['role'][0]}:{m['content']};" for m in messages)
        return [1, *self.encode(text + ("a:" if add_generation_prompt else ""))]


def rows_of(*prompts, **options):
    return tokenize_rows(prompts, Letters(), options.pop("max_length", 40), **options)


def texts(row):
    return {k: Letters().decode(v.tolist()) for k, v in row.items() if k.endswith("_token_ids")}


USER = {"role": "user", "content": "hi"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}


def test_text_begins_and_answers_end():
    (row,) = rows_of({"prompt": "ab", "response": "c", "answer": {"x": [1]}})
    assert row["prompt_token_ids"].tolist() == [1, 97, 98]
    assert row["response_token_ids"].tolist() == [99, 2]
    assert row["answer"] == {"x": [1]}


@pytest.mark.parametrize("row", [{"prompt": [USER]}, {"messages": [USER]}, [USER]])
def test_messages_go_through_the_template_once(row):
    (found,) = rows_of(row)
    assert texts(found) == {"prompt_token_ids": "u:hi;a:"}
    assert found["prompt_token_ids"].tolist().count(1) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
    ],
)
def test_pairs_of_messages_share_their_prompt(row):
    (found,) = rows_of(row)
    assert texts(found) == {
        "prompt_token_ids": "u:hi;a:",
        "chosen_token_ids": "yes;",
        "rejected_token_ids": "no;",
    }


def test_pairs_of_text():
    (found,) = rows_of({"prompt": "p", "chosen": "good", "rejected": "bad"})
    assert texts(found)["chosen_token_ids"] == "good"
    assert found["rejected_token_ids"].tolist()[-1] == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "prompt 0 has neither `prompt_token_ids` nor a `prompt` .* columns are te"),
        ({"prompt": [{"role": "user"}]}, "prompt 0: message 0 has no text in content"),
        ({"chosen": [YES], "rejected": [NO]}, "they share 0 of 1 and 1 messages"),
        ({"chosen": [USER], "rejected": [USER, NO]}, "they share 1 of 1 and 2 messages"),
        ({"prompt": "x", "chosen": [YES]}, "an answer of messages needs a prompt of messages"),
        ({"prompt": "x" * 50}, "prompt 0 has 51 tokens; with max_sequence_length=40"),
    ],
)
def test_what_cannot_be_read_names_its_row(row, message):
    with pytest.raises(DataError, match=message):
        rows_of(row)


def test_prompts_too_long_are_left_out_and_counted():
    found = rows_of("a" * 50, "b", "c" * 39, "d", is_dropping=True)
    assert [row["prompt"] for row in found] == ["b", "d"]
    assert found.num_dropped == 2
    with pytest.raises(DataError, match="all 1 prompts have 40 tokens or more"):
        rows_of("a" * 50, is_dropping=True)


def test_token_ids_are_taken_as_they_are():
    (row,) = tokenize_rows([{"prompt_token_ids": [5, 6]}], None, 10)
    assert torch.equal(row["prompt_token_ids"], torch.tensor([5, 6]))
